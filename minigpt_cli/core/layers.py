"""The parts of a block: norms, positions, attention with its cache, feed-forwards. Knows nothing of what stacks them.

Shapes: B batch, T time (new tokens), S slots of the cache, C width, H heads, D head width.
"""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_cli.core import kernels
from minigpt_cli.core.config import ModelConfig

Rotary = tuple[Tensor, Tensor]  # cosines and signed sines of each position's angles, (T, D) both


@dataclass(frozen=True)
class Place:
    """Where each stream's one new token goes, when only the device knows: the step is the same work at every position,
    and each stream has its own."""

    position: Tensor  # (B,), from 0
    stream: Tensor  # (B,): 0, 1, ...
    slot: Tensor  # (B,): where in the cache the token's key and value go
    mask: Tensor  # (B, 1, 1, S): 0 for those of the cache's first S slots that hold a token by then, else -inf

    @classmethod
    def of(cls, position_B: Tensor, cache: KVCache, reach: int) -> Place:
        """For all layers at once: what each would compute again. `reach` is S."""
        keys_BHSD = (
            cache.layers[0].k_BHSD if cache.layers else position_B.new_empty(1, 1, reach, 1, dtype=torch.float32)
        )
        empty_BS = torch.arange(reach, device=position_B.device) > position_B[:, None]
        mask_BS = torch.zeros_like(empty_BS, dtype=keys_BHSD.dtype).masked_fill_(empty_BS, -math.inf)
        stream_B = torch.arange(len(position_B), device=position_B.device)
        return cls(position_B, stream_B, position_B % keys_BHSD.shape[2], mask_BS[:, None, None])


class LayerCache:
    """One layer's keys and values of the tokens so far, in buffers of a fixed size: k, v (B, H, block_size, D)."""

    def __init__(self, k_BHSD: Tensor, v_BHSD: Tensor) -> None:
        self.k_BHSD, self.v_BHSD = k_BHSD, v_BHSD

    def append(self, start: int | Place, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values behind `start` others; return views of all that are kept.

        A ring: once it is full, each new token takes the place of the oldest.
        """
        size, T = self.k_BHSD.shape[2], k_BHTD.shape[2]
        if isinstance(start, Place):
            reach = start.mask.shape[-1]
            self.k_BHSD[start.stream, :, start.slot] = k_BHTD[:, :, 0].to(self.k_BHSD.dtype)
            self.v_BHSD[start.stream, :, start.slot] = v_BHTD[:, :, 0].to(self.v_BHSD.dtype)
            return self.k_BHSD.narrow(2, 0, reach), self.v_BHSD.narrow(2, 0, reach)
        slot = start % size
        self.k_BHSD.narrow(2, slot, T).copy_(k_BHTD)
        self.v_BHSD.narrow(2, slot, T).copy_(v_BHTD)
        filled = min(start + T, size)
        return self.k_BHSD.narrow(2, 0, filled), self.v_BHSD.narrow(2, 0, filled)


class KVCache:
    """What attention has seen, for every layer, and how many tokens that is (Pope et al. 2022, arXiv:2211.05102)."""

    def __init__(self, batch: int, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, config.n_kv_head or config.n_head, config.block_size, config.each_head)
        zeros = partial(torch.zeros, shape, device=device, dtype=dtype)
        self.layers = [LayerCache(zeros(), zeros()) for _ in range(config.n_layer)]
        self.batch = batch
        self.length = 0  # tokens it has been given; `GPT.forward` moves it on
        self.place: Place | None = None  # counts instead of `length` where it is set, and is not moved on

    def streams(self, first: int, count: int) -> KVCache:
        """An empty cache for `count` streams that lies in this one's buffers, from stream `first` on."""
        part = copy.copy(self)
        part.layers = [
            LayerCache(layer.k_BHSD.narrow(0, first, count), layer.v_BHSD.narrow(0, first, count))
            for layer in self.layers
        ]
        part.batch, part.length, part.place = count, 0, None
        return part

    def clear(self) -> None:
        """Forget everything. The buffers stay: what lies beyond `length` is never read."""
        self.length = 0


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, arXiv:1706.03762), all heads in one packed projection.

    With `n_kv_head` below `n_head`, groups of heads share keys and values (Ainslie et al. 2023, arXiv:2305.13245).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_width = D = config.each_head
        self.rows = (self.n_head * D, self.n_kv_head * D, self.n_kv_head * D)  # of q, k, v; each head by head
        self.qkv = nn.Linear(config.n_embd, sum(self.rows), bias=config.bias_qkv)
        self.norm_q = make_norm(config, D) if config.qk_norm else None
        self.norm_k = make_norm(config, D) if config.qk_norm else None
        self.proj = nn.Linear(self.n_head * D, config.n_embd, bias=config.bias)
        self.dropout_attn = _or_default(config.dropout_attn, config)
        self.dropout = Dropout(_or_default(config.dropout_proj, config))

    def forward(
        self, x_BTC: Tensor, rotary: Rotary | None = None, cache: LayerCache | None = None, start: int | Place = 0
    ) -> Tensor:
        """`start` is how many tokens came before in the cache. Returns (B, T, C)."""
        B, T, _ = x_BTC.shape
        heads = self.qkv(x_BTC).view(B, T, -1, self.head_width).transpose(1, 2)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)  # each (B, H, T, D)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            kept = cache.append(start, k, v)
            if start != 0:
                k, v = kept
            dtype = compute_dtype(self.qkv.weight)  # the cache's may be a smaller one
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        mask = None
        if isinstance(start, Place):
            mask = start.mask
        elif start and T > 1:  # several new tokens behind a cached past: each sees the past, itself and no later one
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x_BTC.device).tril(start)
        if mask is not None:
            y_BHTD = kernels.fused_attention(q, k, v, attn_mask=mask)
        else:
            y_BHTD = kernels.causal_attention(q, k, v, self.dropout_attn if self.training else 0.0)
        return self.dropout(self.proj(y_BHTD.transpose(1, 2).reshape(B, T, -1)))


