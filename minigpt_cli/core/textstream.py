"""All inputs joined into one text that is read piece by piece, as often as needed. Owns where the text may be cut.

It knows nothing of how files hold text, and of tokenizers only where they may be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np

from minigpt_cli.core.textfiles import TextFile

CHUNK = 1 << 20  # characters tokenized at a time
MAX_UNCUT = 8 << 20  # characters after which a text without a place to cut it is cut all the same

Progress = Callable[[str, int, int], None]  # stage, bytes of input done, bytes of input in all


@dataclass
class TextStream:
    """The joined text of `files`. `text_field` is the one that holds the text in .jsonl files."""

    files: list[TextFile]
    text_field: str
    progress: Progress
    chars: set[int] = field(default_factory=set)  # code points seen by `scan`

    def texts(self, stage: str) -> Iterator[str]:
        """The whole text, in pieces of at most CHUNK characters."""
        total, done = sum(f.size for f in self.files), 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self.progress(stage, done, total)

        for file in self.files:
            for text in file.texts(self.text_field, advance):
                yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK)) if len(text) > CHUNK else (text,)

    def scan(self) -> int:
        """Read and check everything once; the number of characters. Leaves the distinct ones in `chars`."""
        count = 0
        seen = np.zeros(0x110000, dtype=bool)
        seen_ascii = b""
        for text in self.texts("reading"):
            count += len(text)
            if text.isascii():
                if new := text.encode("ascii").translate(None, delete=seen_ascii):
                    seen_ascii += bytes(set(new))
            else:
                codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
                if not np.take(seen, codes, mode="clip").all():  # looking is twice as fast as noting
                    seen[codes] = True
        self.chars = {int(c) for c in np.flatnonzero(seen)} | set(seen_ascii)
        return count

    def train_texts(self, stage: str, n_train: int) -> Iterator[str]:
        """The training split only."""
        for is_train, text in _split(self.texts(stage), n_train):
            if not is_train:
                return
            yield text

    def both_splits(self, stage: str, n_train: int, last_cut: Callable[[str], int]) -> Iterator[tuple[bool, str]]:
        """The whole text, cut where `last_cut` finds that it does no harm; each piece with: is it to train on."""
        for is_train, group in groupby(_split(self.texts(stage), n_train), key=itemgetter(0)):
            for text in recut((text for _, text in group), last_cut):
                yield is_train, text


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
