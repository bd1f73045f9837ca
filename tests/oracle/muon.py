"""Muon, one matrix at a time, from its author's description (Jordan et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class NaiveMuon:
    """With g the gradient of a matrix: m <- 0.95 m + 0.05 g; d = 0.05 g + 0.95 m; o = newton_schulz(d), for each of
    the projections that are packed in the matrix on its own; w <- w - lr decay w - lr sqrt(max(1, rows / columns)) o.
    """

    def __init__(self, matrices: list[Tensor], packed: list[tuple[int, ...]], lr: float, decay: float) -> None:
        self.matrices, self.packed, self.lr, self.decay = matrices, packed, lr, decay
        self.mean = [torch.zeros_like(w) for w in matrices]

    @torch.no_grad()
    def step(self) -> None:
        for w, m, rows in zip(self.matrices, self.mean, self.packed, strict=True):
            m.copy_(0.95 * m + 0.05 * w.grad)
            direction = 0.05 * w.grad + 0.95 * m
            w -= self.lr * self.decay * w
            first = 0
            for n in rows:
                part = newton_schulz(direction[first : first + n])
                w[first : first + n] -= self.lr * math.sqrt(max(1, n / w.shape[1])) * part
                first += n
            w.grad = None


def newton_schulz(matrix: Tensor) -> Tensor:
    """By its singular values, as the iteration is defined: each is divided by the Frobenius norm, and then sent five
    times through 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s @ vt).to(matrix.dtype)
