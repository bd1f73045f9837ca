"""What a part is worth: the validation loss without it. Knows torch and tokens, no HTML.

Shapes: B windows side by side, T tokens of a window, C width. Losses are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_cli.core.dataset import Array, Tokens, require_ids
from minigpt_cli.core.model import GPT
from minigpt_cli.extras.inspect.capture import Replay, Skip, block_outputs, replaced_blocks, silenced_head

MAX_FLOPS = 0.9e12  # of all passes together: some five seconds on two cores that have nothing else to do
MAX_WINDOW = 1024  # tokens of a window: of a longer context, the beginning
MAX_TOKENS = 1 << 13  # more would hardly change a digit that the page shows
TOKENS_AT_ONCE = 2048
MAX_LOGITS = 1 << 25  # elements at once: 128 MB in float32

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rise:
    """By how much the loss rises without a part; `error` is the standard error of that, over windows (None: one)."""

    rise: float
    error: float | None


@dataclass(frozen=True)
class Ablations:
    """`loss` of the whole model on `tokens` predictions, and what it rises by without each head and each block."""

    tokens: int
    loss: float
    heads: list[list[Rise]]  # by layer, by head
    blocks: list[Rise]


def validation_windows(tokens: Tokens, model: GPT, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Windows spread evenly over the split, as many as `limit` tokens allow: x and y of (B, T), y one token ahead.

    The same split, model and limit always give the same windows. By default the limit is what `ablate` can do in the
    time that MAX_FLOPS stands for. `tokens` must hold at least two.
    """
    T = min(model.config.block_size, len(tokens) - 1, MAX_WINDOW)
    n = max(1, min((len(tokens) - 1) // T, (affordable_tokens(model) if limit is None else limit) // T))
    starts_B = np.linspace(0, len(tokens) - 1 - T, n).astype(np.int64)
    windows_BT = np.stack([tokens[start : start + T + 1] for start in starts_B.tolist()])
    require_ids(windows_BT, model.vocab_size)
    windows = torch.from_numpy(windows_BT.astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def affordable_tokens(model: GPT) -> int:
    """How many tokens every ablation can be measured on within MAX_FLOPS; depends on the model's shape alone."""
    forward = model.flops_per_token() / 3
    passes = 1 + model.config.n_layer * (model.config.n_head + 1) * 0.55  # what lies before a part is not run again
    return int(min(MAX_TOKENS, MAX_FLOPS / (forward * passes)))


@torch.no_grad()
def ablate(model: GPT, x_BT: Tensor, y_BT: Tensor, progress: Progress | None = None) -> Ablations:
    """Silence each head and skip each block in turn, and take the loss on the same windows each time.

    A silenced head gives zeros to attention's projection; a skipped block leaves the stream as it was. The blocks
    before the part give what they gave to the whole model, so they are replayed, not run.
    """
    model.eval()
    n_layer, n_head, T = model.config.n_layer, model.config.n_head, x_BT.shape[1]
    rows = max(1, min(TOKENS_AT_ONCE // T, MAX_LOGITS // (T * model.vocab_size)))
    chunks = list(zip(x_BT.split(rows), y_BT.split(rows), strict=True))
    parts = [(layer, head) for layer in range(n_layer) for head in (*range(n_head), None)]  # None: the whole block
    losses: dict[tuple[int, int | None] | None, list[Tensor]] = {part: [] for part in (None, *parts)}
    total = len(chunks) * (len(parts) + 1)
    device = model.token_embedding.weight.device
    for i, (x, y) in enumerate(chunks):
        x, y = x.to(device), y.to(device)
        outputs: list[Tensor] = []
        with block_outputs(model, outputs):
            losses[None].append(_window_losses(model, x, y))
        for j, (layer, head) in enumerate(parts):
            if progress is not None:
                progress(i * (len(parts) + 1) + j + 1, total)
            before = {earlier: Replay(outputs[earlier]) for earlier in range(layer)}
            silent: AbstractContextManager[None] = nullcontext()
            if head is not None:
                silent = silenced_head(model, layer, head)
            with silent, replaced_blocks(model, before | ({layer: Skip()} if head is None else {})):
                losses[layer, head].append(_window_losses(model, x, y))
    if progress is not None:
        progress(total, total)
    by_window = {part: torch.cat(pieces).cpu().numpy().astype(np.float64) for part, pieces in losses.items()}
    rises = {part: _rise(by_window[part] - by_window[None]) for part in parts}
    return Ablations(
        tokens=x_BT.numel(), loss=float(by_window[None].mean()),
        heads=[[rises[layer, head] for head in range(n_head)] for layer in range(n_layer)],
        blocks=[rises[layer, None] for layer in range(n_layer)],
    )  # fmt: skip


def _window_losses(model: GPT, x_BT: Tensor, y_BT: Tensor) -> Tensor:
    """The mean loss of each window, (B,)."""
    logits_BTV = model(x_BT).float()
    losses_BT = F.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten(), reduction="none").view_as(y_BT)
    return losses_BT.mean(dim=1)


def _rise(differences_B: Array) -> Rise:
    n = len(differences_B)
    return Rise(float(differences_B.mean()), float(differences_B.std(ddof=1)) / math.sqrt(n) if n > 1 else None)
