"""Disks that fail, fill up, turn read-only or go away: the run ends, the old checkpoint is intact, nothing is left."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import SETTINGS, Launch, temporaries, train_arguments, verified_step

SHORT = ("train.max_iters=6", "train.checkpoint_interval=3", "train.eval_interval=3", "train.keep=1", "model.n_layer=0")


def fail_at(call: str, number: int) -> Callable[[], None]:
    """In the child: the `number`-th write, fsync or rename of a checkpoint fails with an input/output error."""

    def install() -> None:
        count = 0

        def failing(real: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **keywords: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return real(*arguments, **keywords)

            return wrapper

        if call == "write":
            real_open = builtins.open

            def opened(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
                file = real_open(path, mode, *arguments, **keywords)
                if "safetensors" in str(path) and "w" in mode:
                    return _Failing(file, failing(file.write))
                return file

            builtins.open = opened  # type: ignore[assignment]
        else:
            setattr(os, call, failing(getattr(os, call)))

    return install


class _Failing:
    """A file whose `write` is another."""

    def __init__(self, file: Any, write: Callable[..., Any]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Failing:
        return self

    def __exit__(self, *problem: Any) -> None:
        self._file.close()


CALLS = {  # how many of them a run makes, at least; shards are written by PyTorch, whose writes are not seen here
    (SETTINGS[0], "write"): 40, (SETTINGS[0], "fsync"): 10, (SETTINGS[0], "replace"): 6,
    (SETTINGS[1], "fsync"): 10, (SETTINGS[1], "rename"): 6,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("form", "call"), CALLS)
def test_whichever_call_fails_the_run_ends_and_nothing_is_lost(
    launch: Launch, place: Path, form: str, call: str
) -> None:
    failures = 0
    for number in range(1, 200):
        shutil.rmtree(place / "run", ignore_errors=True)
        child = launch(train_arguments(form, *SHORT), before=fail_at(call, number))
        code = child.wait()
        if code == 0:
            break  # it makes no more than number - 1 such calls
        failures += 1
        assert code == 1, child.stderr.read_text()
        assert "Input/output error" in child.stderr.read_text()
        assert "Traceback" not in child.stderr.read_text()
        step = verified_step(place / "run", at_least=child.announced())
        assert temporaries(place / "run") == []
        if call != "write" or number % 10 == 0:  # a checkpoint is dozens of writes
            again = launch(train_arguments(form, *SHORT, flags=("--resume",) if step >= 0 else ("--overwrite",)))
            assert again.wait() == 0, again.stderr.read_text()
            assert verified_step(place / "run", at_least=6) == 6
    else:
        raise AssertionError("never came to an end")
    assert failures >= CALLS[form, call]


@pytest.fixture
def small_disk(place: Path) -> Iterator[Callable[..., Path]]:
    """`small_disk("size=200k")`: a file system of its own, mounted at `run`. Skips where mounting is not allowed."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = place / "run"
        path.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "minigpt-test", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=False)


@pytest.mark.parametrize(
    ("form", "pages"), [(SETTINGS[0], "size=180k"), (SETTINGS[1], "size=120k")], ids=["file", "sharded"]
)
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    launch: Launch, small_disk: Callable[..., Path], form: str, pages: str
) -> None:
    """A checkpoint of this model takes about 60 kB: one or two fit, and never a third; of shards, no second one."""
    folder = small_disk(pages)
    child = launch(train_arguments(form, "train.keep=9", "train.eval_interval=1000000"))
    assert child.wait() == 1
    assert "the disk is full" in child.stderr.read_text()
    assert verified_step(folder, at_least=child.announced()) >= 1
    assert temporaries(folder) == []


def test_a_file_size_limit_ends_the_run_and_leaves_no_temporary(launch: Launch, place: Path, form: str) -> None:
    import resource
    import signal

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    child = launch(train_arguments(form), before=limit)
    assert child.wait() == 1, child.stderr.read_text()
    assert "File too large" in child.stderr.read_text()
    assert "Traceback" not in child.stderr.read_text()
    assert temporaries(place / "run") == []


def test_a_read_only_disk_is_found_before_step_0(
    launch: Launch, place: Path, small_disk: Callable[..., Path], form: str
) -> None:
    folder = small_disk("size=10m")
    assert launch(train_arguments(form, *SHORT)).wait() == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    for flags in (("--resume",), ("--overwrite",)):
        child = launch(train_arguments(flags=flags))
        assert child.wait() == 2
        assert "cannot be written" in child.stderr.read_text()
        assert "step" not in child.stderr.read_text()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_removed_while_training_ends_the_run(launch: Launch, place: Path, form: str) -> None:
    child = launch(train_arguments(form))
    child.wait_for(r"saved run/last")
    (place / "run").rename(place / "gone")  # at once, where deleting file by file would race with the next save
    shutil.rmtree(place / "gone", ignore_errors=True)
    assert child.wait() == 1
    text = child.stderr.read_text()
    assert "Traceback" not in text
    assert "No such file or directory" in text


def test_two_trainers_in_one_folder_do_not_meet(launch: Launch, place: Path) -> None:
    first = launch(train_arguments())
    first.wait_for(r"saved run/last")
    for flags in ((), ("--resume",), ("--overwrite",)):
        second = launch(train_arguments(flags=flags))
        assert second.wait() == 2
        assert f"process {first.pid} on" in second.stderr.read_text()
    assert first.poll() is None
    first.kill()
    third = launch(train_arguments("train.max_iters=5000", flags=("--resume",)))  # a dead owner's lock is no lock
    third.wait_for("resuming run/last.safetensors")
