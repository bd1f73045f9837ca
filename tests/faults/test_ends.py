"""However a run ends, its folder holds exactly the files that belong there, in both forms of checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import FORMS, Launch, temporaries, train_arguments, verified_step
from minigpt_cli.core.checkpoint import SHARDED
from minigpt_cli.core.run import open_run

RUN = {".lock", "config.yaml", "metrics.jsonl", "loss.png"}
KILLED = {".lock", "config.yaml", "metrics.jsonl", ".owner.json"}
SHORT = ("train.max_iters=6", "train.eval_interval=3", "train.checkpoint_interval=6", "train.log_interval=1")
RARELY = ("train.eval_interval=1000000", "train.checkpoint_interval=1000000", "train.log_interval=1")
WILD = ("train.learning_rate=1e30", *RARELY)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of(form: str, last: int, best: int | None) -> set[str]:
    """The files of these checkpoints."""
    steps = {"last": last} | ({"best": best} if best is not None else {})
    if form.endswith("file"):
        return {f"{kind}.safetensors" for kind in steps}
    parts = ("header.json", "shard-00001-model-00001-of-00001.safetensors")
    return {f"{kind}-{step:08d}{SHARDED}/{part}" for kind, step in steps.items() for part in parts}


def train(launch: Launch, form: str, *settings: str, flags: tuple[str, ...] = (), code: int = 0) -> str:
    """Train to the end in `run`; what it said."""
    child = launch(train_arguments(form, *settings, flags=flags))
    assert child.wait() == code, child.stderr.read_text()
    return child.stderr.read_text()


def first_run(launch: Launch, place: Path, form: str) -> dict[str, bytes]:
    """A finished run with logs of its own beside it, and what it left."""
    train(launch, form, *SHORT)
    (place / "run" / "logs").mkdir()
    (place / "run" / "logs" / "events").write_text("of the first run")
    return files(place / "run")


def test_finished(launch: Launch, place: Path, form: str) -> None:
    train(launch, form, *SHORT)
    assert set(files(place / "run")) == RUN | of(form, 6, 6)
    assert verified_step(place / "run", at_least=6) == 6


def test_resumed_when_complete(launch: Launch, place: Path, form: str) -> None:
    before = first_run(launch, place, form)
    assert "this run is finished" in train(launch, form, *SHORT, flags=("--resume",))
    assert files(place / "run") == before


def test_resumed_and_finished(launch: Launch, place: Path, form: str) -> None:
    first_run(launch, place, form)
    train(launch, form, *SHORT, "train.max_iters=12", flags=("--resume",))
    assert set(files(place / "run")) == RUN | {"logs/events"} | of(form, 12, 12)


def test_ended_by_patience(launch: Launch, place: Path, form: str) -> None:
    train(launch, form, "train.learning_rate=1.0", "train.patience=1", "train.eval_interval=2", *RARELY[1:])
    step = verified_step(place / "run", at_least=4)
    assert set(files(place / "run")) == RUN | of(form, step, step - 2)


def test_ended_by_time(launch: Launch, place: Path, form: str) -> None:
    train(launch, form, "train.max_minutes=0.0001", *RARELY)
    step = verified_step(place / "run", at_least=1)
    assert set(files(place / "run")) == RUN | of(form, step, step)


def test_stopped_by_a_signal(launch: Launch, place: Path, form: str) -> None:
    child = launch(train_arguments(form, *RARELY))
    child.wait_for(r"step \d")
    child.send(signal.SIGTERM)
    assert child.wait() == 143
    step = verified_step(place / "run", at_least=1)
    assert set(files(place / "run")) == RUN | of(form, step, None)


def test_diverged_before_the_first_checkpoint(launch: Launch, place: Path, form: str) -> None:
    """What is known of the run stays, and the next run needs no --overwrite."""
    assert "no checkpoint was written" in train(launch, form, *WILD, code=1)
    assert set(files(place / "run")) == RUN
    assert "run without --resume" in train(launch, form, *SHORT, flags=("--resume",), code=2)
    train(launch, form, *SHORT)
    assert set(files(place / "run")) == RUN | of(form, 6, 6)


def test_diverged_after_a_checkpoint(launch: Launch, place: Path, form: str) -> None:
    before = first_run(launch, place, form)
    said = train(launch, form, *WILD, "train.max_iters=99", flags=("--resume",), code=1)
    assert f"run/last{'.safetensors' if form.endswith('file') else '-00000006.sharded'} is kept" in said
    after = files(place / "run")
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in of(form, 6, 6))


def test_killed_before_the_first_checkpoint(launch: Launch, place: Path, form: str) -> None:
    child = launch(train_arguments(form, *RARELY))
    child.wait_for(r"step \d")
    child.kill()
    assert set(files(place / "run")) == KILLED
    train(launch, form, *SHORT)
    assert set(files(place / "run")) == RUN | of(form, 6, 6)
    assert temporaries(place / "run") == []


def test_killed_after_a_checkpoint(launch: Launch, place: Path, form: str) -> None:
    child = launch(train_arguments(form, *SHORT, "train.max_iters=1000000", "train.checkpoint_interval=1000000"))
    child.wait_for(r"saved run/best")
    child.kill()
    step = verified_step(place / "run", at_least=child.announced())
    assert step == 3, "the first evaluation comes with a checkpoint"
    left = {name for name in files(place / "run") if not name.startswith(("best", ".tmp"))}
    assert left == KILLED | of(form, 3, None)
    train(launch, form, *SHORT, flags=("--resume",))
    assert set(files(place / "run")) == RUN | of(form, 6, 6)


@pytest.mark.parametrize("new", FORMS)
def test_overwritten_and_finished(launch: Launch, place: Path, form: str, new: str) -> None:
    first_run(launch, place, form)
    train(launch, f"runtime.checkpoints={new}", *SHORT, "train.max_iters=5", flags=("--overwrite",))
    assert set(files(place / "run")) == RUN | of(new, 5, 5)
    assert {path.name for path in (place / "run").iterdir()} & {".old", ".returning"} == set()


@pytest.mark.parametrize("new", FORMS)
def test_overwritten_by_a_run_that_diverges_at_once(launch: Launch, place: Path, form: str, new: str) -> None:
    before = first_run(launch, place, form)
    train(launch, f"runtime.checkpoints={new}", *WILD, flags=("--overwrite",), code=1)
    assert files(place / "run") == before


def test_overwritten_by_a_run_that_is_killed_at_once(launch: Launch, place: Path, form: str) -> None:
    before = first_run(launch, place, form)
    child = launch(train_arguments(form, *RARELY, flags=("--overwrite",)))
    child.wait_for(r"step \d")
    child.kill()
    assert "this run is finished" in train(launch, form, *SHORT, flags=("--resume",))
    assert files(place / "run") == before


def test_overwritten_by_a_run_that_is_killed_after_its_first_evaluation(launch: Launch, place: Path, form: str) -> None:
    """Then the new run is the run: what it announced is never taken back."""
    first_run(launch, place, form)
    child = launch(train_arguments(form, "train.eval_interval=3", *RARELY[1:], flags=("--overwrite",)))
    child.wait_for(r"saved run/best")
    child.kill()
    said = train(launch, form, *SHORT, flags=("--resume",))
    assert "at step 3" in said.split("resuming run/last")[1].splitlines()[0]
    assert set(files(place / "run")) == RUN | of(form, 6, 6)


OPERATIONS = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")  # os.replace and Path.unlink are among them


def killed_at(number: int) -> Callable[[], None]:
    """In the child: SIGKILL right before the `number`-th time that it makes, moves or removes something in the run."""

    def install() -> None:
        count = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in OPERATIONS and "run" in Path(os.fsdecode(str(arguments[0]))).parts:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return install


@pytest.mark.slow
def test_overwriting_may_be_killed_between_any_two_operations(launch: Launch, place: Path, form: str) -> None:
    """Either the old run is there, to the byte, or the new one with all that it announced."""
    before = first_run(launch, place, form)
    (place / "run").rename(place / "first")
    new = (*SHORT, "train.max_iters=4", "train.checkpoint_interval=2", "train.eval_interval=2", "train.keep=1")
    outcomes = {"old": 0, "new": 0}
    for number in range(1, 200):
        shutil.rmtree(place / "run", ignore_errors=True)
        shutil.copytree(place / "first", place / "run")
        child = launch(train_arguments(form, *new, flags=("--overwrite",)), before=killed_at(number))
        if child.wait() == 0:
            break
        with open_run(place / "run") as folder:
            there = {name: content for name, content in files(place / "run").items() if name != ".owner.json"}
            if there == before:
                assert child.announced() == -1
                outcomes["old"] += 1
                continue
            outcomes["new"] += 1
            assert folder.newest()[0].header.step >= max(child.announced(), 2)
            assert verified_step(place / "run", at_least=child.announced()) <= 4
            assert "logs/events" not in there
            assert not [name for name in there if name.startswith((".old", ".returning"))]
            assert temporaries(place / "run") == []
    assert min(outcomes.values()) > 5, outcomes
