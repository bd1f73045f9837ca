"""All inputs joined into one text that is read piece by piece, as often as needed. Owns where the text may be cut.

It knows nothing of how files hold text, and of tokenizers only where they may be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from minigpt_cli.core.bpe import last_border
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.textfiles import TextFile

CHUNK = 1 << 20  # characters tokenized at a time
MAX_UNCUT = 8 << 20  # characters after which a text without a place to cut it is cut all the same

Progress = Callable[[str, int, int], None]  # stage, bytes of input done, bytes of input in all


def advancing(progress: Progress, stage: str, files: Sequence[TextFile]) -> Callable[[int], None]:
    """What is told of each n bytes of `files` that were read, and tells `progress` of them all."""
    total, done = sum(f.size for f in files), 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        progress(stage, done, total)

    return advance


class Piece(NamedTuple):
    """A piece of the text, and the split to which it belongs: train or val."""

    split: str
    text: str


class TextStream:
    """The joined text of `files`, read and checked once; its last `val_fraction` is for validation."""

    def __init__(self, files: Sequence[TextFile], val_fraction: float, progress: Progress) -> None:
        self.files, self.progress = files, progress
        characters, self._code_points = distinct_characters(self.texts("reading"))
        self.n_train = train_characters(characters, val_fraction)

    def code_points(self) -> set[int]:
        return self._code_points

    def texts(self, stage: str) -> Iterator[str]:
        """The whole text, in pieces of at most CHUNK characters."""
        advance = advancing(self.progress, stage, self.files)
        for file in self.files:
            for text in file.texts(advance):
                yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK)) if len(text) > CHUNK else (text,)

    def train_texts(self) -> tuple[Iterator[str], int]:
        """The whole training split."""
        texts = takewhile(itemgetter(0), _split(self.texts("sampling"), self.n_train))
        return recut((text for _, text in texts), last_border), 1

    def units(self, last_cut: Callable[[str], int]) -> Iterator[Piece]:
        """The whole text, cut where `last_cut` finds that it does no harm."""
        for is_train, group in groupby(_split(self.texts("tokenizing"), self.n_train), key=itemgetter(0)):
            for text in recut((text for _, text in group), last_cut):
                yield Piece("train" if is_train else "val", text)


def train_characters(characters: int, val_fraction: float) -> int:
    """How many characters are to train on. UserError where either part would be too short."""
    if not characters:
        raise UserError("the input is empty: there is no text to learn from")
    n_train = int((1 - val_fraction) * characters)
    if min(n_train, characters - n_train) < 2:
        raise UserError(
            f"the text is too short: {characters} character{'s' * (characters > 1)}, {n_train} of them to train on and "
            f"{characters - n_train} to validate on; each part needs at least 2. Use a longer text"
        )
    return n_train


def distinct_characters(texts: Iterable[str]) -> tuple[int, set[int]]:
    """How many characters there are, and the code points among them."""
    count = 0
    seen = np.zeros(0x110000, dtype=bool)
    seen_ascii = b""
    for text in texts:
        count += len(text)
        if text.isascii():
            if new := text.encode("ascii").translate(None, delete=seen_ascii):
                seen_ascii += bytes(set(new))
        else:
            codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            if not np.take(seen, codes, mode="clip").all():  # looking is twice as fast as noting
                seen[codes] = True
    return count, {int(c) for c in np.flatnonzero(seen)} | set(seen_ascii)


def _split(texts: Iterable[str], n_train: int) -> Iterator[tuple[bool, str]]:
    """Pieces of text, each with whether it lies in the training split (the first `n_train` characters)."""
    left = n_train
    for text in texts:
        if left and text[:left]:
            yield True, text[:left]
        if text[left:]:
            yield False, text[left:]
        left -= min(left, len(text))


def recut(texts: Iterable[str], last_cut: Callable[[str], int]) -> Iterator[str]:
    """The same text, cut where `last_cut` finds that it does no harm."""
    waiting = ""
    for text in texts:
        waiting += text
        cut = len(waiting) if len(waiting) > MAX_UNCUT else last_cut(waiting)
        if cut:
            yield waiting[:cut]
            waiting = waiting[cut:]
    if waiting:
        yield waiting
