"""A rank that dies, stops or differs: the others end too, the checkpoint is good, torchrun goes on from it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from clock import PATIENCE, wait_for
from faults.conftest import SETTINGS, TINY, verified_step
from minigpt_cli.core.checkpoint import load
from runs import write_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
Start = Callable[..., "Launched"]


def arguments(*settings: str, flags: tuple[str, ...] = ()) -> list[str]:
    pairs = [word for setting in (*TINY, "data.path=data", *settings) for word in ("--set", setting)]
    return ["-m", "minigpt_cli", "train", "--config", "gpt", "--device", "cpu", "--out", "run", *pairs, *flags]


class Launched:
    """torchrun with two ranks, and what all of them say."""

    def __init__(self, place: Path, command: list[str]) -> None:
        self.log = place / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=place, env=ENVIRONMENT, stdout=log, stderr=log)

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str) -> None:
        wait_for(lambda: re.search(pattern, self.said()) or self.process.poll() is not None, pattern)
        assert re.search(pattern, self.said()), self.said()

    def rank(self, number: int) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):
                if child.environ().get("RANK") == str(number):
                    return child
        raise AssertionError(f"no rank {number}")

    def end(self) -> None:
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", "the king and queen of winter come to speak no more, my lord. " * 40)
    return tmp_path


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    launched = []

    def go(*settings: str, flags: tuple[str, ...] = (), restarts: int = 0) -> Launched:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launched.append(Launched(place, [*run, "--max-restarts", str(restarts), *arguments(*settings, flags=flags)]))
        return launched[-1]

    yield go
    for one in launched:
        one.end()


@pytest.mark.parametrize(("victim", "form"), [(0, SETTINGS[0]), (1, SETTINGS[0]), (1, SETTINGS[1])])
def test_a_rank_dies_and_all_end_soon(start: Start, place: Path, victim: int, form: str) -> None:
    run = start(form, "train.checkpoint_interval=5")
    run.wait_for(r"saved run/last\S+ at step [\d,]{2,}")
    other = run.rank(1 - victim)
    run.rank(victim).kill()
    other.wait(timeout=PATIENCE)  # a third of the time after which PyTorch gives up a rank that says nothing
    assert run.process.wait(timeout=PATIENCE) != 0
    assert verified_step(place / "run", at_least=5) >= 5
    assert "lost contact" in run.said()


def test_torchrun_goes_on_by_itself_where_a_rank_died(start: Start, place: Path, form: str) -> None:
    """Even under --overwrite, which must replace what was there before and nothing that this start made."""
    before = subprocess.run(
        [sys.executable, *arguments("train.max_iters=3")], cwd=place, env=ENVIRONMENT, capture_output=True, check=False
    )
    assert before.returncode == 0, before.stderr
    run = start(form, "train.max_iters=400", "train.checkpoint_interval=20", flags=("--overwrite",), restarts=2)
    run.wait_for("parallel: ddp")
    run.rank(1).kill()  # before the first checkpoint: the next attempt begins anew
    run.wait_for(r"(?s)parallel: ddp.*parallel: ddp.*saved run/last")
    run.rank(0).kill()
    assert run.process.wait(timeout=PATIENCE) == 0, run.said()
    resumed = re.findall(r"resuming run/last\S+ at step (\d+)", run.said())
    assert len(resumed) == 1
    assert int(resumed[0]) >= 7  # the first evaluation, before which `last` is saved
    assert verified_step(place / "run", at_least=400) == 400
    assert {path.name for path in (place / "run").iterdir() if path.is_file()} >= {"config.yaml", "metrics.jsonl"}


def test_asked_to_stop_all_save_once_and_one_process_goes_on(start: Start, place: Path) -> None:
    run = start("train.checkpoint_interval=100000")
    run.wait_for("step [1-9]")
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=PATIENCE) != 0
    said = run.said()
    step = load(place / "run" / "last.safetensors").header.step
    for line in ("parallel: ddp", "stopped at step", f"saved run/last.safetensors at step {step}\n"):
        assert said.count(line) == 1, said
    assert "torchrun ... -m minigpt_cli train --config gpt" in said
    assert f"stopped at step {step:,}, all saved" in said
    alone = subprocess.run(
        [sys.executable, *arguments(f"train.max_iters={step + 3}", flags=("--resume",))],
        cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert load(place / "run" / "last.safetensors").header.step == step + 3


@pytest.mark.parametrize("differs", ["train.seed=1", "data.path=other"])
def test_a_rank_that_was_started_otherwise_is_refused(place: Path, differs: str) -> None:
    """Two ranks by hand, as two hosts would start them."""
    write_dataset(place / "other", "another text, that has nothing to do with the first. " * 40)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        place_of_rank = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        settings = [differs] if rank else []
        ranks.append(
            subprocess.Popen(
                [sys.executable, *arguments(*settings)],
                cwd=place,
                env=ENVIRONMENT | place_of_rank,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] != [0, 0]
    assert all(rank.returncode for rank in ranks)
    assert "error on rank 1" in said[1]
    assert differs.split("=")[0] in said[1] or "fingerprint" in said[1]
    assert "error" not in said[0]
    assert not (place / "run").exists()
