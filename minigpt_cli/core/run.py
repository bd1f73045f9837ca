"""The run folder: what lies in it, who may write to it, which checkpoint to go on from, how new ones are written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from minigpt_cli.core import checkpoint, shards
from minigpt_cli.core.checkpoint import SHARDED, Checkpoint
from minigpt_cli.core.config import Config, config_difference
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.errors import CheckpointError, UserError
from minigpt_cli.core.files import TEMPORARY


class RunFolder:
    """The files of one run. Made by `open_run`, which holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "last.safetensors"
        self.best = path / "best.safetensors"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.picture = path / "loss.png"
        self.launch = path / ".launch"  # by which start of torchrun the run was begun
        self.logs = path / "logs"  # a folder, of those who show the run elsewhere
        self._old, self._returning = path / ".old", path / ".returning"

    def snapshot(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.safetensors"

    def snapshots(self) -> list[Path]:
        """Numbered snapshots, oldest first."""
        return sorted(self.path.glob("step-*.safetensors"))

    def sharded(self, kind: str, step: int) -> Path:
        """Where a checkpoint of `kind` (last or best) goes as a folder of shards."""
        return self.path / f"{kind}-{step:08d}{SHARDED}"

    def shards(self, kind: str = "*") -> list[Path]:
        """Sharded checkpoints, oldest first."""
        return sorted(self.path.glob(f"{kind}-????????{SHARDED}"))

    def holds_run(self) -> bool:
        """Whether there is a run that a new one must not replace unasked."""
        return any(p.exists() for p in self._checkpoints()) or (self.metrics.exists() and not self.holds_failure())

    def holds_failure(self) -> bool:
        """Whether a run began here that has no `last` yet: what `set_aside` left is the mark of it."""
        return self._old.is_dir() and not self.has_last()

    def newest_of(self, kind: str) -> Path | None:
        """The checkpoint of `kind` (last or best): a folder of shards or a file."""
        there = [path for path in (*self.shards(kind)[::-1], self.path / f"{kind}.safetensors") if path.exists()]
        return there[0] if there else None

    def has_last(self) -> bool:
        return self.newest_of("last") is not None

    def _checkpoints(self) -> list[Path]:
        return [self.last, self.best, *self.snapshots(), *self.shards()]

    def _files(self) -> list[Path]:
        return [self.config, self.metrics, self.picture, self.launch, self.logs, *self._checkpoints()]

    def drop(self, kind: str, keep: Path) -> None:
        """Remove what `keep` replaces: the other files and folders of its kind."""
        for path in (self.path / f"{kind}.safetensors", *self.shards(kind)):
            if path != keep:
                remove(path)

    def set_aside(self) -> None:
        """Make room for a new run: the files of the old one, and nothing else, wait in `.old` until it has a `last`.

        They gather in `.returning`, which is renamed when it has them all: killed before, they simply go back. What a
        run left that failed before its first checkpoint is removed.
        """
        if self.holds_failure():
            for path in self._files():
                remove(path)
            return
        self._returning.mkdir(exist_ok=True)
        self.launch.unlink(missing_ok=True)
        for path in self._files():
            if path.exists():
                path.replace(self._returning / path.name)
        self._returning.rename(self._old)

    def drop_old(self) -> None:
        """While a run is going: remove what `set_aside` kept, if the run has a `last` by now. Removes nothing else."""
        if self.has_last():
            remove(self._old)

    def settle(self) -> None:
        """When a run is opened, or has ended: if it never had a `last`, the run that it was to replace comes back.

        Where there is none to come back, the files of the failed run stay. Killed at any point, the next call goes on
        from there.
        """
        if self._old.is_dir() and not self._returning.is_dir():
            if self.has_last():
                remove(self._old)
            elif RunFolder(self._old).holds_run():
                for path in self._files():
                    remove(path)
                self._old.rename(self._returning)
        if self._returning.is_dir():
            for path in self._returning.iterdir():
                path.replace(self.path / path.name)
            self._returning.rmdir()

    def newest(self) -> tuple[Checkpoint, list[str]]:
        """The newest checkpoint that verifies, and what to tell about those that did not.

        `last` and the snapshots hold everything; `best` holds weights only and is the last resort. Raises UserError
        if there is none, CheckpointError if none verifies.
        """
        complete = [*reversed(self.shards("last")), self.last, *reversed(self.snapshots())]
        complete = sorted((path for path in complete if path.exists()), key=_step_of, reverse=True)
        weights_only = [path for path in (*reversed(self.shards("best")), self.best) if path.exists()]
        candidates = [*complete, *weights_only]
        if not candidates:
            raise UserError(f"{self.path}: no checkpoint to resume from; run without --resume to start")
        problems = []
        for path in candidates:
            try:
                found = shards.open_sharded(path) if path.suffix == SHARDED else checkpoint.load(path)
            except (CheckpointError, UserError) as error:
                problems.append(str(error))
                continue
            if problems:
                problems.append(f"going on from {path.name}, step {found.header.step}")
            if path in weights_only:
                problems.append("it has no optimizer state: the next steps will not be exactly those of the lost run")
            return found, problems
        raise CheckpointError("; ".join(problems))


def _step_of(path: Path) -> float:
    """The step of a checkpoint, as its header tells; damaged ones come first, so that they are not passed over."""
    try:
        return shards.read_header(path).step if path.suffix == SHARDED else checkpoint.read_header(path).step
    except (CheckpointError, UserError):
        return math.inf


def checkpoint_in(path: Path) -> Path:
    """Of a run folder its best checkpoint, or where there is none its last; any other path as it is."""
    if os.path.isdir(path) and path.suffix != SHARDED:
        folder = RunFolder(path)
        return folder.newest_of("best") or folder.newest_of("last") or path
    return path


def remove(path: Path) -> None:
    """A file, or a folder and all that is in it, if it is there. A checkpoint is there whole, or not by its name."""
    if path.is_dir():
        if path.suffix == SHARDED and not path.name.startswith(TEMPORARY):
            path = path.rename(path.with_name(f"{TEMPORARY}old-{path.name}"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class BackgroundSaver:
    """Writes checkpoints in one thread, one save in flight; what goes wrong there is raised at the next step here."""

    def __init__(self, announce: Callable[[Path, int], None]) -> None:
        self._announce = announce
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[tuple[Future[None], Path, int]] = []

    def submit(self, files: Sequence[tuple[Path, dict[str, Tensor]]], header: dict[str, Any]) -> None:
        """Write (path, tensors) each with the same header. The caller gives the tensors away: they must be copies."""
        self.wait()
        for path, tensors in files:
            self._pending.append((self._executor.submit(checkpoint.save, path, tensors, header), path, header["step"]))

    def poll(self) -> None:
        """Announce what has been written; raise what has failed. Does not wait."""
        while self._pending and self._pending[0][0].done():
            future, path, step = self._pending.pop(0)
            future.result()
            self._announce(path, step)

    def wait(self) -> None:
        for future, _, _ in self._pending:
            future.exception()  # waits; `poll` raises
        self.poll()

    def close(self) -> None:
        self._executor.shutdown(wait=True)


@contextlib.contextmanager
def open_run(path: Path) -> Iterator[RunFolder]:
    """Make the folder if need be, take its lock, prove that it can be written, sweep up after killed processes.

    Raises UserError if another process trains here or the folder cannot be written. The lock is the system's: it goes
    when its holder does, however it dies.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(f"{path}: {_owner(path)} is training here; wait for it, or use another --out") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    try:
        folder = RunFolder(path)
        for stale in (*path.glob(f"{TEMPORARY}*.*"), *path.glob(f"*{SHARDED}/{TEMPORARY}*")):
            if stale.is_file() or stale.suffix == SHARDED:
                remove(stale)
        folder.settle()  # the run that was to replace another was killed
        owner = path / ".owner.json"
        owner.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}))
        try:
            yield folder
        finally:
            with contextlib.suppress(FileNotFoundError):
                folder.settle()
    finally:
        with contextlib.suppress(OSError):
            (path / ".owner.json").unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str:
    try:
        owner = json.loads((path / ".owner.json").read_text())
        return f"process {int(owner['pid'])} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def check_resumable(
    saved: Checkpoint, config: Config, dataset: Dataset, *, allow_data_change: bool
) -> dict[str, tuple[Any, Any]]:
    """What the new settings change, as dotted key -> (old, new). Raises UserError if the run cannot go on with them."""
    changed = config_difference(saved.config, config)
    fixed = {key: values for key, values in changed.items() if key.startswith("model.") and "dropout" not in key}
    fixed |= {key: values for key, values in changed.items() if key == "train.optimizer"}
    if fixed:
        shown = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in fixed.items())
        raise UserError(f"cannot resume {saved.path} as another model ({shown}); start a new run with --out")
    if saved.header.dataset_fingerprint != dataset.meta.fingerprint and not allow_data_change:
        raise UserError(
            f"{dataset.folder} is not the data that {saved.path} was trained on; "
            "use the old data, or go on with this with --allow-data-change"
        )
    if saved.header.tokenizer != dataset.meta.tokenizer:
        raise UserError(
            f"{dataset.folder} was prepared with another tokenizer than {saved.path} knows; prepare the text with the "
            "same one, or start a new run with --out"
        )
    return changed
