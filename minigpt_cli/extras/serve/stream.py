"""One text on its way: what was asked for, what of it is certain, and what the model has not seen yet.

Shapes: T places, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt_cli.core.detokenize import Detokenizer
from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.generate import Sampling
from minigpt_cli.core.layers import KVCache
from minigpt_cli.core.model import GPT

Wake = Callable[[], None]
Likely = list[tuple[int, float]]  # ids and their log probabilities, the likeliest first


@dataclass(frozen=True)
class Order:
    """One text to write. With a `seed` it is computed by itself, so that its company cannot change a rounding."""

    ids: list[int]  # the prompt, at least one
    max_tokens: int
    sampling: Sampling
    stops: Sequence[str] = ()
    seed: int | None = None
    logprobs: int | None = None  # how many of the likeliest to tell of at each place
    score_prompt: bool = False  # log probabilities of the prompt's own tokens too
    partial: bool = False  # wake for every token, not only at the end
    end_of_text: int | None = None  # the token with which a document ends, and this text


@dataclass(frozen=True)
class Scored:
    """A token, how likely the model found it (before temperature and cuts), and where it begins in the text."""

    token: int
    logprob: float
    likeliest: Likely
    offset: int  # characters


@dataclass(frozen=True)
class Piece:
    """What is new of a text. `finish` is "stop" or "length" when it is done."""

    text: str
    tokens: list[Scored]
    finish: str | None


class Stream:
    """A text being written. The worker appends to `pieces`; who reads takes them from the left."""

    def __init__(self, order: Order, pieces: Sequence[bytes], window: int, wake: Wake) -> None:
        self.order, self.wake = order, wake
        self.pieces: deque[Piece] = deque()
        self.prompt_scores: list[tuple[float, Likely]] = []  # of the prompt's last tokens, as many as there are
        self.written, self.done, self.cancelled = 0, False, False
        self.error: MinigptError | None = None
        self.cache: KVCache | None = None
        self.generator: torch.Generator | None = None
        self.pending = order.ids[-window:]  # tokens that the model has not seen yet
        self._context = deque(self.pending, maxlen=window)
        self._text, self._held, self._released = Detokenizer(pieces, order.stops, order.end_of_text), deque[Scored](), 0

    def make_room(self, model: GPT) -> KVCache:
        """The cache. If it is full and cannot slide, only the newest half of the window is kept, to be read again."""
        assert self.cache is not None
        window = model.config.block_size
        if self.cache.length + len(self.pending) > window and not model.slides:
            self.cache.clear()
            self.pending = list(self._context)[-max(1, window // 2) :]
        return self.cache

    def score_prompt(self, logits_TV: Tensor) -> None:
        """Note how likely `pending` was, from its second token on: `logits_TV` predict it."""
        if self.order.score_prompt and not self.written and len(logits_TV):
            targets = torch.tensor(self.pending[1:], device=logits_TV.device)
            log_probs_TV = logits_TV.float().log_softmax(dim=-1)
            scores = log_probs_TV.gather(1, targets[:, None])[:, 0].tolist()
            self.prompt_scores = list(zip(scores, _likeliest(log_probs_TV, self.order.logprobs or 0), strict=True))

    def write(self, token: int, logits_V: Tensor) -> None:
        """One token more. At the end `done` is set."""
        if not self.order.max_tokens:  # the prompt's scores were all that was wanted
            self.pieces.append(Piece("", [], "length"))
            self.done = True
            return
        offset = self._text.seen
        self._text.add(token)
        self._context.append(token)
        self.pending, self.written = [token], self.written + 1
        if self.order.logprobs is not None:
            log_probs_V = logits_V.log_softmax(dim=-1)
            (likeliest,) = _likeliest(log_probs_V[None], self.order.logprobs)
            self._held.append(Scored(token, float(log_probs_V[token]), likeliest, offset))
        finish = "stop" if self._text.ended else "length" if self.written == self.order.max_tokens else None
        text = self._text.finish() if finish else self._text.take()
        self._released += len(text)
        certain = [s for s in self._held if s.offset < self._released or finish == "length"]
        for _ in certain:
            self._held.popleft()
        if text or certain or finish:
            self.pieces.append(Piece(text, certain, finish))
        self.done = finish is not None

    def end(self, error: MinigptError | None = None) -> None:
        self.error, self.done = error, True


def _likeliest(log_probs_TV: Tensor, n: int) -> list[Likely]:
    values, ids = log_probs_TV.topk(min(n, log_probs_TV.shape[-1]), dim=-1)
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
