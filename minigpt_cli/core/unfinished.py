"""Token files being written, and the journal from which a killed `prepare` goes on. Knows not what tokens mean.

Beside a dataset NAME lies, until it is whole, the hidden folder .NAME.part: `dataset/`, which takes the dataset's place
in the end, and `journal.json`, which says how much of it is certain to be on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from minigpt_cli.core.background import Worker
from minigpt_cli.core.dataset import shard_name
from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.files import atomic_write, fsync_folder
from minigpt_cli.core.folders import publish

FLUSH = 32 << 20  # bytes written between two calls to set the disk to work
COMMIT_SECONDS = 20.0  # between two entries in the journal: what a killed prepare loses at most

_JOURNAL, _DATASET = "journal.json", "dataset"


class SplitWriter:
    """One split's files, of `limit` tokens each but the last, and its counts. The disk is set to work early, as it may
    take longer than all the rest. Given the `counts` of an earlier one, it goes on from there."""

    def __init__(
        self, folder: Path, split: str, limit: int, dtype: np.dtype[Any], flushing: Worker, counts: Mapping[str, int]
    ) -> None:
        self.folder, self.split, self.limit, self.itemsize = folder, split, limit, dtype.itemsize
        self.counts = {"tokens": 0, "characters": 0, "bytes": 0, "documents": 0, **counts}
        self._flushing = flushing
        self._unflushed = 0  # bytes
        self._file: BinaryIO | None = None
        self._room = 0  # tokens that the file still takes
        self._go_on()

    def write(self, ids: npt.NDArray[Any], counts: Mapping[str, int]) -> None:
        """Add `ids`, which are little-endian, and `counts` to what is counted: characters, bytes, documents."""
        written = 0
        while written < len(ids):
            if not self._room:
                self.close()
                number = self.counts["tokens"] // self.limit
                self._open(self.folder / shard_name(self.split, number), "xb", 0)
            assert self._file is not None
            some = ids[written : written + self._room]
            self._file.write(some.data)
            self._room -= len(some)
            written += len(some)
            self.counts["tokens"] += len(some)
            self._unflushed += some.nbytes
        for name, n in counts.items():
            self.counts[name] += n
        if self._unflushed >= FLUSH and not self._flushing.busy and self._file is not None:
            self._unflushed = 0
            self._flushing.start(os.fsync, self._file.fileno())

    def sync(self) -> None:
        """Everything written so far is on the disk, when this returns."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._flushing.wait()
            self.sync()
            self._file.close()
            self._file = None

    def finish(self) -> list[int] | None:
        """The tokens in each file; None where there is one, which is then called like the split."""
        self.close()
        tokens = self.counts["tokens"]
        if tokens <= self.limit:
            only = self.folder / shard_name(self.split, None)
            first = self.folder / shard_name(self.split, 0)
            first.replace(only) if tokens else only.touch()
            return None
        return [min(self.limit, tokens - start) for start in range(0, tokens, self.limit)]

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def _go_on(self) -> None:
        """Keep as many tokens as are counted, and drop what was written after them."""
        tokens = self.counts["tokens"]
        if (whole := self.folder / shard_name(self.split, None)).exists():  # killed between `finish` and the end
            whole.replace(self.folder / shard_name(self.split, 0))
        for path in list(self.folder.glob(f"{self.split}-*.bin")):
            if int(path.stem.rpartition("-")[2]) * self.limit >= tokens:
                path.unlink()
        for start in range(0, tokens, self.limit):
            path, size = self.folder / shard_name(self.split, start // self.limit), min(self.limit, tokens - start)
            if not path.is_file() or path.stat().st_size < size * self.itemsize:
                raise MinigptError(f"{path}: shorter than its journal says; delete {self.folder.parent} and start over")
            if size < self.limit:
                self._open(path, "r+b", size)

    def _open(self, path: Path, mode: Literal["xb", "r+b"], tokens: int) -> None:
        self._file = file = open(path, mode)  # noqa: SIM115 # open until it is full
        file.truncate(tokens * self.itemsize)
        file.seek(0, os.SEEK_END)
        self._room = self.limit - tokens


class Unfinished:
    """A dataset that is being made in .NAME.part. `key` is all that it depends on: with another, nothing is taken over.

    `done` units of work were done before, `counts` of each split tell what came of them; `tokenizer` is the tokenizer's
    JSON once it is known.
    """

    def __init__(self, out: Path, key: Mapping[str, Any]) -> None:
        self.out, self.key = out, json.loads(json.dumps(key))
        self.part = out.with_name(f".{out.name}.part")
        self.folder = self.part / _DATASET
        self.done, self.tokenizer = 0, None  # type: tuple[int, dict[str, Any] | None]
        self.counts: dict[str, dict[str, int]] = {"train": {}, "val": {}}
        self._recorded_at = time.monotonic()
        journal = self._journal()
        self.recorded = journal is not None
        if journal is None:
            shutil.rmtree(self.part, ignore_errors=True)
            self.folder.mkdir(parents=True)
        else:
            self.done, self.tokenizer, self.counts = journal["done"], journal["tokenizer"], journal["counts"]
            (self.folder / "meta.json").unlink(missing_ok=True)

    @property
    def tokens(self) -> int:
        return sum(counts.get("tokens", 0) for counts in self.counts.values())

    @property
    def due(self) -> bool:
        return time.monotonic() - self._recorded_at >= COMMIT_SECONDS

    def record(self, done: int, writers: Mapping[str, SplitWriter]) -> None:
        """Make sure that the work up to unit `done` need not be done again."""
        for writer in writers.values():
            writer.sync()
        fsync_folder(self.folder)
        counts = {split: writer.counts for split, writer in writers.items()}
        entry = {"key": self.key, "tokenizer": self.tokenizer, "done": done, "counts": counts}
        with atomic_write(self.part / _JOURNAL) as file:
            file.write(json.dumps(entry).encode("ascii"))
        self.recorded = True
        self._recorded_at = time.monotonic()

    def publish(self) -> None:
        publish(self.folder, self.out)
        shutil.rmtree(self.part, ignore_errors=True)

    def _journal(self) -> dict[str, Any] | None:
        try:
            journal = json.loads((self.part / _JOURNAL).read_bytes())
            return journal if journal["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@contextmanager
def unfinished(out: Path, key: Mapping[str, Any], kept: Callable[[Path], object]) -> Iterator[Unfinished]:
    """What was begun for `out` and `key`, or a beginning. What ends badly goes, or stays if the journal has some of it:
    then `kept` is told where."""
    work = Unfinished(out, key)
    try:
        yield work
    except BaseException:
        if work.recorded:
            kept(work.part)
        else:
            shutil.rmtree(work.part, ignore_errors=True)
        raise
