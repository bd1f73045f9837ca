"""AdamW, one parameter at a time, from its paper (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class NaiveAdamW:
    """The same rate and the same decay for every parameter, as the seed's scripts run it (decay 0.01 on all).

    At step t, with g the gradient: w <- w - lr decay w (decoupled: never part of g); m <- b1 m + (1 - b1) g;
    v <- b2 v + (1 - b2) g^2; then w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, *,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.01,
    ) -> None:  # fmt: skip
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps, self.decay, self.t = lr, betas, eps, decay, 0
        self.mean = [torch.zeros_like(w) for w in self.parameters]
        self.square = [torch.zeros_like(w) for w in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter once, and forget the gradients."""
        self.t += 1
        b1, b2 = self.betas
        for w, m, v in zip(self.parameters, self.mean, self.square, strict=True):
            g = w.grad if w.grad is not None else torch.zeros_like(w)
            m.copy_(b1 * m + (1 - b1) * g)
            v.copy_(b2 * v + (1 - b2) * g * g)
            corrected = math.sqrt(1 - b2**self.t)
            w -= self.lr * self.decay * w
            w -= self.lr * (m / (1 - b1**self.t)) / (torch.sqrt(v) / corrected + self.eps)
            w.grad = None
