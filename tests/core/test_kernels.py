"""Dropout and attention as the CPU trains them: by their formulas, at their rates, with gradients that fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minigpt_cli.core import kernels

ROWS = kernels.attention_blocks(10**6, torch.float64)[0][1]


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query at a time."""
    rows = []
    for t in range(q.shape[2]):
        scores = (q[:, :, t : t + 1] * k[:, :, : t + 1]).sum(-1) / math.sqrt(q.shape[3])  # (B, H, t + 1)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append((weights[..., None] * v[:, :, : t + 1]).sum(2))
    return torch.stack(rows, dim=2)


def heads(T: int, n: int = 3, width: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, n, T, width, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("T", [1, 5, ROWS, ROWS + 1, 2 * ROWS + 37])
@pytest.mark.parametrize("shared", [False, True])
def test_attention_and_its_gradients_are_those_of_one_query_at_a_time(T: int, shared: bool) -> None:
    q, k, v, direction = heads(T), heads(T, 1 if shared else 3), heads(T, 1 if shared else 3), heads(T).detach()
    expected = naive_attention(q, k.expand_as(q), v.expand_as(q))
    wanted = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    y = kernels.causal_attention(q, k, v, 0.0)
    found = torch.autograd.grad((y * direction).sum(), (q, k, v))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(kernels.causal_attention(q, k, v, 0.0), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("T", [6, ROWS + 3])
def test_gradients_fit_the_attention_weights_that_were_dropped(T: int) -> None:
    """The same seed draws the same masks: then a difference quotient tells what the gradient must be."""
    q, k, v = heads(T, 1, 4), heads(T, 1, 4), heads(T, 1, 4)

    def value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(7)
        return (kernels.causal_attention(q, k, v, 0.4) * torch.arange(4)).sum()

    gradients = torch.autograd.grad(value(q, k, v), (q, k, v))
    for i, gradient in enumerate(gradients):
        step = torch.randn_like(q) * 1e-6
        moved = [tensor + step if i == j else tensor for j, tensor in enumerate((q, k, v))]
        back = [tensor - step if i == j else tensor for j, tensor in enumerate((q, k, v))]
        slope = (value(*moved) - value(*back)) / 2
        torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-5, atol=1e-12)


def test_dropped_attention_weights_leave_the_mean_as_it_is() -> None:
    q, k, v = (heads(40, dtype=torch.float32).detach().requires_grad_() for _ in range(3))
    with torch.no_grad():
        expected = kernels.causal_attention(q, k, v, 0.0)
    mean = sum(kernels.causal_attention(q, k, v, 0.3).detach() for _ in range(2000)) / 2000
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.15)
    assert not torch.allclose(kernels.causal_attention(q, k, v, 0.3), expected, atol=0.05)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 1_000_003])
def test_dropout_drops_at_its_rate_and_scales_the_rest(rate: float, dtype: torch.dtype, size: int) -> None:
    x = torch.full((size,), 2.0, dtype=dtype, requires_grad=True)
    y = kernels.dropout(x, rate)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    kept = y != 0
    if size > 3:
        assert abs(kept.float().mean().item() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / size) + 2**-16
        pairs = (kept[1:] & kept[:-1]).float().mean().item()  # neighbours are independent
        assert abs(pairs - (1 - rate) ** 2) < 5 * math.sqrt(rate / size) + 2**-14
    scale = torch.tensor(1 / (1 - rate), dtype=dtype)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2.0) * scale)
    torch.testing.assert_close(gradient, torch.where(kept, scale, torch.zeros((), dtype=dtype)))


def test_dropout_of_a_view_drops_what_it_would_of_a_copy() -> None:
    x = torch.randn(6, 5).t()
    torch.manual_seed(1)
    from_view = kernels.dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(from_view, kernels.dropout(x.contiguous(), 0.5))
    assert 0 < int((from_view == 0).sum()) < 30


@pytest.mark.parametrize("T", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_blocks_follow_one_another_and_cover_every_query(T: int, dtype: torch.dtype) -> None:
    blocks = kernels.attention_blocks(T, dtype)
    assert [row for first, end in blocks for row in range(first, end)] == list(range(T))


def test_swiglu_and_its_gradient_are_those_of_the_formula() -> None:
    x = torch.randn(3, 5, 14, dtype=torch.float64, requires_grad=True)
    gate, value = x[..., :7], x[..., 7:]
    expected, direction = gate * value / (1 + torch.exp(-gate)), torch.randn(3, 5, 7, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), x)
    y = kernels.swiglu(x)
    (found,) = torch.autograd.grad((y * direction).sum(), x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(kernels.swiglu(x), expected, rtol=0, atol=1e-12)
