"""What each attention head does: measured patterns, on a common scale, and the role that fits best. Knows no HTML.

Every pattern is a share of attention: how much weight a head puts where the pattern says. It is scaled so that 0 is
what a head that looks everywhere alike would put there, and 1 is all its weight.

Shapes: T tokens, H heads of a layer, N repeats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt_cli.core.model import GPT
from minigpt_cli.extras.inspect.capture import capture

PATTERNS = ("previous token", "same token", "induction", "start of text")
ROLE_AT = 0.25  # a pattern below this much of a head's weight (beyond chance) is no role
SPREAD_AT = 0.75  # and a head whose entropy is above this share of the largest there is spreads
MOSTLY_AT = 0.3  # of the others, one that puts so much of its weight at one distance is described by it
REPEATS = 4  # random sequences that induction is measured on
MAX_PERIOD = 64  # tokens of each, before they come a second time
NEAR = 8  # distances among which a head's favourite is sought
MAX_WINDOW = 256  # tokens of a text that patterns are measured on


@dataclass(frozen=True)
class Head:
    """`scores` by pattern, None where the text or the context is too short to tell; `spread` is the mean entropy of
    the head's weights over the largest possible (None for a text of one token). `distance` is the one, of the
    NEAR nearest, at which most weight lies (0: the token itself), and `at_distance` how much of it."""

    role: str  # one of PATTERNS, "spread", or "other"
    label: str  # the same for people; says more of the others
    scores: dict[str, float | None]
    spread: float | None
    distance: int
    at_distance: float


@torch.no_grad()
def measure_heads(model: GPT, texts: list[Tensor]) -> list[list[Head]]:
    """Roles by layer and head, from the model's attention on `texts` (ids (T,)) and on random repeated sequences."""
    H = model.config.n_head
    pattern_sums = [_Means(H) for _ in model.blocks]
    for ids_T in texts:
        ids_T = ids_T[:MAX_WINDOW].to(model.token_embedding.weight.device)
        for means, attention in zip(pattern_sums, capture(model, ids_T).attention, strict=True):
            for name, (share_H, n) in pattern_scores(attention.weights(), ids_T).items():
                means.add(name, share_H, n)
    for ids_T in repeated_sequences(model):
        for means, attention in zip(pattern_sums, capture(model, ids_T).attention, strict=True):
            means.add("induction", *induction_score(attention.weights(), len(ids_T) // 2))
    return [[_head(means, head) for head in range(H)] for means in pattern_sums]


def pattern_scores(weights_HTT: Tensor, ids_T: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Pattern -> (mean score of each head (H,), over how many positions), for the patterns that any text can show.

    previous token: the weight on t - 1. start of text: the weight on position 0. Both where t >= 2, so that neither is
    the other. same token: the weight on earlier places of the same token, where there are some. spread: the entropy.
    """
    T = len(ids_T)
    t = torch.arange(T, device=ids_T.device)
    earlier_TT = (ids_T[:, None] == ids_T[None, :]) & (t[:, None] > t[None, :])
    equal_T = earlier_TT.sum(dim=1)
    found = {}
    if T > 2:
        found["previous token"] = _beyond_chance(weights_HTT[:, t[2:], t[1:-1]], 1 / (t[2:] + 1.0))
        found["start of text"] = _beyond_chance(weights_HTT[:, 2:, 0], 1 / (t[2:] + 1.0))
    if bool((equal_T > 0).any()):
        share_HT = (weights_HTT * earlier_TT).sum(dim=2)
        found["same token"] = _beyond_chance(share_HT[:, equal_T > 0], (equal_T / (t + 1.0))[equal_T > 0])
    for d in range(min(T, NEAR)):  # plain shares of the weight: these are no roles
        found[f"distance {d}"] = weights_HTT.diagonal(-d, 1, 2).mean(dim=1), T - d
    if T > 1:
        entropy_HT = -torch.special.xlogy(weights_HTT, weights_HTT).sum(dim=2)[:, 1:]
        found["spread"] = (entropy_HT / torch.log(t[1:] + 1.0)).mean(dim=1), T - 1
    return found


def induction_score(weights_HTT: Tensor, period: int) -> tuple[Tensor, int]:
    """In a sequence that comes twice: the weight on the token after the one now read, as it stood the first time.

    That token is what comes next, so a head that looks there can copy it (Olsson et al. 2022, arXiv:2209.11895).
    """
    t = torch.arange(period, 2 * period, device=weights_HTT.device)
    return _beyond_chance(weights_HTT[:, t, t - period + 1], 1 / (t + 1.0))


def repeated_sequences(model: GPT) -> list[Tensor]:
    """Random tokens, each at most once, and then the same again: ids (2 x period,). None where no such text fits."""
    period = min(model.config.block_size // 2, model.vocab_size, MAX_PERIOD)
    if period < 2:
        return []
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randperm(model.vocab_size, generator=generator)[:period] for _ in range(REPEATS)]
    return [half.repeat(2).to(model.token_embedding.weight.device) for half in halves]


def _beyond_chance(share_HN: Tensor, chance_N: Tensor) -> tuple[Tensor, int]:
    """Mean over positions of (share - chance) / (1 - chance), where chance is what uniform attention would give."""
    return ((share_HN - chance_N) / (1 - chance_N)).mean(dim=1), share_HN.shape[1]


class _Means:
    """Means over several texts, weighted by how many positions each had."""

    def __init__(self, n_head: int) -> None:
        self._n_head = n_head
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, mean_H: Tensor, n: int) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros(self._n_head)) + mean_H.cpu() * n
        self._counts[name] = self._counts.get(name, 0) + n

    def of(self, name: str, head: int) -> float | None:
        return float(self._sums[name][head] / self._counts[name]) if name in self._sums else None


def _head(means: _Means, head: int) -> Head:
    scores = {name: means.of(name, head) for name in PATTERNS}
    spread = means.of("spread", head)
    shares = [means.of(f"distance {d}", head) or 0.0 for d in range(NEAR)]
    nearest = max(range(NEAR), key=shares.__getitem__), max(shares)
    best = max(PATTERNS, key=lambda name: -math.inf if (score := scores[name]) is None else score)
    role, label = "other", "mixed"
    if (scores[best] or 0.0) >= ROLE_AT:
        role = label = best
    elif spread is None or spread >= SPREAD_AT:
        role = label = "spread"
    elif nearest[1] >= MOSTLY_AT:
        label = f"mostly {nearest[0]} back" if nearest[0] else "mostly itself"
    return Head(role, label, scores, spread, *nearest)
