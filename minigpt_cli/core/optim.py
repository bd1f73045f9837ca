"""How weights move: parameter groups, the optimizers, the learning rate of a step, averaging. Knows no data or loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minigpt_cli.core.config import Config, TrainConfig
from minigpt_cli.core.model import GPT
from minigpt_cli.core.sharding import like, local, whole

MUON_MOMENTUM = 0.95
MUON_BATCH = 1 << 26  # elements orthogonalised at a time: 256 MB in float32
TOKENS_PER_PARAMETER = 20  # beyond which a larger model is the better use of time (Hoffmann et al. 2022)
FEW_EPOCHS = 4  # up to which repeated text teaches nearly as much as new text (Muennighoff et al. 2023)
MOST_EPOCHS = 12  # beyond which reading the same text again teaches little more (docs/recipe.md)
WARMUP_PART = 4  # at most one of so many steps of an automatic horizon
USUAL_DECAY = 0.1
MOST_DECAY = 0.1  # of a weight, in one step
ADAMW_KEEPS = 5  # times as long as Muon, for the same loss (docs/recipe.md)


def parameter_groups(model: GPT, config: TrainConfig) -> list[dict[str, Any]]:
    """Which weights move how: the hidden matrices (with `optimizer: muon`), what weight decay pulls at, and the rest.

    `decay: matrices` leaves biases and norms alone, as GPT-2's successors do; `all` is what the seed's AdamW did.
    """
    hidden = [(p, rows) for p, rows in model.hidden_matrices() if p.requires_grad and config.optimizer == "muon"]
    muon = {id(p) for p, _ in hidden}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in muon]
    decayed = [p for p in others if config.decay == "all" or p.ndim >= 2]
    rest = [p for p in others if not (config.decay == "all" or p.ndim >= 2)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p, _ in hidden], "rows": [rows for _, rows in hidden], "weight_decay": config.decay_strength,
         "peak": config.muon_learning_rate},
        {"params": decayed, "weight_decay": config.decay_strength, "peak": config.learning_rate},
        {"params": rest, "weight_decay": 0.0, "peak": config.learning_rate},
    ]  # fmt: skip
    return [group for group in groups if group["params"]]


def make_optimizer(model: GPT, config: TrainConfig, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused: one kernel, and it can skip a step on the device.

    Or Muon for the hidden matrices and AdamW for all else; `dtype` is what Muon's matrix products are computed in.
    """
    groups = parameter_groups(model, config)
    for group in groups:  # a tensor, so that a new rate is no new program to compile or capture
        group["lr"] = torch.tensor(group["peak"], device=group["params"][0].device)
        if "rows" not in group and local(group["params"][0]) is not group["params"][0]:
            group["lr"] = group["peak"]  # PyTorch would try the fused step of a tensor rate on all slices' wholes first
    if config.optimizer == "muon":
        return Muon(groups, (config.beta1, config.beta2), dtype)
    return AdamW(groups, (config.beta1, config.beta2))


def skips_on_the_device(device: torch.device) -> bool:
    """Whether PyTorch's fused step leaves the weights alone where `found_inf` is set; not on MPS (pytorch#186360)."""
    return device.type != "mps"


class AdamW(torch.optim.AdamW):
    """PyTorch's, which leaves the weights as they are where `found_inf` is set: on the device, or asking from here."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        self.fused = skips_on_the_device(groups[0]["params"][0].device)
        for group in groups:
            if not self.fused and "rows" not in group:
                group["lr"] = group["peak"]  # a number: each weight would read a tensor back
        super().__init__(groups, betas=betas, fused=self.fused)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.fused:
            super().step()
            return
        found_inf = self.__dict__.pop("found_inf", None)  # which only fused steps take
        for state in self.state.values():
            if "step" in state:
                state["step"] = state["step"].cpu()  # a resumed run's comes with the moments, and is read every time
        if found_inf is None or not found_inf.item():
            super().step()


class Muon(AdamW):
    """AdamW, except for groups with `rows`: their matrices move along their momentum, orthogonalised.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks": every direction in which the
    momentum points gets a step of the same length. Projections packed in one matrix are orthogonalised each on its
    own, those of equal shape in one batch. Sliced matrices are gathered for that: every rank does the same work.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], dtype: torch.dtype) -> None:
        super().__init__(groups, betas)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "rows" in group:
                self._orthogonal_step(group)
        super().step()  # moves what still has a gradient

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = group["params"]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        rate, found_inf = group["lr"], getattr(self, "found_inf", None)
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        if found_inf is not None:  # a step that is skipped: a gradient equal to the momentum leaves it as it is
            grads = [torch.where(found_inf > 0, m, grad) for m, grad in zip(momenta, grads, strict=True)]
            rate = rate * (1 - found_inf)
        torch._foreach_lerp_(momenta, grads, 1 - MUON_MOMENTUM)
        ahead = torch._foreach_lerp(grads, momenta, MUON_MOMENTUM)  # Nesterov's look ahead
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        for few in in_batches(params):
            steps = [whole(ahead[i]) for i in few]
            parts = [part for i, step in zip(few, steps, strict=True) for part in step.split(group["rows"][i])]
            for shape in sorted({tuple(part.shape) for part in parts}):
                alike = [part for part in parts if tuple(part.shape) == shape]
                steps_NRC = orthogonalized(torch.stack([part.to(self.dtype) for part in alike]))
                steps_NRC = steps_NRC.to(rate.dtype) * (-rate * max(1.0, shape[0] / shape[1]) ** 0.5)
                torch._foreach_copy_(alike, list(steps_NRC.unbind(0)))
            torch._foreach_add_([params[i] for i in few], [like(s, params[i]) for i, s in zip(few, steps, strict=True)])
        for p in params:
            p.grad = None


