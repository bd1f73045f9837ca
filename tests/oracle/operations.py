"""The operations under the naive model, twice: by their formulas, to judge with, and by torch, to race against.

By formula each operation takes several passes over memory, which makes a training step about 1.2 times as long as the
seed's script takes. A benchmark against that would flatter whatever is measured, so it runs `TorchOps`, the calls that
the seed makes. `tests/core/test_oracle.py` holds the two to the same numbers.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Operations(Protocol):
    def softmax(self, x: Tensor) -> Tensor: ...
    def layer_norm(self, x_BTC: Tensor, gain: Tensor, offset: Tensor | None, eps: float) -> Tensor: ...
    def relu(self, z: Tensor) -> Tensor: ...
    def gelu(self, z: Tensor) -> Tensor: ...
    def dropout(self, x: Tensor, rate: float) -> Tensor: ...
    def cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor: ...


class Formulas:
    def softmax(self, x: Tensor) -> Tensor:
        """exp(x) / sum exp(x) over the last axis. Taking the maximum off first changes nothing but overflow."""
        e = torch.exp(x - x.amax(dim=-1, keepdim=True))
        return e / e.sum(dim=-1, keepdim=True)

    def layer_norm(self, x_BTC: Tensor, gain: Tensor, offset: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(variance + eps) over the width, times a gain, plus an offset where there is one."""
        centred_BTC = x_BTC - x_BTC.mean(dim=-1, keepdim=True)
        variance_BT1 = (centred_BTC * centred_BTC).mean(dim=-1, keepdim=True)
        y_BTC = centred_BTC / torch.sqrt(variance_BT1 + eps) * gain
        return y_BTC if offset is None else y_BTC + offset

    def relu(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, torch.zeros_like(z))

    def gelu(self, z: Tensor) -> Tensor:
        """z P(Z <= z) for a standard normal Z."""
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        """Each number is lost with probability `rate`, and the others grow so that the mean stays."""
        return x * (torch.rand_like(x) >= rate) / (1 - rate)

    def cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """The mean of -log softmax(logits)[target], in nats."""
        top_BT1 = logits_BTV.amax(dim=2, keepdim=True)
        log_sum_BT = torch.log(torch.exp(logits_BTV - top_BT1).sum(dim=2)) + top_BT1.squeeze(2)
        chosen_BT = logits_BTV.gather(2, targets_BT[:, :, None]).squeeze(2)
        return (log_sum_BT - chosen_BT).mean()


class TorchOps:
    def softmax(self, x: Tensor) -> Tensor:
        return F.softmax(x, dim=-1)

    def layer_norm(self, x_BTC: Tensor, gain: Tensor, offset: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x_BTC, gain.shape, gain, offset, eps)

    def relu(self, z: Tensor) -> Tensor:
        return F.relu(z)

    def gelu(self, z: Tensor) -> Tensor:
        return F.gelu(z)

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        return F.dropout(x, rate)

    def cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
