"""One optimizer step: forward, backward, clip, update. `train_step` is the algorithm, `TrainStep` how it is repeated.

Device code that reads nothing back to the host; what it measures stays in `Statistics` until somebody asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minigpt_cli.core.config import Config
from minigpt_cli.core.model import lm_loss
from minigpt_cli.core.runtime import Runtime, first_line, seed_everything
from minigpt_cli.core.sharding import replicate, whole, without_exchange


@dataclass
class Statistics:
    """What a step measures. Kept on the device, so that a step never waits for the host; read when due."""

    loss_sum: Tensor  # of the steps since the last log
    failed_at: Tensor  # the first step whose loss or gradient was not finite; -1 while all is well
    step: Tensor  # the number of the step at work
    grad_norm: Tensor  # of the last step, over all parameters, before clipping

    @classmethod
    def zeros(cls, device: torch.device) -> Statistics:
        return cls(*(torch.tensor(value, device=device) for value in (0.0, -1, 0, 0.0)))


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    micro_batches: Sequence[tuple[Tensor, Tensor]], config: Config, runtime: Runtime, statistics: Statistics, step: int,
) -> None:  # fmt: skip
    """One optimizer step over `micro_batches`, pairs (x, y) of equal shape (B, T). Reads nothing back to the host.

    Every rank has as many of the same shape, so the mean over ranks of their means is that over all tokens.
    When the loss or the gradient is not finite, this step and every later one leave the weights as they are, and
    `statistics.failed_at` says where that began. (With fp16 an overflowing gradient is the scaler's business.)
    """
    statistics.step.fill_(step)
    n, alone = len(micro_batches), runtime.world.size == 1
    for i, (x_BT, y_BT) in enumerate(micro_batches):
        seed_everything(config.train.seed, step, runtime.world.rank * n + i)  # dropout masks, by place in the batch
        with contextlib.nullcontext() if alone or i == n - 1 else without_exchange(model):
            _accumulate(model, scaler, x_BT, y_BT, n, runtime, statistics)
    _update(optimizer, scaler, config, statistics)


class TrainStep:
    """`train_step` for one batch after another of equal shape; on CUDA recorded once, then replayed by the device.

    What changes from step to step (batch, seed, learning rate, step number) is then written into tensors that stay in
    place. Several micro batches draw their dropout from seeds of their own, and are not recorded. Where recording
    fails, `note` is called, and training continues without it.
    """

    WARM_UP = 3  # ordinary steps, which allocate what a recording refers to

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
        config: Config, runtime: Runtime, statistics: Statistics, note: Callable[[str], None] = lambda message: None,
    ) -> None:  # fmt: skip
        self.model = replicate(model, runtime.device) if runtime.parallel == "ddp" else model
        self.optimizer, self.scaler = optimizer, scaler
        self.config, self.runtime, self.statistics, self.note = config, runtime, statistics, note
        self.recordable = runtime.records and config.train.accumulation == 1
        self._set_capturable(self.recordable)
        self.taken = 0
        self.batch: tuple[Tensor, Tensor] | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, micro_batches: Sequence[tuple[Tensor, Tensor]], step: int) -> None:
        self.taken += 1
        if not self.recordable or self.taken <= self.WARM_UP or not self._recorded(*micro_batches[0]):
            train_step(
                self.model, self.optimizer, self.scaler, micro_batches, self.config, self.runtime, self.statistics, step
            )
            return
        assert self.batch is not None
        assert self.replay is not None
        for place, new in zip(self.batch, micro_batches[0], strict=True):
            place.copy_(new)
        self.statistics.step.fill_(step)
        seed_everything(self.config.train.seed, step, 0)
        self.replay()

    def _recorded(self, x_BT: Tensor, y_BT: Tensor) -> bool:
        """Record, if that has not been done; false if it cannot be. Recording computes nothing."""
        if self.replay is None:
            self.batch = (x_BT.clone(), y_BT.clone())
            try:
                self.replay = self.runtime.record(self._work)
            except RuntimeError as error:
                self.note(f"CUDA graph: failed, going on without it ({first_line(error)})")
                self.optimizer.zero_grad(set_to_none=True)
                self.recordable = False
                self._set_capturable(False)
        return self.recordable

    def _set_capturable(self, value: bool) -> None:
        """PyTorch's optimizers refuse to be recorded without this, and advise against it elsewhere."""
        for group in self.optimizer.param_groups:
            group["capturable"] = value

    def _work(self) -> None:
        assert self.batch is not None
        _accumulate(self.model, self.scaler, *self.batch, 1, self.runtime, self.statistics)
        _update(self.optimizer, self.scaler, self.config, self.statistics)


def _accumulate(
    model: Callable[[Tensor], Tensor], scaler: torch.amp.GradScaler, x_BT: Tensor, y_BT: Tensor, parts: int,
    runtime: Runtime, statistics: Statistics,
) -> None:  # fmt: skip
    """Forward and backward of one of `parts` micro batches."""
    with runtime.autocast():
        logits_BTV = model(x_BT)
    loss = lm_loss(logits_BTV, y_BT) / parts
    scaler.scale(loss).backward()
    statistics.loss_sum += loss.detach()
    _latch_failure(statistics, loss.detach())


def _update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, config: Config, statistics: Statistics
) -> None:
    """Clip, and move the weights by the gradients that were gathered."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    statistics.grad_norm.copy_(norm)
    if config.train.grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, config.train.grad_clip, norm)
    if not scaler.is_enabled():
        _latch_failure(statistics, norm)
        optimizer.found_inf = (statistics.failed_at >= 0).float()  # type: ignore[attr-defined] # fused AdamW skips then
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def _latch_failure(statistics: Statistics, value: Tensor) -> None:
    failed = (statistics.failed_at < 0) & ~torch.isfinite(value)
    statistics.failed_at.copy_(torch.where(failed, statistics.step, statistics.failed_at))