def in_batches(params: list[Tensor]) -> Iterator[list[int]]:
    """Their numbers, so many together that the matrices are worth a batch and their copies do not fill a device."""
    batch, elements = [0], params[0].numel()
    for i, p in enumerate(params[1:], 1):
        if elements + p.numel() > MUON_BATCH:
            yield batch
            batch, elements = [], 0
        batch.append(i)
        elements += p.numel()
    yield batch


def orthogonalized(m_NRC: Tensor) -> Tensor:
    """About U V^T for each matrix U S V^T of a batch (N, R, C): singular values from 0.7 to 1.2, whatever they were.

    Five Newton-Schulz steps with the quintic's coefficients of Jordan et al. 2024, chosen to lift small values fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = m_NRC.shape[1] <= m_NRC.shape[2]
    x = m_NRC if wide else m_NRC.transpose(1, 2)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.transpose(1, 2)


def resolved(config: Config, n_tokens: int, n_parameters: int) -> Config:
    """The config with `max_iters` and `weight_decay` as numbers where they are auto, for this text and this model.

    As many steps as are worth it: 20 tokens per parameter (Hoffmann et al. 2022, arXiv:2203.15556), but no more than
    12 passes over the text (repeated tokens are worth ever less: Muennighoff et al. 2023, arXiv:2305.16264). The warmup
    takes at most a quarter of them.
    """
    train = config.train
    if train.max_iters == "auto":
        tokens = min(TOKENS_PER_PARAMETER * n_parameters, MOST_EPOCHS * n_tokens)
        steps = max(1, round(tokens / (train.batch_size * config.model.block_size)))
        warmup = min(train.warmup_iters, steps // WARMUP_PART)
        train = train.model_copy(update={"max_iters": steps, "warmup_iters": warmup})
    if train.weight_decay == "auto":
        decay = fitting_decay(config.model_copy(update={"train": train}), n_tokens, n_parameters)
        train = train.model_copy(update={"weight_decay": decay})
    return config if train is config.train else config.model_copy(update={"train": train})


def fitting_decay(config: Config, n_tokens: int, n_parameters: int) -> float:
    """The weight decay that keeps a text of `n_tokens` from being learned by heart in `config.train.steps` steps.

    The usual 0.1 up to four passes over the text. From twelve on so much that, at the highest rate, weights keep what
    they learned for 1 / sqrt(parameters per token) passes: more for larger models (Kim et al. 2025, arXiv:2509.14786),
    and by passes, not steps (Wang & Aitchison 2024, arXiv:2405.13698). At most a tenth a step. With AdamW a fifth.
    Between four and twelve a part of it, in a line.
    """
    train = config.train
    steps_per_epoch = n_tokens / (train.batch_size * config.model.block_size)
    often = (train.steps / steps_per_epoch - FEW_EPOCHS) / (MOST_EPOCHS - FEW_EPOCHS)
    rate = train.muon_learning_rate if train.optimizer == "muon" else ADAMW_KEEPS * train.learning_rate
    a_step = min(MOST_DECAY, math.sqrt(n_parameters / n_tokens) / steps_per_epoch)
    return max(USUAL_DECAY, float(f"{min(often, 1) * a_step / rate:.2g}"))


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The rate of step `step` (0 is the first): linear warmup, then the schedule's way down to `min_lr`.

    constant; linear; cosine (Loshchilov & Hutter 2017, arXiv:1608.03983); wsd: constant, then linear over the last
    `cooldown` of the steps (Hu et al. 2024, arXiv:2404.06395). From `lr_decay_iters` on the rate stays at `min_lr`.
    """
    peak, floor = config.learning_rate, config.min_lr
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if config.lr_schedule == "constant":
        return peak
    end = config.lr_decay_iters or config.steps
    begin = config.warmup_iters
    if config.lr_schedule == "wsd":
        begin = max(begin, round(end * (1 - config.cooldown)))
    done = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    return floor + (peak - floor) * ((1 + math.cos(math.pi * done)) / 2 if config.lr_schedule == "cosine" else 1 - done)


def set_learning_rate(optimizer: torch.optim.Optimizer, fraction: float) -> None:
    """Give every group this fraction of its own peak rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["peak"] * fraction)
        else:
            group["lr"] = group["peak"] * fraction


class WeightAverage:
    """An exponential moving average of the weights (Polyak & Juditsky 1992), which often judges better than the last.

    In its first steps it forgets faster, so that it is never far behind a run that has just begun.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters: list[Tensor] = [local(p.detach()) for p in model.parameters()]
        self.averages = [p.clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step`, 0 the first."""
        torch._foreach_lerp_(self.averages, self.parameters, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the model holds the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        trained = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.averages)
        torch._foreach_copy_(self.averages, trained)
