"""A GPT the way one would write it from the paper: one head at a time, the mask spelled out, no cache, nothing fused.

Shapes: B batch, T time, C width, D width of one head, V vocabulary. `nn.Linear` and `nn.Embedding` hold the weights;
what is computed between them is in `oracle.operations`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minigpt_cli.core.config import ModelConfig
from oracle.operations import Formulas, Operations


class NaiveGPT(nn.Module):
    """The seed's model, and every other shape `ModelConfig` can describe. Ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig, vocab_size: int, ops: Operations | None = None) -> None:
        super().__init__()
        ops = ops or Formulas()
        assert config.position in ("learned", "rope", "none"), config.position
        self.token_table = nn.Embedding(vocab_size, config.n_embd)
        self.position_table = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.layers = nn.ModuleList([NaiveLayer(config, ops) for _ in range(config.n_layer)])
        self.final_norm = NaiveNorm(config, ops)
        self.to_logits = nn.Linear(config.n_embd, vocab_size, bias=config.bias_head)
        if config.tie_weights:
            self.to_logits.weight = self.token_table.weight
        self.ceiling = config.logit_softcap
        if config.init == "gpt2":  # otherwise as torch made them
            self.apply(draw_small_weights)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.token_table.weight[ids_BT]
        if self.position_table is not None:
            x_BTC = x_BTC + self.position_table.weight[torch.arange(ids_BT.shape[1], device=ids_BT.device)]
        for layer in self.layers:
            x_BTC = layer(x_BTC)
        logits_BTV = self.to_logits(self.final_norm(x_BTC))
        return logits_BTV if self.ceiling is None else self.ceiling * torch.tanh(logits_BTV / self.ceiling)


class NaiveLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.norm_1, self.attention = NaiveNorm(config, ops), NaiveAttention(config, ops)
        self.norm_2, self.feed_forward = NaiveNorm(config, ops), NaiveFeedForward(config, ops)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.norm_1(x_BTC))
        return x_BTC + self.feed_forward(self.norm_2(x_BTC))


class NaiveKeyValue(nn.Module):
    """Keys and values of one head, or of a group of heads that share them. (B, T, C) -> (B, T, D) both."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        width = config.head_width or config.n_embd // config.n_head
        self.key = nn.Linear(config.n_embd, width, bias=config.bias_qkv)
        self.value = nn.Linear(config.n_embd, width, bias=config.bias_qkv)

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        return self.key(x_BTC), self.value(x_BTC)


class NaiveHead(nn.Module):
    """One head: softmax(q k^T / sqrt(D)) v, where position t looks at positions 0..t only. (B, T, C) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        width = config.head_width or config.n_embd // config.n_head
        self.query = nn.Linear(config.n_embd, width, bias=config.bias_qkv)
        self.ops, self.dropout = ops, NaiveDropout(config, config.dropout_attn, ops)
        self.rotary_base = config.rope_base if config.position == "rope" else None
        self.register_buffer("past", torch.ones(config.block_size, config.block_size).tril().bool(), persistent=False)

    def forward(self, x_BTC: Tensor, shared: NaiveKeyValue, norm_q: nn.Module, norm_k: nn.Module) -> Tensor:
        T = x_BTC.shape[1]
        k_BTD, v_BTD = shared(x_BTC)
        q_BTD, k_BTD = norm_q(self.query(x_BTC)), norm_k(k_BTD)
        if self.rotary_base is not None:
            q_BTD, k_BTD = turn_pairs(q_BTD, self.rotary_base), turn_pairs(k_BTD, self.rotary_base)
        score_BTT = q_BTD @ k_BTD.transpose(1, 2) / math.sqrt(q_BTD.shape[2])
        score_BTT = score_BTT.masked_fill(~self.past[:T, :T], -math.inf)
        return self.dropout(self.ops.softmax(score_BTT)) @ v_BTD


def turn_pairs(x_BTD: Tensor, base: float) -> Tensor:
    """RoFormer's rotation, one pair after the other: (x_i, x_{i + D/2}) at position t turns by t base^(-2i / D)."""
    half = x_BTD.shape[2] // 2
    t_T = torch.arange(x_BTD.shape[1], device=x_BTD.device, dtype=torch.float64)
    turned = [torch.empty(0)] * (2 * half)
    for i in range(half):
        angle_T = t_T * base ** (-2 * i / (2 * half))
        cos_T, sin_T = torch.cos(angle_T).to(x_BTD.dtype), torch.sin(angle_T).to(x_BTD.dtype)
        a_BT, b_BT = x_BTD[:, :, i], x_BTD[:, :, i + half]
        turned[i], turned[i + half] = a_BT * cos_T - b_BT * sin_T, a_BT * sin_T + b_BT * cos_T
    return torch.stack(turned, dim=2)