def rotary_table(positions_T: Tensor, head_width: int, base: float) -> Rotary:
    """How far rotary embedding turns each pair of numbers at each position (Su et al. 2021, arXiv:2104.09864): (T, D).

    Pair i is (i, i + D/2), as Llama has it, and turns by position * base^(-2i / D). In float64 where there is such a
    thing: a cache that slides goes to any position.
    """
    exact = torch.float32 if positions_T.device.type == "mps" else torch.float64
    pairs = torch.arange(0, head_width, 2, device=positions_T.device, dtype=exact) / head_width
    angles = torch.outer(positions_T.to(exact), base**-pairs)
    sines = angles.sin()
    return torch.cat([angles.cos()] * 2, dim=1).float(), torch.cat([-sines, sines], dim=1).float()


def rotate(x_BHTD: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of x by its position's angle: (a, b) -> (a cos - b sin, b cos + a sin). Keeps dtype and shape."""
    cosines_TD, sines_TD = (table.to(x_BHTD.dtype) for table in rotary)
    return torch.addcmul(x_BHTD * cosines_TD, x_BHTD.roll(x_BHTD.shape[-1] // 2, dims=-1), sines_TD)


class FeedForward(nn.Module):
    """Widen, bend, narrow again, for every position on its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.mlp_width or default_mlp_width(config)
        self.activation = ACTIVATIONS[config.mlp]()
        self.rows = (width, width) if config.mlp == "swiglu" else (width,)  # of the gate, and of what it lets through
        self.up = nn.Linear(config.n_embd, sum(self.rows), bias=config.bias)
        self.down = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(_or_default(config.dropout_mlp, config))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x_BTC))))


def default_mlp_width(config: ModelConfig) -> int:
    """4 C; a gated feed-forward has three matrices, and gets two thirds of that, in whole eights."""
    return -(-8 * config.n_embd // 24) * 8 if config.mlp == "swiglu" else 4 * config.n_embd


class ReLUSquared(nn.Module):
    """max(0, x)^2 (So et al. 2021, Primer, arXiv:2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        return y * y  # CUDA's autocast would compute `square` in float32


class GELUTanh(nn.GELU):
    """GELU as GPT-2 computes it: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (arXiv:1606.08415)."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class SwiGLU(nn.Module):
    """silu(gate) * value, the two halves of x (Shazeer 2020, arXiv:2002.05202). Halves the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.swiglu(x)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": GELUTanh, "relu2": ReLUSquared, "swiglu": SwiGLU,
}  # fmt: skip


class Dropout(nn.Module):
    """Dropout in training, nothing in evaluation."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return kernels.dropout(x, self.rate) if self.training and self.rate else x


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / std(x) times a gain, plus a bias (Ba et al. 2016, arXiv:1607.06450)."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        with _in_own_dtype(x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) times a gain (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        with _in_own_dtype(x):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)  # fused only in one dtype


def _in_own_dtype(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """CUDA's autocast would norm a bf16 stream in float32, and write a float32 result: twice the traffic. The kernels
    compute mean and variance in float32 in any case."""
    return torch.autocast("cuda", enabled=False) if x.is_cuda else contextlib.nullcontext()


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm of a config, over the last axis."""
    if config.norm == "layernorm":
        return LayerNorm(width, eps=norm_eps(config), bias=config.bias)
    return RMSNorm(width, eps=norm_eps(config)) if config.norm == "rmsnorm" else nn.Identity()


def norm_eps(config: ModelConfig) -> float:
    """What keeps a norm from dividing by nothing."""
    return config.norm_eps or (1e-6 if config.norm == "rmsnorm" else 1e-5)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products with this weight are computed in: autocast's choice where it is on."""
    kind = weight.device.type
    autocast = not weight.is_meta and torch.is_autocast_enabled(kind)  # on meta tensors there is no such thing
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype


def _or_default(own: float | None, config: ModelConfig) -> float:
    return config.dropout if own is None else own
