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
        assert config.position in ("learned", "none"), config.position
        self.token_table = nn.Embedding(vocab_size, config.n_embd)
        self.position_table = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.layers = nn.ModuleList([NaiveLayer(config, ops) for _ in range(config.n_layer)])
        self.final_norm = NaiveNorm(config, ops)
        self.to_logits = nn.Linear(config.n_embd, vocab_size, bias=config.bias_head)
        if config.tie_weights:
            self.to_logits.weight = self.token_table.weight
        if config.init == "gpt2":  # otherwise as torch made them
            self.apply(draw_small_weights)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.token_table.weight[ids_BT]
        if self.position_table is not None:
            x_BTC = x_BTC + self.position_table.weight[torch.arange(ids_BT.shape[1], device=ids_BT.device)]
        for layer in self.layers:
            x_BTC = layer(x_BTC)
        return self.to_logits(self.final_norm(x_BTC))


class NaiveLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.norm_1, self.attention = NaiveNorm(config, ops), NaiveAttention(config, ops)
        self.norm_2, self.feed_forward = NaiveNorm(config, ops), NaiveFeedForward(config, ops)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.norm_1(x_BTC))
        return x_BTC + self.feed_forward(self.norm_2(x_BTC))


class NaiveHead(nn.Module):
    """One head: softmax(q k^T / sqrt(D)) v, where position t looks at positions 0..t only. (B, T, C) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        width = config.n_embd // config.n_head
        self.query = nn.Linear(config.n_embd, width, bias=config.bias_qkv)
        self.key = nn.Linear(config.n_embd, width, bias=config.bias_qkv)
        self.value = nn.Linear(config.n_embd, width, bias=config.bias_qkv)
        self.ops, self.dropout = ops, NaiveDropout(config, config.dropout_attn, ops)
        self.register_buffer("past", torch.ones(config.block_size, config.block_size).tril().bool(), persistent=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        T = x_BTC.shape[1]
        q_BTD, k_BTD, v_BTD = self.query(x_BTC), self.key(x_BTC), self.value(x_BTC)
        score_BTT = q_BTD @ k_BTD.transpose(1, 2) / math.sqrt(q_BTD.shape[2])
        score_BTT = score_BTT.masked_fill(~self.past[:T, :T], -math.inf)
        return self.dropout(self.ops.softmax(score_BTT)) @ v_BTD


class NaiveAttention(nn.Module):
    """Each head in its turn, their outputs side by side, and one projection over all of them."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.heads = nn.ModuleList([NaiveHead(config, ops) for _ in range(config.n_head)])
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = NaiveDropout(config, config.dropout_proj, ops)

    def forward(self, x_BTC: Tensor) -> Tensor:
        outputs = []
        for head in self.heads:
            outputs.append(head(x_BTC))
        return self.dropout(self.out(torch.cat(outputs, dim=2)))


class NaiveFeedForward(nn.Module):
    """Four times as wide, bent, and back."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.into = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.bend = {"relu": ops.relu, "gelu": ops.gelu}[config.mlp]
        self.dropout = NaiveDropout(config, config.dropout_mlp, ops)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.dropout(self.out(self.bend(self.into(x_BTC))))


class NaiveNorm(nn.Module):
    """LayerNorm, or nothing."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        assert config.norm in ("layernorm", "none"), config.norm
        self.ops, self.gain, self.offset = ops, None, None
        if config.norm == "layernorm":
            self.gain = nn.Parameter(torch.ones(config.n_embd))
            self.offset = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC if self.gain is None else self.ops.layer_norm(x_BTC, self.gain, self.offset)


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
