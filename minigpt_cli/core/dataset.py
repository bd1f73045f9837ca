"""train.bin -> batches. Owns the dataset folder's format and which tokens a step sees; knows nothing of models.

A batch is a pure function of (seed, step): there is no loader state, resuming is exact, and what a step sees does not
depend on how many devices share it or on when the run evaluates.
"""

from __future__ import annotations

import functools
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.files import MAX_JSON_BYTES, bounded_json

if TYPE_CHECKING:  # torch is imported where batches become tensors: `prepare` starts faster without it
    import torch
    from torch import Tensor

FORMAT_VERSION = 2  # 1 knows neither documents nor shards, and is written where there are none

RESIDENT_BYTES = (
    4 << 30
)  # at most so much of a split, at 4 bytes a token, lies on the device; and an eighth of its memory
PIECE = 1 << 24  # tokens read at a time where all are read
SCANNED = 1 << 28  # tokens that are all looked at before a run begins: half a second, from a fast disk

Split = Literal["train", "val"]
Array = np.ndarray[Any, np.dtype[Any]]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SplitMeta(_Document):
    tokens: Annotated[int, Field(ge=0, le=1 << 48)]
    characters: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]  # of the split's text in UTF-8
    documents: Annotated[int, Field(ge=0)] | None = None  # each ended by the tokenizer's end of text
    shards: list[Annotated[int, Field(ge=1)]] | None = None  # tokens in each file, where there are several


class InputMeta(_Document):
    name: str
    bytes: Annotated[int, Field(ge=0)]  # of the file as it lies on disk
    sha256: str


class DatasetMeta(_Document):
    """meta.json. `fingerprint` is the sha256 of train.bin, val.bin, the tokenizer's JSON and both token counts."""

    format_version: Annotated[int, Field(ge=1)] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer: dict[str, Any]
    train: SplitMeta
    val: SplitMeta
    inputs: list[InputMeta]
    source: str | None = None  # where a fetched corpus came from
    fingerprint: str

    def document(self) -> dict[str, Any]:
        """What meta.json holds."""
        document = self.model_dump()
        for split in (document["train"], document["val"]):
            for name in ("documents", "shards"):
                if split[name] is None:  # format 1 does not know these
                    del split[name]
        return document


def shard_name(split: str, number: int | None) -> str:
    return f"{split}.bin" if number is None else f"{split}-{number:05d}.bin"


def split_files(folder: Path, name: str, meta: SplitMeta) -> list[Path]:
    """The token files of a split, in order."""
    numbers: list[int | None] = [*range(len(meta.shards))] if meta.shards else [None]
    return [folder / shard_name(name, number) for number in numbers]


