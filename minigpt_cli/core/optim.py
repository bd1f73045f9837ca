"""How weights move: parameter groups, the optimizer, the learning rate of a step. Knows nothing of data or loss."""

from __future__ import annotations

import math

import torch
from torch import nn

from minigpt_cli.core.config import TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """The parameters that weight decay pulls at, and those it leaves alone.

    `decay: matrices` leaves biases and norms alone, as GPT-2's successors do; `all` is what the seed's AdamW did.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if config.decay == "all" or p.ndim >= 2]
    rest = [p for p in trained if not (config.decay == "all" or p.ndim >= 2)]
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    return [*groups, {"params": rest, "weight_decay": 0.0}] if rest else groups


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused: one kernel, and it can skip a step on the device."""
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The rate of step `step` (0 is the first): linear warmup, then constant, or cosine or linear down to `min_lr`.

    Cosine: Loshchilov & Hutter 2017, arXiv:1608.03983. From `lr_decay_iters` on the rate stays at `min_lr`.
    """
    peak, floor = config.learning_rate, config.min_lr
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if config.lr_schedule == "constant":
        return peak
    end = config.lr_decay_iters or config.max_iters
    done = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    return floor + (peak - floor) * ((1 + math.cos(math.pi * done)) / 2 if config.lr_schedule == "cosine" else 1 - done)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
