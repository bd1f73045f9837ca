"""Token by token to text: whole characters only, and nothing of a stop text. Knows bytes, not tokenizers or models."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Tokens in, whole UTF-8 text out; holds back what may yet turn out to be the beginning of a stop text.

    `pieces` are the bytes of each id. The text ends before a stop text, or with the token `end`. `seen` counts
    the characters of all tokens so far, held back or not.
    """

    def __init__(self, pieces: Sequence[bytes], stops: Sequence[str] = (), end: int | None = None) -> None:
        self._pieces, self._stops, self._end = pieces, stops, end
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self.seen, self.ended = "", 0, False

    def add(self, token: int) -> None:
        if not self.ended:
            self._grow(self._decoder.decode(self._pieces[token], final=token == self._end))
            self.ended = self.ended or token == self._end

    def take(self) -> str:
        """The text that is certain by now, once."""
        certain = len(self._held)
        if not self.ended:
            certain -= max((_overlap(self._held, stop) for stop in self._stops), default=0)
            if self._held[certain - 1 : certain] == "\r":  # half of a Windows line end, perhaps
                certain -= 1
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> str:
        """What was still held back, and a replacement character for half a letter."""
        if not self.ended:
            self._grow(self._decoder.decode(b"", final=True))
        text, self._held, self.ended = self._held, "", True
        return text

    def _grow(self, piece: str) -> None:
        self._held += piece
        self.seen += len(piece)
        found = [self._held.index(stop) for stop in self._stops if stop in self._held]
        if found:
            self._held, self.ended = self._held[: min(found)], True


def _overlap(text: str, stop: str) -> int:
    """How long an end of `text` is the beginning of `stop`, which must wait."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