class TokenFiles:
    """Token files that follow one another, read like one array: by length, and by slices (copies across borders)."""

    def __init__(self, files: list[Array]) -> None:
        self.dtype = files[0].dtype
        self._maps = [file.base for file in files]
        self._files = [np.asarray(file) for file in files]  # slices of a memmap are memmaps, which takes time
        self._ends = list(accumulate(map(len, files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, where: slice) -> Array:
        start, stop, _ = where.indices(len(self))
        parts = [self._files[number][first:last] for number, first, last in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([self._files[0][:0], *parts])

    def expect(self, start: int, stop: int) -> None:
        """Have tokens that will be read soon fetched from the disk, if they are not in memory, and do not wait."""
        for number, first, last in self._parts(start, stop):
            mapped, size = self._maps[number], self.dtype.itemsize
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
                page = first * size // mmap.PAGESIZE * mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, page, last * size - page)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Which file, from where to where, for each that start..stop touches."""
        number = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[number] - len(self._files[number])
            yield number, start - begin, min(stop, self._ends[number]) - begin
            start, number = self._ends[number], number + 1


Tokens = Array | TokenFiles


class Dataset:
    """An opened dataset folder: `meta`, and the two splits as memory-mapped token arrays.

    Raises UserError for a folder that is missing, half-written, damaged or not a dataset.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self.train = self._map("train", self.meta.train)
        self.val = self._map("val", self.meta.val)

    def split(self, name: Split) -> Tokens:
        return self.train if name == "train" else self.val

    def _map(self, name: str, meta: SplitMeta) -> Tokens:
        paths, sizes = split_files(self.folder, name, meta), meta.shards or [meta.tokens]
        if sum(sizes) != meta.tokens:
            raise UserError(f"{self.folder / 'meta.json'}: damaged: the {name} files do not add up; prepare it again")
        files = [self._map_file(path, tokens) for path, tokens in zip(paths, sizes, strict=True)]
        return files[0] if len(files) == 1 else TokenFiles(files)

    def _map_file(self, path: Path, tokens: int) -> Array:
        dtype = np.dtype(self.meta.dtype).newbyteorder("<")
        try:
            size = path.stat().st_size
            if size != tokens * dtype.itemsize:
                raise UserError(f"{path}: {size:,} bytes, but meta.json promises {tokens:,} tokens; prepare it again")
            return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; prepare the dataset again") from None


def _read_meta(folder: Path) -> DatasetMeta:
    path = folder / "meta.json"
    try:
        if path.stat().st_size > MAX_JSON_BYTES or not path.is_file():
            raise UserError(f"{path}: too large, or no plain file: not a dataset's meta.json")
        document = bounded_json(path.read_bytes())
        version = document.get("format_version") if isinstance(document, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(f"{folder}: this dataset was made by a newer minigpt; update minigpt or prepare it again")
        return DatasetMeta.model_validate(document)
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        hint = "run `minigpt prepare FILE` first" if not folder.exists() else "it has no meta.json"
        raise UserError(f"{folder}: not a dataset folder; {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = repr(".".join(str(part) for part in first["loc"]))[1:-1][:100]
        raise UserError(f"{path}: damaged: {where}: {first['msg']}; prepare the dataset again") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged: not JSON, or too much of it; prepare the dataset again") from None


def require_window(tokens: Tokens, block_size: int) -> None:
    """Raises UserError, with the numbers, if not even one window and its last target fit the training split."""
    if len(tokens) <= block_size:
        raise UserError(
            f"the training split has {len(tokens):,} tokens, and a context of {block_size:,} needs at least "
            f"{block_size + 1:,}; use a longer text, or a smaller model.block_size"
        )


def require_known_tokens(tokens: Tokens, vocab_size: int, where: Path) -> None:
    """Raises UserError if the tokens hold an id that the vocabulary has not, before any work is done.

    Of a large split only the ends are read: whoever uses the rest looks again, when it is in memory anyway.
    """
    ends = [(0, len(tokens))] if len(tokens) <= SCANNED else [(0, PIECE), (len(tokens) - PIECE, len(tokens))]
    for start, stop in ends:
        try:
            for _ in pieces(tokens, vocab_size, start, stop):
                pass
        except MinigptError as error:
            raise UserError(f"{where}: {error}") from None


def pieces(tokens: Tokens, vocab_size: int, start: int = 0, stop: int | None = None) -> Iterator[Array]:
    """tokens[start:stop], in pieces of which no id is too large: raises MinigptError as `require_ids` does."""
    stop = len(tokens) if stop is None else stop
    for first in range(start, stop, PIECE):
        piece = tokens[first : min(first + PIECE, stop)]
        require_ids(piece, vocab_size)
        yield piece


def require_ids(ids: Array, vocab_size: int) -> None:
    """Raises MinigptError for an id outside the vocabulary: a GPU would go down with it, or learn from garbage."""
    if ids.size and (largest := int(ids.max())) >= vocab_size:
        raise MinigptError(f"token {largest} in a vocabulary of {vocab_size}: the dataset is damaged; prepare it again")


def window_offsets(
    n_tokens: int, block_size: int, *, seed: int, step: int, batch_size: int, sampling: str, shift: int = 0
) -> Array:
    """Where each sequence of a step begins: (batch_size,) int64, each in [0, n_tokens - block_size).

    `random` draws windows independently, as the seed script does. `epoch` visits every window of a grid once an epoch,
    in a new order and with the grid shifted by a new offset each time. Pure in (seed, step).

    `shift`: how many more windows than step * batch_size were seen before this step, in a run whose batch size or data
    changed. It moves the place in the epoch; `random` has none.
    """
    if sampling == "random":
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
        return generator.integers(0, n_tokens - block_size, size=batch_size)
    n_windows = windows_per_epoch(n_tokens, block_size)
    positions = np.arange(step * batch_size, (step + 1) * batch_size) + shift
    offsets = np.empty(batch_size, np.int64)
    for epoch in np.unique(positions // n_windows):
        here = positions // n_windows == epoch
        order, shift = _epoch_order(n_tokens, block_size, seed, int(epoch))
        offsets[here] = order[positions[here] % n_windows] * block_size + shift
    return offsets


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """How many non-overlapping windows fit whatever the grid's shift: the length of an epoch, in sequences."""
    return max(1, (n_tokens - block_size) // block_size)


@functools.lru_cache(maxsize=2)
def _epoch_order(n_tokens: int, block_size: int, seed: int, epoch: int) -> tuple[Array, int]:
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, epoch]))
    n_windows = windows_per_epoch(n_tokens, block_size)
    slack = n_tokens - 1 - n_windows * block_size  # the last target must exist
    return generator.permutation(n_windows), int(generator.integers(0, min(block_size, slack + 1)))


def resident_bytes(device_memory: int | None) -> int:
    """How large a split may be to lie on a device with so much memory."""
    return min(RESIDENT_BYTES, device_memory // 8) if device_memory else RESIDENT_BYTES


class Batches:
    """Batches of one split on one device: `at(step)` -> (x, y), both (rows, block_size) int64, y one token ahead of x.

    The whole split moves to the device when it fits `resident_bytes`, so that only offsets are copied each step.
    Otherwise windows are read from the memory map; of a split of `ahead_bytes` or more, which may not be in memory, a
    second thread reads those of the next step meanwhile. `rows` are those of each batch that this rank trains on;
    `shift` is that of `window_offsets`.
    MinigptError for an id that `vocab_size` has not.
    """

    def __init__(
        self, tokens: Tokens, block_size: int, batch_size: int, *,
        seed: int, sampling: str, device: torch.device, rows: slice = slice(None), vocab_size: int = 1 << 32,
        shift: int = 0, resident_bytes: int = RESIDENT_BYTES, ahead_bytes: int = 1 << 28,
    ) -> None:  # fmt: skip
        require_window(tokens, block_size)
        self.n_tokens, self.block_size, self.batch_size = len(tokens), block_size, batch_size
        self.seed, self.sampling, self.device, self.rows = seed, sampling, device, rows
        self.vocab_size, self.shift = vocab_size, shift
        self._tokens = tokens if isinstance(tokens, TokenFiles) else TokenFiles([tokens])
        self._resident: Tensor | None = None
        self._ahead: _Ahead | None = None
        if device.type != "cpu" and len(tokens) * 4 <= resident_bytes:
            import torch

            self._resident = torch.empty(len(tokens), dtype=torch.int32, device=device)
            for number, piece in enumerate(pieces(tokens, vocab_size)):
                self._resident[number * PIECE : number * PIECE + len(piece)] = torch.from_numpy(piece.astype(np.int32))
            self._span = torch.arange(block_size + 1, device=device)
        elif len(tokens) * tokens.dtype.itemsize >= ahead_bytes:
            self._ahead = _Ahead(self._read)

    def at(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The step's batch, or only some of its rows (a micro batch, or one rank's share)."""
        cuda = self.device.type == "cuda"  # elsewhere nothing promises that what is copied later is still there
        if self._resident is not None:
            import torch

            offsets_B = torch.from_numpy(self._offsets(step, rows)).to(self.device, non_blocking=cuda)
            windows = self._resident[offsets_B[:, None] + self._span].long()
        else:
            windows = (self._ahead or self._read)(step, rows).to(self.device, non_blocking=cuda)
        return windows[:, :-1], windows[:, 1:]

    def in_pieces(self, step: int, n: int) -> list[tuple[Tensor, Tensor]]:
        """Our rows of the step's batch, as `n` micro batches of equal size."""
        x_BT, y_BT = self.at(step, self.rows)
        return list(zip(x_BT.chunk(n), y_BT.chunk(n), strict=True))

    def _offsets(self, step: int, rows: slice) -> Array:
        return window_offsets(
            self.n_tokens,
            self.block_size,
            seed=self.seed,
            step=step,
            batch_size=self.batch_size,
            sampling=self.sampling,
            shift=self.shift,
        )[rows]

    def _read(self, step: int, rows: slice) -> Tensor:
        """The windows of some rows and the target after each, (rows, block_size + 1) int64, in the host's memory."""
        import torch

        offsets, width = self._offsets(step, rows).tolist(), self.block_size + 1
        if self._ahead is not None:  # all at once: ten times as fast as one after the other, where the disk is read
            for offset in offsets:
                self._tokens.expect(offset, offset + width)
        pinned = self.device.type == "cuda"  # then the copy to the device need not be waited for
        windows = torch.empty(len(offsets), width, dtype=torch.int64, pin_memory=pinned)
        windows_BT = windows.numpy()
        for row, offset in enumerate(offsets):
            windows_BT[row] = self._tokens[offset : offset + width]
        require_ids(windows_BT, self.vocab_size)
        return windows


class _Ahead:
    """`read(step, rows)`, with the same rows of the next step read meanwhile, in a thread that ends with this."""

    def __init__(self, read: Callable[[int, slice], Tensor]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(1, "reading ahead")
        self._waiting: dict[tuple[int, str], Future[Tensor]] = {}

    def __call__(self, step: int, rows: slice) -> Tensor:
        waiting = self._waiting.pop((step, str(rows)), None)
        for key in [key for key in self._waiting if key[0] not in (step, step + 1)]:
            self._waiting.pop(key).cancel()
        windows = waiting.result() if waiting else self._read(step, rows)
        self._waiting[step + 1, str(rows)] = self._pool.submit(self._read, step + 1, rows)
        return windows
