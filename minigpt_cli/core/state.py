"""What a checkpoint holds of a training run: how it is collected from the trainer, and how it is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minigpt_cli.core import shards
from minigpt_cli.core.checkpoint import MODEL, OPTIMIZER, SHARDED, Checkpoint, stored_once
from minigpt_cli.core.config import TrainConfig
from minigpt_cli.core.model import GPT
from minigpt_cli.core.optim import WeightAverage, make_optimizer
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.sharding import like, whole

TRAINED = "trained"  # the optimizer's name for weights of which the model holds the average


class TrainState:
    """The tensors of a run: the weights, their average if there is one, and the optimizer's state."""

    def __init__(self, model: GPT, config: TrainConfig, runtime: Runtime, saved: Checkpoint | None) -> None:
        """A new optimizer, or `saved` put back. The weights of a single file are in the model already."""
        self.model, self.runtime = model, runtime
        self.optimizer = make_optimizer(model, config, runtime.update_dtype)
        moments: Mapping[str, Tensor] = {}
        if saved is not None:
            moments = self._read_shards(saved.path) if saved.path.suffix == SHARDED else saved.part(OPTIMIZER)
        self.average: WeightAverage | None = None  # of the weights: the model is evaluated with it and saved as it
        if config.ema is not None:
            self.average = WeightAverage(model, config.ema)  # which starts from the weights as they were saved
        self._put_back(moments)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the model holds the weights that it is evaluated with and saved as."""
        return self.average.swapped() if self.average is not None else contextlib.nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """The model's weights, a tied matrix once."""
        weights = {MODEL + name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        return stored_once(weights, {"model": self.model.config.model_dump()})

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors; with a weight average, also the weights that training continues from."""
        moments = {
            f"{OPTIMIZER}{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        if self.average is not None:
            moments |= {f"{OPTIMIZER}{name}.{TRAINED}": p.detach() for name, p in self.model.named_parameters()}
        return moments

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU of rank 0; nothing elsewhere. Slices are gathered one tensor at a time."""
        copies = {}
        for name, tensor in tensors.items():
            tensor = whole(tensor.detach())
            if self.runtime.world.leads:
                copies[name] = tensor.to("cpu", copy=True)
        return copies

    def save_shards(self, path: Path, header: Mapping[str, object], *, optimizer: bool) -> None:
        """Every rank writes its slices, while training waits."""
        moments = self.moments() if optimizer else {}
        moments = {name: m.clone() if name.endswith(TRAINED) else m for name, m in moments.items()}
        with self.averaged():
            shards.save(path, self.weights() | moments, header, self.runtime.world)

    def _put_back(self, moments: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in moments.items():
            name, _, key = name.rpartition(".")
            parameter = parameters[name]
            if key == TRAINED:
                parameter.data.copy_(like(tensor, parameter.data))
            else:  # a moment, or a count of steps
                value = like(tensor, parameter.data) if tensor.ndim else tensor.to(self.runtime.device)
                self.optimizer.state[parameter][key] = value

    def _read_shards(self, path: Path) -> dict[str, Tensor]:
        """Fill the weights from a sharded checkpoint; the optimizer's tensors, sliced as the weights are."""
        parameters = dict(self.model.named_parameters())
        moments = {
            name: torch.zeros_like(parameters[name.removeprefix(OPTIMIZER).rpartition(".")[0]].detach())
            if shape
            else torch.zeros((), device=self.runtime.device)
            for name, shape in shards.shapes(path).items()
            if name.startswith(OPTIMIZER)
        }
        shards.load(path, self.weights() | moments)
        return {name.removeprefix(OPTIMIZER): tensor for name, tensor in moments.items()}
