"""train.bin -> batches. Owns the dataset folder's format and which tokens a step sees; knows nothing of models.

A batch is a pure function of (seed, step): there is no loader state, resuming is exact, and what a step sees does not
depend on how many devices share it or on when the run evaluates.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import MAX_JSON_BYTES, bounded_json

if TYPE_CHECKING:  # torch is imported where batches become tensors: `prepare` starts faster without it
    import torch
    from torch import Tensor

FORMAT_VERSION = 1

Split = Literal["train", "val"]
Tokens = np.ndarray[Any, np.dtype[Any]]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SplitMeta(_Document):
    tokens: Annotated[int, Field(ge=0, le=1 << 48)]
    characters: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]  # of the split's text in UTF-8


class InputMeta(_Document):
    name: str
    bytes: Annotated[int, Field(ge=0)]  # of the file as it lies on disk
    sha256: str


class DatasetMeta(_Document):
    """meta.json. `fingerprint` is the sha256 of train.bin, val.bin, the tokenizer's JSON and both token counts."""

    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    dtype: Literal["uint16", "uint32"]
    tokenizer: dict[str, Any]
    train: SplitMeta
    val: SplitMeta
    inputs: list[InputMeta]
    source: str | None = None  # where a fetched corpus came from
    fingerprint: str


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
        path, dtype = self.folder / f"{name}.bin", np.dtype(self.meta.dtype).newbyteorder("<")
        try:
            size = path.stat().st_size
            if size != meta.tokens * dtype.itemsize:
                raise UserError(
                    f"{path}: {size:,} bytes, but meta.json promises {meta.tokens:,} tokens; prepare it again"
                )
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
    """Raises UserError if the tokens hold an id that the vocabulary has not. Reads them once, in pieces."""
    for start in range(0, len(tokens), 1 << 24):
        if (largest := int(tokens[start : start + (1 << 24)].max())) >= vocab_size:
            raise UserError(f"{where}: damaged: token {largest} in a vocabulary of {vocab_size}; prepare it again")


def window_offsets(n_tokens: int, block_size: int, *, seed: int, step: int, batch_size: int, sampling: str) -> Tokens:
    """Where each sequence of a step begins: (batch_size,) int64, each in [0, n_tokens - block_size).

    `random` draws windows independently, as the seed script does. `epoch` visits every window of a grid once an epoch,
    in a new order and with the grid shifted by a new offset each time. Pure in (seed, step).
    """
    if sampling == "random":
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
        return generator.integers(0, n_tokens - block_size, size=batch_size)
    n_windows = windows_per_epoch(n_tokens, block_size)
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
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
def _epoch_order(n_tokens: int, block_size: int, seed: int, epoch: int) -> tuple[Tokens, int]:
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, epoch]))
    n_windows = windows_per_epoch(n_tokens, block_size)
    slack = n_tokens - 1 - n_windows * block_size  # the last target must exist
    return generator.permutation(n_windows), int(generator.integers(0, min(block_size, slack + 1)))


class Batches:
    """Batches of one split on one device: `at(step)` -> (x, y), both (rows, block_size) int64, y one token ahead of x.

    The whole split moves to the device when it fits `resident_bytes`, so that only offsets are copied each step;
    otherwise windows are read from the memory map. `rows` are those of each batch that this rank trains on.
    """

    def __init__(
        self, tokens: Tokens, block_size: int, batch_size: int, *,
        seed: int, sampling: str, device: torch.device, rows: slice = slice(None), resident_bytes: int = 4 << 30,
    ) -> None:  # fmt: skip
        require_window(tokens, block_size)
        self.n_tokens, self.block_size, self.batch_size = len(tokens), block_size, batch_size
        self.seed, self.sampling, self.device, self.rows = seed, sampling, device, rows
        self._mapped = tokens
        self._resident: Tensor | None = None
        if device.type != "cpu" and len(tokens) * 4 <= resident_bytes:
            import torch

            self._resident = torch.from_numpy(tokens.astype(np.int32)).to(device)
            self._span = torch.arange(block_size + 1, device=device)

    def at(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The step's batch, or only some of its rows (a micro batch, or one rank's share)."""
        import torch

        offsets = window_offsets(
            self.n_tokens,
            self.block_size,
            seed=self.seed,
            step=step,
            batch_size=self.batch_size,
            sampling=self.sampling,
        )[rows]
        if self._resident is not None:
            offsets_B = torch.from_numpy(offsets).to(self.device, non_blocking=True)
            windows = self._resident[offsets_B[:, None] + self._span].long()
        else:
            windows_BT = self._mapped[offsets[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
            windows = torch.from_numpy(windows_BT).to(self.device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]

    def in_pieces(self, step: int, n: int) -> list[tuple[Tensor, Tensor]]:
        """Our rows of the step's batch, as `n` micro batches of equal size."""
        x_BT, y_BT = self.at(step, self.rows)
        return list(zip(x_BT.chunk(n), y_BT.chunk(n), strict=True))
