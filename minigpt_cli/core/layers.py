"""The parts of a block: norms, attention with its cache, feed-forwards. Knows nothing of what stacks them.

Shapes: B batch, T time (new tokens), S time seen so far (cached + new), C width, H heads, D head width (C / H).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_cli.core.config import ModelConfig


class LayerCache:
    """One layer's keys and values of the tokens so far, in buffers of a fixed size: k, v (B, H, block_size, D)."""

    def __init__(self, batch: int, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k_BHSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_BHSD = torch.zeros(shape, device=device, dtype=dtype)

    def append(self, start: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values at `start`; return views of all so far, (B, H, start + T, D)."""
        end = start + k_BHTD.shape[2]
        self.k_BHSD[:, :, start:end] = k_BHTD
        self.v_BHSD[:, :, start:end] = v_BHTD
        return self.k_BHSD[:, :, :end], self.v_BHSD[:, :, :end]


class KVCache:
    """What attention has seen, for every layer, and how many tokens that is (Pope et al. 2022, arXiv:2211.05102)."""

    def __init__(self, batch: int, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.layers = [LayerCache(batch, config, device, dtype) for _ in range(config.n_layer)]
        self.length = 0  # tokens in the cache; `GPT.forward` moves it on

    def clear(self) -> None:
        """Forget everything. The buffers stay: what lies beyond `length` is never read."""
        self.length = 0


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762), all heads in one packed projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias_qkv)  # rows: q, k, v; head by head
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout_attn = _or_default(config.dropout_attn, config)
        self.dropout = nn.Dropout(_or_default(config.dropout_proj, config))

    def forward(self, x_BTC: Tensor, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        """`start` is how many tokens the cache already holds. Returns (B, T, C)."""
        B, T, C = x_BTC.shape
        q, k, v = (
            self.qkv(x_BTC).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        )  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(start, k, v)
            q = q.to(k.dtype)
        mask = None
        if start and T > 1:  # several new tokens behind a cached past: each sees the past, itself and no later one
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x_BTC.device).tril(start)
        y_BHTD = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=start == 0 and T > 1,
            dropout_p=self.dropout_attn if self.training else 0.0,
        )  # fmt: skip
        return self.dropout(self.proj(y_BHTD.transpose(1, 2).reshape(B, T, C)))


class FeedForward(nn.Module):
    """Widen fourfold, bend, narrow again, for every position on its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]()
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(_or_default(config.dropout_mlp, config))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x_BTC))))


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm before attention, before the feed-forward and before the head (Ba et al. 2016, arXiv:1607.06450)."""
    return nn.LayerNorm(config.n_embd, bias=config.bias) if config.norm == "layernorm" else nn.Identity()


def _or_default(own: float | None, config: ModelConfig) -> float:
    return config.dropout if own is None else own
