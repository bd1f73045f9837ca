"""Dropout and causal attention, each with a form of its own for training on a CPU, where PyTorch's is slow.

Elsewhere, and where nothing is to be learned, they are PyTorch's. Measured in docs/benchmarks.md.
Shapes: B batch, H heads, T time, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # queries at a time: what lies beyond the diagonal of their block is never computed


def dropout(x: Tensor, rate: float) -> Tensor:
    """Zero each number with probability `rate`, scale the others by 1 / (1 - rate) (Srivastava et al. 2014)."""
    return _Dropout.apply(x, rate) if x.is_cpu else F.dropout(x, rate)


def causal_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, rate: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where no query sees a later key; `rate` is the dropout of the weights. (B, H, T, D).

    k and v may have fewer heads than q, which then share them in groups (Ainslie et al. 2023, arXiv:2305.13245).
    """
    groups = q_BHTD.shape[1] // k_BHTD.shape[1]
    if q_BHTD.is_cpu and torch.is_grad_enabled():
        if groups > 1:
            k_BHTD, v_BHTD = k_BHTD.repeat_interleave(groups, 1), v_BHTD.repeat_interleave(groups, 1)
        return _CausalAttention.apply(q_BHTD, k_BHTD, v_BHTD, rate)
    return F.scaled_dot_product_attention(
        q_BHTD, k_BHTD, v_BHTD, dropout_p=rate, is_causal=q_BHTD.shape[2] > 1, enable_gqa=groups > 1
    )


def kept(x: Tensor, rate: float) -> Tensor:
    """A mask like `x` on the CPU: 1 with probability 1 - rate (to 16 bits), else 0.

    Raw bits of the default generator, compared as 16-bit integers: a tenth of the time that drawing floats takes.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
    return torch.ge(words[: x.numel()].view(x.shape), round(rate * 65536) - 32768, out=torch.empty_like(x))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        mask = kept(x.contiguous(), rate).div_(1 - rate)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad * mask, None


class _CausalAttention(torch.autograd.Function):
    """Block after block of queries, with matrix products for both passes. N below is B x H."""

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, rate: float) -> Tensor:
        B, H, T, D = q_BHTD.shape
        q, k, v = (part.reshape(B * H, T, D) for part in (q_BHTD / math.sqrt(D), k_BHTD, v_BHTD))
        outputs, weights, masks = [], [], []
        future = torch.full((min(ROWS, T),) * 2, -math.inf, dtype=q.dtype).triu(1)
        for i, j in _blocks(T):
            scores = q[:, i:j] @ k[:, :j].transpose(1, 2)  # (N, j - i, j)
            scores[..., i:] += future[: j - i, : j - i]
            weights.append(scores.softmax(dim=-1))
            if rate:
                masks.append(kept(scores, rate))
            outputs.append((weights[-1] * masks[-1] if rate else weights[-1]) @ v[:, :j] / (1 - rate))
        ctx.rate = rate
        ctx.save_for_backward(q, k, v, *weights, *masks)
        return _joined(outputs).view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        B, H, T, D = grad_BHTD.shape
        q, k, v, *saved = ctx.saved_tensors
        grad, blocks = (grad_BHTD / (1 - ctx.rate)).reshape(B * H, T, D), _blocks(T)
        weights, masks = saved[: len(blocks)], saved[len(blocks) :]
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for n, (i, j) in enumerate(blocks):
            dropped = weights[n] * masks[n] if masks else weights[n]
            dv[:, :j].baddbmm_(dropped.transpose(1, 2), grad[:, i:j])
            dweights = grad[:, i:j] @ v[:, :j].transpose(1, 2)
            if masks:
                dweights *= masks[n]
            dscores = torch._softmax_backward_data(dweights, weights[n], -1, q.dtype)
            dq.append(dscores @ k[:, :j] / math.sqrt(D))
            dk[:, :j].baddbmm_(dscores.transpose(1, 2), q[:, i:j])
        return _joined(dq).view(B, H, T, D), dk.view(B, H, T, D), dv.view(B, H, T, D), None


def _blocks(T: int) -> list[tuple[int, int]]:
    return [(i, min(i + ROWS, T)) for i in range(0, T, ROWS)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
