"""Dropout, causal attention and SwiGLU, each with a form of its own for training on a CPU, where PyTorch's is slow.

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

BLOCK_ROWS = {torch.float32: 64, torch.bfloat16: 128}  # the fastest of 32, 64, 128 and 256 (docs/benchmarks.md)


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
    return fused_attention(q_BHTD, k_BHTD, v_BHTD, dropout_p=rate, is_causal=q_BHTD.shape[2] > 1)


def fused_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, **how: Any) -> Tensor:
    """PyTorch's own attention; `how` as for `F.scaled_dot_product_attention`. k and v may have fewer heads than q.

    Without gradients cuDNN is left out: PyTorch prefers it on an H100 and newer, where it plans anew for every length
    (0.4 s on a B200), and evaluating and decoding have many. In training, whose shapes stay the same, it is kept.
    """
    grouped = k_BHTD.shape[1] < q_BHTD.shape[1]
    if torch.is_grad_enabled() or not q_BHTD.is_cuda:
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, enable_gqa=grouped, **how)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, enable_gqa=grouped, **how)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * value, which lie side by side in x (Shazeer 2020, arXiv:2002.05202). Halves the last axis."""
    if x.is_cpu and torch.is_grad_enabled():
        return _SwiGLU.apply(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def attention_blocks(T: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """The blocks of queries (first, end) that a CPU trains with: a block computes no scores for keys past its end."""
    rows = BLOCK_ROWS.get(dtype, 64)
    return [(i, min(i + rows, T)) for i in range(0, T, rows)]


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
        blocks = attention_blocks(T, q.dtype)
        longest = blocks[0][1]
        future = torch.full((longest, longest), -math.inf, dtype=q.dtype).triu(1)
        for i, j in blocks:
            scores = q[:, i:j] @ k[:, :j].transpose(1, 2)  # (N, j - i, j)
            scores[..., i:] += future[: j - i, : j - i]
            weights.append(scores.softmax(dim=-1))
            if rate:
                masks.append(kept(scores, rate))
            outputs.append((weights[-1] * masks[-1] if rate else weights[-1]) @ v[:, :j])
        ctx.rate = rate
        ctx.save_for_backward(q, k, v, *weights, *masks)
        y = _joined(outputs)
        return (y.div_(1 - rate) if rate else y).view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        B, H, T, D = grad_BHTD.shape
        q, k, v, *saved = ctx.saved_tensors
        blocks = attention_blocks(T, q.dtype)
        weights, masks = saved[: len(blocks)], saved[len(blocks) :]
        grad = (grad_BHTD / (1 - ctx.rate) if masks else grad_BHTD).reshape(B * H, T, D)
        dq, dk, dv = [], torch.empty_like(k), torch.empty_like(v)
        for n, (i, j) in reversed(list(enumerate(blocks))):  # the last block sees all keys: it fills dk and dv
            dropped = weights[n] * masks[n] if masks else weights[n]
            dweights = grad[:, i:j] @ v[:, :j].transpose(1, 2)
            if masks:
                dweights *= masks[n]
            dscores = torch._softmax_backward_data(dweights, weights[n], -1, q.dtype)
            dq.append(dscores @ k[:, :j])
            if j == T:
                torch.bmm(dscores.transpose(1, 2), q[:, i:j], out=dk)
                torch.bmm(dropped.transpose(1, 2), grad[:, i:j], out=dv)
            else:  # a product into part of a tensor would be taken matrix by matrix
                dk[:, :j] += dscores.transpose(1, 2) @ q[:, i:j]
                dv[:, :j] += dropped.transpose(1, 2) @ grad[:, i:j]
        dq_NTD = _joined(dq[::-1]).div_(math.sqrt(D))
        return dq_NTD.view(B, H, T, D), dk.view(B, H, T, D), dv.view(B, H, T, D), None


class _SwiGLU(torch.autograd.Function):
    """Both halves of the gradient are written in place: autograd would compute them apart, then join them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        open_gate = F.silu(gate)
        ctx.save_for_backward(x, open_gate)
        return open_gate * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, open_gate = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        dgate, dvalue = dx.chunk(2, dim=-1)
        torch.mul(grad, open_gate, out=dvalue)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=dgate)
        return dx


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
