"""What happens in the model between ids and logits, caught with hooks while the model runs. Knows no text, no HTML.

The model's own forward pass is never written again here: what stands in this file watches it, or puts something else
in the place of one of its parts for as long as a pass takes. It needs no branch in the model for that.

Shapes: B batch, T tokens of a text, C width, L layers, H heads, K key heads (H unless grouped), D head width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.model import GPT


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention compared: queries and keys as they meet, after any norm and rotation of them."""

    queries: Tensor  # (H, T, D)
    keys: Tensor  # (K, T, D)
    scale: float
    visible: Tensor  # (T, T), bool: may position t (row) look at position s (column)?

    def scores(self) -> Tensor:
        """The raw q.k of all pairs, (H, T, T), before scaling and mask."""
        k_HTD = self.keys.repeat_interleave(len(self.queries) // len(self.keys), dim=0)  # a group shares a key head
        return self.queries @ k_HTD.transpose(1, 2)

    def weights(self) -> Tensor:
        """softmax(scale q.k + mask), (H, T, T): each row sums to one over the visible past."""
        return (self.scores() * self.scale).masked_fill(~self.visible, -math.inf).softmax(dim=-1)


@dataclass(frozen=True)
class Capture:
    """One text's way through the model. `streams` are the residual stream before the first block, then after each
    attention and each feed-forward: 2 L + 1 of them, the last being what the final norm reads."""

    logits: Tensor  # (T, V)
    uncapped: Tensor  # (T, V): what the head gave, before any cap
    tokens: Tensor  # (T, C): the token embeddings alone, without positions
    streams: list[Tensor]  # each (T, C)
    attention: list[LayerAttention]

    @property
    def after_blocks(self) -> list[Tensor]:
        """The stream before any block, then after each whole block: L + 1 of (T, C)."""
        return self.streams[::2]


@torch.no_grad()
def capture(model: GPT, ids_T: Tensor) -> Capture:
    """Run the model on one text, ids (T,), and keep what passes. Raises MinigptError if its output is not finite."""
    model.eval()
    streams: list[Tensor] = []
    taken: dict[str, Tensor] = {}
    calls = _AttentionCalls()
    with ExitStack() as stack:
        for block in _blocks(model):
            stack.enter_context(_before(block, streams))
            stack.enter_context(_before(block.norm_mlp, streams))
        stack.enter_context(_before(model.norm, streams))
        for name, module in (("token", model.token_embedding), ("head", model.head)):
            stack.enter_context(_after(module, taken, name))
        stack.enter_context(calls)
        logits_BTV = model(ids_T[None])
    if not torch.isfinite(logits_BTV).all():
        raise MinigptError("the model's output is not finite: its weights are damaged, or training diverged")
    assert len(calls.seen) == len(model.blocks)
    uncapped_TV = taken["head"][0, :, : model.vocab_size].float()
    return Capture(logits_BTV[0].float(), uncapped_TV, taken["token"][0], [x[0] for x in streams], calls.seen)


@torch.no_grad()
def lens_logits(model: GPT, ids_T: Tensor, stream_TC: Tensor) -> Tensor:
    """What the model would say if its blocks ended with `stream_TC`: (T, V). The logit lens (nostalgebraist 2020)."""
    handle = model.norm.register_forward_pre_hook(lambda module, arguments: (stream_TC[None],))
    try:
        return model(ids_T[None])[0].float()
    finally:
        handle.remove()


class Replay(nn.Module):
    """Stands where a block stood and gives what that block gave before, whatever comes in."""

    def __init__(self, output_BTC: Tensor) -> None:
        super().__init__()
        self.output_BTC = output_BTC

    def forward(self, x_BTC: Tensor, *rest: Any, **options: Any) -> Tensor:
        return self.output_BTC


class Skip(nn.Module):
    """Stands where a block stood and lets the stream pass as it is."""

    def forward(self, x_BTC: Tensor, *rest: Any, **options: Any) -> Tensor:
        return x_BTC


@contextmanager
def replaced_blocks(model: GPT, stand_ins: dict[int, nn.Module]) -> Iterator[None]:
    """The model with other modules in the place of some of its blocks; its own come back afterwards."""
    own = {i: model.blocks[i] for i in stand_ins}
    try:
        for i, module in stand_ins.items():
            model.blocks[i] = module
        yield
    finally:
        for i, module in own.items():
            model.blocks[i] = module


@contextmanager
def silenced_head(model: GPT, layer: int, head: int) -> Iterator[None]:
    """The model with one head's output set to zero where attention's projection reads it."""
    projection = _blocks(model)[layer].attn.proj
    width = projection.in_features // model.config.n_head
    keep_C = torch.ones(width * model.config.n_head, device=model.token_embedding.weight.device)
    keep_C[head * width : (head + 1) * width] = 0

    def silence(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0] * keep_C, *arguments[1:])

    handle = projection.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def block_outputs(model: GPT, into: list[Tensor]) -> Iterator[None]:
    """Append every block's output (B, T, C), in order, while the context is open."""
    handles = [block.register_forward_hook(lambda m, a, output: into.append(output)) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: GPT) -> list[Any]:
    return list(model.blocks)


class _AttentionCalls(TorchFunctionMode):
    """Sees every call of scaled_dot_product_attention, in order: its arguments are what attention truly compares."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[LayerAttention] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q_BHTD, k_BKTD = args[0], args[1]
            T, D = q_BHTD.shape[-2:]
            visible_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device)
            if kwargs.get("is_causal"):
                visible_TT = visible_TT.tril()
            if (mask := kwargs.get("attn_mask")) is not None:
                visible_TT = visible_TT & mask.reshape(-1, T, T)[0]
            scale = kwargs.get("scale") or 1 / math.sqrt(D)
            self.seen.append(LayerAttention(q_BHTD[0].float(), k_BKTD[0].float(), float(scale), visible_TT))
        return func(*args, **kwargs)


@contextmanager
def _before(module: nn.Module, into: list[Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda m, arguments: into.append(arguments[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, into: dict[str, Tensor], name: str) -> Iterator[None]:
    handle = module.register_forward_hook(lambda m, a, output: into.__setitem__(name, output))
    try:
        yield
    finally:
        handle.remove()
