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

from faults.conftest import Launch, temporaries, train_arguments, verified_step
from minigpt_cli.core.checkpoint import load
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.errors import UserError

KILLS = int(os.environ.get("MINIGPT_KILLS", "25"))  # 100 for a release


@pytest.mark.slow
def test_a_run_survives_being_killed_at_random_moments(launch: Launch, place: Path) -> None:
    moments = random.Random(1)
    step = -1
    for number in range(KILLS):
        child = launch(train_arguments("train.keep=2", flags=("--resume",) if step >= 0 else ()))
        if number % 5:  # every fifth is killed while it starts
            child.wait_for(r"saved run/last\.safetensors")
        time.sleep(moments.random() * 0.25)  # anywhere in a step, or between two
        child.kill()
        before = step
        step = verified_step(place / "run", at_least=max(before, child.announced()))
    assert step > KILLS // 2
    child = launch(train_arguments(f"train.max_iters={step + 5}", flags=("--resume",)))
    assert child.wait() == 0, child.stderr.read_text()
    assert load(place / "run" / "last.safetensors").header.step == step + 5
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


STOPS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 143, "SIGUSR1": 143, "SIGUSR2": 143}


@pytest.mark.parametrize(("name", "code"), STOPS.items(), ids=STOPS.keys())
def test_a_stop_signal_saves_at_the_next_step_and_says_how_to_go_on(
    launch: Launch, place: Path, name: str, code: int
) -> None:
    moments = random.Random(name)
    for flags in ((), ("--resume",), ("--resume",)):
        child = launch(train_arguments("train.checkpoint_interval=1000000", "train.eval_interval=1000000", flags=flags))
        child.wait_for(r"step \d")
        time.sleep(moments.random() * 0.2)
        child.send(signal.Signals[name])
        assert child.wait() == code
        text = child.stderr.read_text()
        assert f"minigpt train {'--config gpt'}" in text
        assert "--resume" in text
        stopped_at = int(text.rsplit("stopped at step ", 1)[1].split(",  ")[0].split(", all")[0].replace(",", ""))
        assert verified_step(place / "run", at_least=child.announced()) == stopped_at
    assert temporaries(place / "run") == []


def test_a_second_ctrl_c_leaves_at_once_with_the_last_checkpoint_intact(launch: Launch, place: Path) -> None:
    child = launch(train_arguments("train.eval_interval=1000000"))
    child.wait_for(r"saved run/last\.safetensors")
    child.send(signal.SIGSTOP)  # so that both arrive before it can react to the first
    child.send(signal.SIGINT)
    child.send(signal.SIGCONT)
    time.sleep(0.001)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    verified_step(place / "run", at_least=child.announced())


def test_under_nohup_a_closed_terminal_stops_nothing(launch: Launch, place: Path) -> None:
    child = launch(train_arguments("train.max_iters=400"), before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    child.wait_for(r"saved run/last\.safetensors")
    child.send(signal.SIGHUP)
    assert child.wait() == 0
    assert verified_step(place / "run", at_least=400) == 400


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=["stdout", "stderr", "all three"])
def test_closed_streams_stop_nothing(launch: Launch, place: Path, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)  # as Python does when it starts with one closed

    child = launch(train_arguments("train.max_iters=20"), before=close)
    assert child.wait() == 0
    assert verified_step(place / "run", at_least=-1) == 20


def test_a_reader_that_goes_away_stops_nothing(launch: Launch, place: Path) -> None:
    """stderr into a pipe whose other end is closed meanwhile, as `2>&1 | head` does."""

    def broken_pipe() -> None:
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(reading)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - a stream that knows it is a pipe

    child = launch(train_arguments("train.max_iters=20"), before=broken_pipe)
    child.wait()
    assert verified_step(place / "run", at_least=-1) == 20
