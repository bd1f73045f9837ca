"""The GPT: embeddings, blocks, head, initialisation and the loss. Knows no optimizer, checkpoint or tokenizer.

Shapes: B batch, T time, C width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.layers import (
    Attention,
    FeedForward,
    KVCache,
    LayerCache,
    Place,
    Rotary,
    compute_dtype,
    make_norm,
    rotary_table,
)

WHOLE_LOGITS = 1 << 24  # elements of which float32 copies (64 MB each) do no harm


class Block(nn.Module):
    """One layer: the residual stream gathers what attention, then the feed-forward, makes of its normalised self."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_attn = make_norm(config, config.n_embd)
        self.attn = Attention(config)
        self.norm_mlp = make_norm(config, config.n_embd)
        self.mlp = FeedForward(config)

    def forward(
        self, x_BTC: Tensor, rotary: Rotary | None = None, cache: LayerCache | None = None, start: int | Place = 0
    ) -> Tensor:
        x_BTC = x_BTC + self.attn(self.norm_attn(x_BTC), rotary, cache, start)
        return x_BTC + self.mlp(self.norm_mlp(x_BTC))


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019, GPT-2), in the shapes that `ModelConfig` can describe.

    With zero blocks and no norm it is the seed's bigram model: the head reads the embeddings.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        rows = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple  # GPUs multiply round sizes faster
        self.token_embedding = nn.Embedding(rows, config.n_embd)
        self.position_embedding = (
            nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        )
        self.rotary_width = config.each_head if config.position == "rope" else 0
        self.native: Callable[[Tensor, KVCache, int | Place], Tensor | None] | None = None  # a quicker way of one token
        self.checkpoint_activations = False  # in training keep only what goes into a block, and compute it twice
        self.slides = config.position == "rope"  # only distances count: the window may move on token by token
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.head = nn.Linear(config.n_embd, rows, bias=config.bias_head)
        if config.tie_weights:
            self.head.weight = self.token_embedding.weight
        if config.init != "torch":
            self.apply(_init_normal)  # "torch" keeps what the constructors drew
        if config.init == "gpt2":
            for attn, mlp in self._parts():
                attn.proj.weight.data *= residual_scale(config)
                mlp.down.weight.data *= residual_scale(config)
        if config.zero_init:
            for attn, mlp in self._parts():
                nn.init.zeros_(attn.proj.weight)
                nn.init.zeros_(mlp.down.weight)

    def forward(self, idx_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V), each row predicting the token after it.

        With a `cache`, `idx_BT` holds only the tokens that follow those in it, and the cache grows by T. Raises
        ValueError when cache and new tokens together are longer than the context window; only a single token may go
        on past it, and only where positions are relative (`slides`): then the oldest token is forgotten.
        """
        T = idx_BT.shape[1]
        start: int | Place = 0 if cache is None else cache.place or cache.length
        if isinstance(start, int) and start + T > self.config.block_size and not (self.slides and T == 1 and cache):
            raise ValueError(f"{start + T} tokens do not fit a context of {self.config.block_size}")
        if self.native is not None and cache is not None and T == 1:
            logits_B1V = self.native(idx_BT, cache, start)
            if logits_B1V is not None:
                cache.length += isinstance(start, int)
                return logits_B1V
        x_BTC = self.token_embedding(idx_BT)
        if self.position_embedding is not None:
            rows = start.position[:, None] if isinstance(start, Place) else slice(start, start + T)
            x_BTC = x_BTC + self.position_embedding.weight[rows]
        if (dtype := compute_dtype(x_BTC)) == torch.bfloat16:  # the residual stream too: half the traffic
            x_BTC = x_BTC.to(dtype)
        rotary = None
        if self.rotary_width:
            if isinstance(start, Place):  # (B, D) -> (B, 1, 1, D): each stream turns by an angle of its own
                tables = rotary_table(start.position, self.rotary_width, self.config.rope_base)
                rotary = (tables[0][:, None, None], tables[1][:, None, None])
            else:
                positions_T = torch.arange(start, start + T, device=idx_BT.device)
                rotary = rotary_table(positions_T, self.rotary_width, self.config.rope_base)
        for i, block in enumerate(self.blocks):
            if self.checkpoint_activations and self.training:  # Chen et al. 2016, arXiv:1604.06174
                x_BTC = checkpoint(block, x_BTC, rotary, use_reentrant=False)
            else:
                x_BTC = block(x_BTC, rotary, cache.layers[i] if cache is not None else None, start)
        if cache is not None and isinstance(start, int):
            cache.length = start + T
        logits_BTV = self.head(self.norm(x_BTC))
        if self.token_embedding.num_embeddings > self.vocab_size:  # what pads the vocabulary is seen by nobody
            logits_BTV = logits_BTV[..., : self.vocab_size]
        if self.config.logit_softcap is not None:  # Gemma 2, arXiv:2408.00118
            logits_BTV = self.config.logit_softcap * torch.tanh(logits_BTV / self.config.logit_softcap)
        return logits_BTV

    def hidden_matrices(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """The blocks' weight matrices, and how many rows each of the projections packed into one has."""
        matrices: list[tuple[Tensor, tuple[int, ...]]] = []
        for attn, mlp in self._parts():
            matrices += [(attn.qkv.weight, attn.rows), (mlp.up.weight, mlp.rows)]
            matrices += [(linear.weight, (linear.out_features,)) for linear in (attn.proj, mlp.down)]
        return matrices

    def _parts(self) -> list[tuple[Attention, FeedForward]]:
        return [(block.attn, block.mlp) for block in self.modules() if isinstance(block, Block)]

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, and their `total`. A tied head counts once, with the embedding.

        `padding`, the rows of embedding and head that no token has (`vocab_multiple`), stands apart from the total.
        """
        parts = {
            "token embedding": "token_embedding.", "position embedding": "position_embedding.", "attention": ".attn.",
            "feed-forward": ".mlp.", "norms": "norm", "head": "head.",
        }  # fmt: skip
        counts = dict.fromkeys([*parts, "padding", "total"], 0)
        for name, p in self.named_parameters():
            if name == "head.weight" and self.config.tie_weights:  # a copy on the meta device has it twice
                continue
            part = next(part for part, mark in parts.items() if mark in name)
            rows = len(p) - self.vocab_size if part in ("token embedding", "head") else 0
            unused = rows * p.shape[1:].numel()
            counts[part] += p.numel() - unused
            counts["padding"] += unused
            counts["total"] += p.numel() - unused
        return counts

    def flops_per_token(self) -> int:
        """Floating-point operations of one training step per token: 3 x forward, matrix products only.

        2 per weight of every matrix, and 2 x 2 T H D per layer for attention's scores and weighted sums, counted in
        full as PaLM does (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), though half of it is masked.
        """
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = 2 * self.config.n_layer * self.config.block_size * self.config.n_head * self.config.each_head
        return 3 * 2 * (matrices + attention)


def empty_model(config: ModelConfig, vocab_size: int) -> GPT:
    """The model without memory and without initial weights: for counting, or to be given weights.

    It is on PyTorch's meta device, where drawing initial weights would import PyTorch's compiler (over a second).
    """
    with torch.device("meta"), _NoInitialisation():
        return GPT(config, vocab_size)


class _NoInitialisation(TorchFunctionMode):
    """Inside the block the functions of `nn.init`, and what they call, return their tensor as it is."""

    FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FILLS or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def lm_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, computed in float32. Scalar.

    Many logits are taken in chunks: float32 copies of all of them, as a vocabulary of 50,000 makes, would be the
    largest tensors of the whole step.
    """
    logits_NV, targets_N = logits_BTV.flatten(0, 1), targets_BT.flatten()
    if logits_NV.numel() <= WHOLE_LOGITS or not torch.is_grad_enabled():
        return F.cross_entropy(logits_NV.float(), targets_N)
    return _ChunkedCrossEntropy.apply(logits_NV, targets_N)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss, chunk of rows by chunk. Kept for the backward pass: the logits, and each row's log-sum-exp.

    The gradient, (softmax - one-hot) / N, is computed in float32 and multiplied by the incoming one before it gets the
    logits' dtype: with fp16's loss scaling its small entries would else round to zero.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        largest_N = logits_NV.amax(dim=1).float()
        sums_N = torch.empty_like(largest_N)
        buffer = _chunk_like(logits_NV)
        for logits, largest, sums in _chunks(logits_NV, largest_N, sums_N):
            scaled = torch.sub(logits, largest[:, None], out=buffer[: len(logits)]).exp_()
            torch.sum(scaled, dim=1, out=sums)
        log_sums_N = largest_N + sums_N.log()
        ctx.save_for_backward(logits_NV, log_sums_N, targets_N)
        return (log_sums_N - logits_NV.gather(1, targets_N[:, None])[:, 0].float()).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_NV, log_sums_N, targets_N = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        buffer, scale = _chunk_like(logits_NV), grad / len(targets_N)
        for logits, log_sums, targets, gradient in _chunks(logits_NV, log_sums_N, targets_N, gradient_NV):
            probs = torch.sub(logits, log_sums[:, None], out=buffer[: len(logits)]).exp_()
            probs.scatter_add_(1, targets[:, None], probs.new_full((len(targets), 1), -1.0))
            gradient.copy_(probs.mul_(scale))
        return gradient_NV, None


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, at least one, else with at most `WHOLE_LOGITS` elements of the first."""
    rows = max(1, WHOLE_LOGITS // tensors[0].shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _chunk_like(logits_NV: Tensor) -> Tensor:
    """One float32 buffer for all chunks: to allocate each anew takes longer than to compute it."""
    rows = min(len(logits_NV), max(1, WHOLE_LOGITS // logits_NV.shape[1]))
    return logits_NV.new_empty((rows, logits_NV.shape[1]), dtype=torch.float32)


def initial_weights(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """What the constructor draws, for a model that has no memory yet or is sliced: name and weight, on the CPU.

    The same draws from the default generator in the same order, one module's at a time; where a name comes again, the
    later weight counts.
    """
    rounds: list[Callable[[Any], None]] = [lambda module: module.reset_parameters()]
    if model.config.init != "torch":
        rounds.append(_init_normal)
    for initialise in rounds:
        for name, module in model.named_modules():
            if not module._parameters or (
                initialise is _init_normal and not isinstance(module, nn.Linear | nn.Embedding)
            ):
                continue
            drawn = copy.copy(module)
            drawn._parameters = {
                key: None if p is None else nn.Parameter(torch.empty(p.shape)) for key, p in module._parameters.items()
            }
            initialise(drawn)
            if module is model.head and model.config.tie_weights and initialise is not _init_normal:
                del drawn._parameters["weight"]  # the constructor drops it for the embedding's
            if initialise is _init_normal and model.config.init == "gpt2" and name.endswith((".proj", ".down")):
                drawn.weight.data *= residual_scale(model.config)
            yield from ((f"{name}.{key}", p.data) for key, p in drawn._parameters.items() if p is not None)
    if model.config.zero_init:
        for i in range(model.config.n_layer):
            for name in (f"blocks.{i}.attn.proj.weight", f"blocks.{i}.mlp.down.weight"):
                yield name, torch.zeros(model.get_parameter(name).shape)


def residual_scale(config: ModelConfig) -> float:
    """What GPT-2 multiplies the initial output projections with, two in each layer: the residual stream adds them up,
    and would else grow with the depth (Radford et al. 2019, section 2.3)."""
    return (2 * config.n_layer) ** -0.5


def _init_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