class NaiveAttention(nn.Module):
    """Each head in its turn, their outputs side by side, and one projection over all of them."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        n_shared = config.n_kv_head or config.n_head
        width = config.head_width or config.n_embd // config.n_head
        self.heads = nn.ModuleList([NaiveHead(config, ops) for _ in range(config.n_head)])
        self.shared = nn.ModuleList([NaiveKeyValue(config, ops) for _ in range(n_shared)])
        self.norm_q, self.norm_k = (
            NaiveNorm(config, ops, width) if config.qk_norm else nn.Identity() for _ in range(2)
        )  # every head's alike
        self.out = nn.Linear(config.n_head * width, config.n_embd, bias=config.bias)
        self.dropout = NaiveDropout(config, config.dropout_proj, ops)

    def forward(self, x_BTC: Tensor) -> Tensor:
        outputs, group = [], len(self.heads) // len(self.shared)
        for h, head in enumerate(self.heads):
            outputs.append(head(x_BTC, self.shared[h // group], self.norm_q, self.norm_k))
        return self.dropout(self.out(torch.cat(outputs, dim=2)))


class NaiveFeedForward(nn.Module):
    """Wider (four times, where nothing else is said), bent, and back. Gated: silu(gate(x)) * into(x), and back."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        gated = config.mlp == "swiglu"
        width = config.mlp_width or (math.ceil(config.n_embd * 8 / 3 / 8) * 8 if gated else 4 * config.n_embd)
        self.gate = nn.Linear(config.n_embd, width, bias=config.bias) if gated else None
        self.into = nn.Linear(config.n_embd, width, bias=config.bias)
        self.out = nn.Linear(width, config.n_embd, bias=config.bias)
        self.bend = {
            "relu": ops.relu, "gelu": ops.gelu, "relu2": lambda z: ops.relu(z) ** 2,
            "swiglu": lambda z: z / (1 + torch.exp(-z)),
            "gelu_tanh": lambda z: z / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))),
        }[config.mlp]  # fmt: skip
        self.dropout = NaiveDropout(config, config.dropout_mlp, ops)

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.gate is not None:
            return self.dropout(self.out(self.bend(self.gate(x_BTC)) * self.into(x_BTC)))
        return self.dropout(self.out(self.bend(self.into(x_BTC))))


class NaiveNorm(nn.Module):
    """LayerNorm, RMSNorm, or nothing, over the last axis."""

    def __init__(self, config: ModelConfig, ops: Operations, width: int | None = None) -> None:
        super().__init__()
        width = width or config.n_embd
        assert config.norm in ("layernorm", "rmsnorm", "none"), config.norm
        self.ops, self.gain, self.offset, self.kind = ops, None, None, config.norm
        self.eps = config.norm_eps or {"layernorm": 1e-5, "rmsnorm": 1e-6}.get(config.norm)
        if config.norm != "none":
            self.gain = nn.Parameter(torch.ones(width))
        if config.norm == "layernorm" and config.bias:
            self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.gain is None:
            return x_BTC
        if self.kind == "rmsnorm":
            return x_BTC / torch.sqrt((x_BTC * x_BTC).mean(dim=-1, keepdim=True) + self.eps) * self.gain
        return self.ops.layer_norm(x_BTC, self.gain, self.offset, self.eps)


class NaiveDropout(nn.Module):
    """Dropout in training, at this place's own rate or the model's."""

    def __init__(self, config: ModelConfig, own_rate: float | None, ops: Operations) -> None:
        super().__init__()
        self.ops, self.rate = ops, config.dropout if own_rate is None else own_rate

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.dropout(x, self.rate) if self.training and self.rate > 0 else x


def draw_small_weights(module: nn.Module) -> None:
    """GPT-2's beginning, as far as the seed follows it: every matrix from N(0, 0.02), every bias zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.data.normal_(0.0, 0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias.data.zero_()
