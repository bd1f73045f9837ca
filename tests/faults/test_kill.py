"""SIGKILL at random moments: what was announced is there, what is there is whole, and the run goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from faults.conftest import FORMS, SETTINGS, Launch, temporaries, train_arguments, verified_step
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.metrics import read_metrics
from runs import write_dataset

KILLS = int(os.environ.get("MINIGPT_KILLS", "25"))  # 100 for a release


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kills"), [(SETTINGS[0], KILLS), (SETTINGS[1], -(-KILLS // 3))], ids=FORMS)
def test_a_run_survives_being_killed_at_random_moments(launch: Launch, place: Path, form: str, kills: int) -> None:
    moments = random.Random(1)
    step = -1
    for number in range(kills):
        child = launch(train_arguments(form, "train.keep=2", flags=("--resume",) if step >= 0 else ()))
        if number % 5:  # every fifth is killed while it starts
            child.wait_for(r"saved run/last")
        time.sleep(moments.random() * 0.25)  # anywhere in a step, or between two
        child.kill()
        before = step
        step = verified_step(place / "run", at_least=max(before, child.announced()))
    assert step > kills // 2
    child = launch(train_arguments(form, f"train.max_iters={step + 5}", flags=("--resume",)))
    assert child.wait() == 0, child.stderr.read_text()
    assert verified_step(place / "run", at_least=step) == step + 5
    assert temporaries(place / "run") == []


@pytest.mark.slow
def test_no_half_dataset_is_ever_accepted(launch: Launch, place: Path) -> None:
    moments = random.Random(2)
    arguments = ["prepare", "input.txt", "--out", "made", "--tokenizer", "bpe", "--vocab-size", "300", "--force"]
    begin = time.monotonic()
    assert launch(arguments).wait() == 0
    took = time.monotonic() - begin  # as busy as the machine is
    whole = 0
    for number in range(KILLS):
        if number % 2:  # else it replaces a whole one
            shutil.rmtree(place / "made", ignore_errors=True)
        child = launch(arguments)
        time.sleep(moments.random() * 1.2 * took)
        child.kill()
        try:
            dataset = Dataset(place / "made")
        except UserError:
            continue
        whole += 1
        assert len(dataset.train) + len(dataset.val) == dataset.meta.train.tokens + dataset.meta.val.tokens > 0
    child = launch(arguments)
    assert child.wait() == 0, child.stderr.read_text()
    assert [path.name for path in place.iterdir() if path.name.startswith(".made.")] == []
    assert 0 < whole < KILLS  # some were killed before they had made one


@pytest.mark.parametrize("when", ["scheduled", "at the end"])
def test_killed_in_a_long_evaluation_a_run_has_saved_the_steps_before_it(
    launch: Launch, place: Path, form: str, when: str
) -> None:
    """Both intervals are 50, as both have one default; scoring the validation split takes far longer than 50 steps."""
    shutil.rmtree(place / "data")
    write_dataset(place / "data", (place / "input.txt").read_text() * 150)
    at_50 = (form, "train.eval_interval=50", "train.checkpoint_interval=50", "train.log_interval=50")
    if when == "at the end":
        at_50 = (form, "train.max_iters=50", "train.eval_interval=99", "train.checkpoint_interval=99")
    child = launch(train_arguments(*at_50))
    child.wait_for(r"saved run/last\S+ at step 50\b")
    child.kill()
    assert verified_step(place / "run", at_least=50) == 50
    records = read_metrics(place / "run" / "metrics.jsonl")
    assert not any("val_loss" in record for record in records), "the evaluation was over: make it longer"
    assert [record["step"] for record in records if "train_loss" in record][-1] == 50


STOPS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 143, "SIGUSR1": 143, "SIGUSR2": 143}
CASES = [*((name, SETTINGS[0]) for name in STOPS), ("SIGTERM", SETTINGS[1])]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_stop_signal_saves_at_the_next_step_and_says_how_to_go_on(
    launch: Launch, place: Path, name: str, form: str
) -> None:
    moments = random.Random(name)
    rarely = ("train.checkpoint_interval=1000000", "train.eval_interval=1000000")
    for flags in ((), ("--resume",), ("--resume",)):
        child = launch(train_arguments(form, *rarely, flags=flags))
        child.wait_for(r"step \d")
        time.sleep(moments.random() * 0.2)
        child.send(signal.Signals[name])
        assert child.wait() == STOPS[name]
        text = child.stderr.read_text()
        assert f"minigpt train {'--config gpt'}" in text
        assert "--resume" in text
        stopped_at = int(text.rsplit("stopped at step ", 1)[1].split(",  ")[0].split(", all")[0].replace(",", ""))
        assert verified_step(place / "run", at_least=child.announced()) == stopped_at
    assert temporaries(place / "run") == []


def test_a_second_ctrl_c_leaves_at_once_with_the_last_checkpoint_intact(launch: Launch, place: Path, form: str) -> None:
    child = launch(train_arguments(form, "train.eval_interval=1000000"))
    child.wait_for(r"saved run/last")
    child.send(signal.SIGSTOP)  # so that both arrive before it can react to the first
    child.send(signal.SIGINT)
    child.send(signal.SIGCONT)
    time.sleep(0.001)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    verified_step(place / "run", at_least=child.announced())


def test_under_nohup_a_closed_terminal_stops_nothing(launch: Launch, place: Path, form: str) -> None:
    arguments = train_arguments(form, "train.max_iters=100")
    child = launch(arguments, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    child.wait_for(r"saved run/last")
    child.send(signal.SIGHUP)
    assert child.wait() == 0
    assert verified_step(place / "run", at_least=100) == 100


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=["stdout", "stderr", "all three"])
def test_closed_streams_stop_nothing(launch: Launch, place: Path, closed: tuple[int, ...], form: str) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)  # as Python does when it starts with one closed

    child = launch(train_arguments(form, "train.max_iters=20"), before=close)
    assert child.wait() == 0
    assert verified_step(place / "run", at_least=-1) == 20


def test_a_reader_that_goes_away_stops_nothing(launch: Launch, place: Path, form: str) -> None:
    """stderr into a pipe whose other end is closed meanwhile, as `2>&1 | head` does."""

    def broken_pipe() -> None:
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(reading)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - a stream that knows it is a pipe

    child = launch(train_arguments(form, "train.max_iters=20"), before=broken_pipe)
    child.wait()
    assert verified_step(place / "run", at_least=-1) == 20
