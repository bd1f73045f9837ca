"""Which of our model's numbers are which of the oracle's: to copy weights, and to compare gradients piece by piece."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minigpt_cli.core.model import GPT
from oracle.model import NaiveGPT
from oracle.operations import Operations

Piece = tuple[str, nn.Parameter, slice, nn.Parameter]


def pieces(ours: GPT, naive: NaiveGPT) -> Iterator[Piece]:
    """(name, our parameter, its rows, the oracle's parameter), for every number of ours exactly once; padding apart.

    Our packed projection has the rows of all queries, then all keys, then all values; within each, head by head.
    """
    tokens = slice(ours.vocab_size)  # the rows below pad the vocabulary
    yield from _same("token_embedding", ours.token_embedding, naive.token_table, tokens)
    if ours.position_embedding is not None:
        yield from _same("position_embedding", ours.position_embedding, naive.position_table)
    for i, (block, layer) in enumerate(zip(ours.blocks, naive.layers, strict=True)):
        yield from _same(f"blocks.{i}.norm_attn", block.norm_attn, layer.norm_1)
        yield from _same(f"blocks.{i}.norm_mlp", block.norm_mlp, layer.norm_2)
        yield from _same(f"blocks.{i}.attn.proj", block.attn.proj, layer.attention.out)
        gated, width = layer.feed_forward.gate is not None, layer.feed_forward.into.out_features
        if gated:
            yield from _same(f"blocks.{i}.mlp.up[gate]", block.mlp.up, layer.feed_forward.gate, slice(width))
        into = slice(width, 2 * width) if gated else slice(None)
        yield from _same(f"blocks.{i}.mlp.up", block.mlp.up, layer.feed_forward.into, into)
        yield from _same(f"blocks.{i}.mlp.down", block.mlp.down, layer.feed_forward.out)
        attention = layer.attention
        heads = [head.query for head in attention.heads]
        heads += [pair.key for pair in attention.shared] + [pair.value for pair in attention.shared]
        for h, head in enumerate(heads):
            rows = slice(h * head.out_features, (h + 1) * head.out_features)
            yield from _same(f"blocks.{i}.attn.qkv[{h}]", block.attn.qkv, head, rows)
        if ours.config.qk_norm:
            yield from _same(f"blocks.{i}.attn.norm_q", block.attn.norm_q, attention.norm_q)
            yield from _same(f"blocks.{i}.attn.norm_k", block.attn.norm_k, attention.norm_k)
    yield from _same("norm", ours.norm, naive.final_norm)
    if not ours.config.tie_weights:
        yield from _same("head", ours.head, naive.to_logits, tokens)
    elif ours.head.bias is not None:
        yield "head.bias", ours.head.bias, tokens, naive.to_logits.bias


def naive_twin(ours: GPT, ops: Operations | None = None) -> NaiveGPT:
    """An oracle with our model's weights, on our model's device and in its precision."""
    naive = NaiveGPT(ours.config, ours.vocab_size, ops).to(ours.token_embedding.weight)
    copied = 0
    with torch.no_grad():
        for _, source, rows, target in pieces(ours, naive):
            target.copy_(source[rows])
            copied += target.numel()
    counts = [ours.parameter_counts()["total"], sum(p.numel() for p in naive.parameters())]
    assert counts == [copied, copied], f"ours and the oracle's parameters {counts}, copied {copied}"
    return naive.train(ours.training)


def gradient_pairs(ours: GPT, naive: NaiveGPT) -> list[tuple[str, Tensor, Tensor]]:
    """(name, our gradient, the oracle's), after both ran backward."""
    return [(name, mine.grad[rows], theirs.grad) for name, mine, rows, theirs in pieces(ours, naive)]


def _same(name: str, mine: nn.Module, theirs: nn.Module, rows: slice = slice(None)) -> Iterator[Piece]:
    """The weight and, where there is one, the bias of two modules that play the same part."""
    for ending, other in (("weight", "gain"), ("bias", "offset")):
        parameter = getattr(mine, ending, None)
        if parameter is not None:
            counterpart = getattr(theirs, ending, None) if hasattr(theirs, ending) else getattr(theirs, other)
            yield f"{name}.{ending}", parameter, rows, counterpart
