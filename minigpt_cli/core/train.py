"""The training loop: the order of steps, evaluations and checkpoints. It knows neither YAML nor a terminal.

What a step does depends only on the weights, the optimizer's state, and (seed, step): so a run can be stopped, resumed,
evaluated or sampled at any moment without changing what is learned.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core import checkpoint, shards
from minigpt_cli.core.allocator import freed_memory_kept
from minigpt_cli.core.checkpoint import MODEL, OPTIMIZER, SHARDED, Checkpoint, Progress
from minigpt_cli.core.config import Config
from minigpt_cli.core.dataset import Batches, Dataset
from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.evaluate import evaluate
from minigpt_cli.core.generate import Sampling, generate
from minigpt_cli.core.metrics import Listener, Record, read_metrics
from minigpt_cli.core.model import GPT, empty_model, initial_weights, lm_loss
from minigpt_cli.core.optim import WeightAverage, learning_rate_at, make_optimizer, set_learning_rate
from minigpt_cli.core.run import BackgroundSaver, RunFolder
from minigpt_cli.core.runtime import DTYPES, Runtime, memory_advice, seed_everything, system_figures
from minigpt_cli.core.sharding import like, shard, whole
from minigpt_cli.core.step import Statistics, TrainStep
from minigpt_cli.core.tokenizer import Tokenizer, from_json

SAMPLE_TOKENS = 200
TRAINED = "trained"  # the optimizer's name for weights of which the model holds the average


@dataclass(frozen=True)
class Result:
    """How a run ended. `reason`: finished | patience | time | stopped | complete (there was nothing left to do)."""

    reason: str
    progress: Progress
    epochs: float
    best: Path | None
    last: Path
    fine_tuned: bool = False  # it began with weights from elsewhere

    @classmethod
    def of(cls, reason: str, progress: Progress, dataset: Dataset, folder: RunFolder, *, fine_tuned: bool) -> Result:
        """With what lies in the folder by now."""
        best = next((path for path in (folder.best, *folder.shards("best")) if path.exists()), None)
        last = next(iter(folder.shards("last")), folder.last)
        return cls(reason, progress, progress.tokens_seen / len(dataset.train), best, last, fine_tuned)

    @property
    def metrics(self) -> list[Record]:
        """What metrics.jsonl holds: a mapping for each logged step, each evaluation and each sample."""
        return read_metrics(self.last.parent / "metrics.jsonl")


def train(
    config: Config, dataset: Dataset, folder: RunFolder, runtime: Runtime, listeners: Sequence[Listener], *,
    resume: Checkpoint | None = None, stop: Callable[[], object] = lambda: None,
) -> Result:  # fmt: skip
    """Train until `max_iters`, `max_minutes`, `patience` or `stop()` says so, and leave the run in `folder`.

    `stop` is asked after every step; when it answers with something true the run saves and returns. Raises
    MinigptError when the loss or the gradient is not finite, or when a checkpoint cannot be written.
    """
    with memory_advice(config.train, runtime.device, runtime.world.size), freed_memory_kept():
        trainer = Trainer(config, dataset, folder, runtime, listeners, resume, stop)
        try:
            reason = trainer.run()
        finally:
            trainer.saver.close()
    return Result.of(reason, trainer.progress, dataset, folder, fine_tuned=trainer.origin is not None)


class Trainer:
    """The state of a run: model, optimizer, scaler, progress, and the loop over them."""

    def __init__(
        self, config: Config, dataset: Dataset, folder: RunFolder, runtime: Runtime, listeners: Sequence[Listener],
        resume: Checkpoint | None, stop: Callable[[], object],
    ) -> None:  # fmt: skip
        self.config, self.dataset, self.folder, self.runtime = config, dataset, folder, runtime
        self.world = runtime.world
        self.listeners = listeners if self.world.leads else []
        self.stop = lambda: self.world.any(stop())  # all ranks stop at the same step
        self.pieces = config.train.pieces(self.world.size)
        checkpoint.require_storable(dataset.meta.tokenizer)
        self.tokenizer: Tokenizer = from_json(dataset.meta.tokenizer)
        self.batches = Batches(
            dataset.train, config.model.block_size, config.train.batch_size,
            seed=config.train.seed, sampling=config.data.sampling, device=runtime.device,
            rows=self.world.share(config.train.batch_size),
            vocab_size=self.tokenizer.vocab_size,
        )  # fmt: skip
        self.model = make_model(config, self.tokenizer.vocab_size, runtime, resume.part(MODEL) if resume else None)
        self.optimizer = make_optimizer(self.model, config.train, runtime.update_dtype)
        self.scaler = runtime.scaler()
        self.statistics = Statistics.zeros(runtime.device)
        moments: Mapping[str, Tensor] = {}
        if resume:
            moments = self._read_shards(resume.path) if resume.path.suffix == SHARDED else resume.part(OPTIMIZER)
        self.average: WeightAverage | None = None  # of the weights, which is what `model` is judged and kept by
        if config.train.ema is not None:
            self.average = WeightAverage(self.model, config.train.ema)
        self.progress = Progress(precision=runtime.precision)
        if resume:
            self._restore(resume, moments)
        example_BT = self.batches.in_pieces(0, self.pieces)[0][0]
        note = runtime.wrap(self.model, self.model.blocks, example_BT)
        if note:
            self._note(note)
        self.train_step = TrainStep(
            self.model, self.optimizer, self.scaler, config, runtime, self.statistics, self._note
        )
        self.saver = BackgroundSaver(self._saved)
        self.saved_at = self.progress.step or -1
        self.origin = resume.header.initialised_from if resume else None
        self.started = time.perf_counter() - self.progress.seconds

    def run(self) -> str:
        """The order of things. Returns the reason it ended."""
        train, progress = self.config.train, self.progress
        log_from = (progress.step, time.perf_counter())  # tokens/s are counted over steps, not over evaluations
        if progress.step and progress.step % train.eval_interval == 0 and progress.evaluated_at < progress.step:
            better = self._evaluate()  # the run was stopped between this step and its evaluation
            self._save(last=progress.evaluated_at == progress.step, best=better)
        if self.origin is not None and progress.val_loss is None:  # fine-tuning: the loss to beat
            self._save(last=False, best=self._evaluate(scheduled=False))
        while (reason := self._reason_to_end()) is None:
            self._step()
            self.saver.poll()
            if progress.step % train.log_interval == 0 or progress.step == train.steps:
                log_from = self._log(log_from)
            if not self.stop():
                pause = time.perf_counter()
                better = progress.step % train.eval_interval == 0 and self._evaluate()
                if train.sample_interval and progress.step % train.sample_interval == 0:
                    self._sample()
                self._save(last=progress.step % train.checkpoint_interval == 0, best=better)
                log_from = (log_from[0], log_from[1] + time.perf_counter() - pause)
            self._tell(lambda listener: listener.progress(progress.step))
        if reason != "stopped" and progress.evaluated_at < progress.step:
            better = self._evaluate(scheduled=False)
            reason = reason if progress.evaluated_at == progress.step else "stopped"
            self._save(last=True, best=better)
        self._save(last=self.saved_at < progress.step, best=False)
        self.saver.wait()
        return reason

    def _reason_to_end(self) -> str | None:
        train, progress = self.config.train, self.progress
        if progress.step >= train.steps:
            return "finished"
        if self.stop():
            return "stopped"
        if train.patience is not None and progress.worse >= train.patience:
            return "patience"
        if train.max_minutes is not None and self.world.any(self._seconds() >= 60 * train.max_minutes):
            return "time"
        return None

    def _step(self) -> None:
        step, train = self.progress.step, self.config.train
        set_learning_rate(self.optimizer, learning_rate_at(step, train) / train.learning_rate)
        self.train_step(self.batches.in_pieces(step, self.pieces), step)
        if self.average is not None:
            self.average.update(step)
        self.progress.step = step + 1
        self.progress.tokens_seen += train.batch_size * self.config.model.block_size

    def _log(self, log_from: tuple[int, float]) -> tuple[int, float]:
        """One record of the steps since the last. Here the host waits for the device.

        At the very end it may come between two intervals; then it leaves the running mean alone, so that a longer run
        that goes on from here logs what it would have logged.
        """
        progress, train = self.progress, self.config.train
        self._check_finite()
        loss = self._loss_sum() / (progress.step - progress.logged_at)
        if progress.step % train.log_interval == 0:
            self.statistics.loss_sum.zero_()
            progress.logged_at = progress.step
        now = time.perf_counter()
        tokens = (progress.step - log_from[0]) * train.batch_size * self.config.model.block_size
        self._record(
            train_loss=loss,
            lr=learning_rate_at(progress.step - 1, train),
            tokens_per_second=tokens / (now - log_from[1]),
            **system_figures(self.runtime.device),
        )
        return progress.step, now

    def _loss_sum(self) -> float:
        """Of the steps since the last log, each step's mean over all ranks."""
        return self.world.total(self.statistics.loss_sum).item() / self.world.size

    def _evaluate(self, *, scheduled: bool = True) -> bool:
        """Score the validation split; true if no evaluation of this run was better.

        Patience counts only what `eval_interval` scheduled, so that ending early and going on changes nothing.
        """
        progress = self.progress
        self._check_finite()
        with self._averaged(), self.runtime.uncompiled():
            score = evaluate(self.model, self.dataset.val, self.runtime, stop=self.stop)
        if score is None:  # asked to stop; the evaluation is made up for when the run is resumed
            return False
        if not math.isfinite(score.loss):
            raise self._diverged(progress.step)
        progress.val_loss, progress.evaluated_at = score.loss, progress.step
        self._record(val_loss=score.loss, val_standard_error=score.standard_error)
        if scheduled and (progress.patience_loss is None or score.loss < progress.patience_loss):
            progress.patience_loss, progress.worse = score.loss, 0
        elif scheduled:
            progress.worse += 1
        if progress.best_loss is not None and score.loss >= progress.best_loss:
            return False
        progress.best_loss, progress.best_step = score.loss, progress.step
        return True

    def _sample(self) -> None:
        if not self.world.leads and self.runtime.parallel != "fsdp":  # a sliced model takes every rank to run
            return
        generator = torch.Generator(self.runtime.device).manual_seed(self.config.train.seed)
        prompt = torch.tensor([[self.tokenizer.end_of_text or 0]], device=self.runtime.device)
        with self._averaged(), self.runtime.uncompiled(), self.runtime.autocast():
            ids = [
                int(ids_B) for ids_B, _ in generate(self.model, prompt, SAMPLE_TOKENS, Sampling(), generator=generator)
            ]
        self.model.train()
        self._tell(lambda listener: listener.sample(self.progress.step, self.tokenizer.decode(ids)))

    def _save(self, *, last: bool, best: bool) -> None:
        """Hand copies of the state to the background thread: everything for `last`, the model only for `best`."""
        if not (last or best):
            return
        self._check_finite()
        progress, folder = self.progress, self.folder
        if progress.evaluated_at < progress.step:
            self._check_weights()
        progress.loss_sum, progress.seconds = self._loss_sum(), self._seconds()
        progress.scaler = self.scaler.state_dict()
        header = {
            "config": self.config.model_dump(), "tokenizer": self.dataset.meta.tokenizer, "step": progress.step,
            "tokens_seen": progress.tokens_seen,
            "val_loss": progress.val_loss if progress.evaluated_at == progress.step else None,
            "dataset_fingerprint": self.dataset.meta.fingerprint, "progress": progress.model_copy(),
            "weights": "trained" if self.average is None else "averaged", "initialised_from": self.origin,
        }  # fmt: skip
        if last:
            self.saved_at = progress.step
        if self.config.runtime.checkpoints == "sharded":
            self._save_shards(header, last=last, best=best)
            return
        with self._averaged():
            weights = self._to_host(self._weights())
        files = [(folder.best, weights)] if best else []
        if last:
            moments = self._to_host(self._moments())
            paths = [folder.last, *([folder.snapshot(progress.step)] if self.config.train.keep else [])]
            files += [(path, weights | moments) for path in paths]
        if self.world.leads:
            self.saver.submit(files, header)

    def _save_shards(self, header: dict[str, Any], *, last: bool, best: bool) -> None:
        """Every rank writes its slices, while training waits; what they replace goes when they are whole."""
        for kind in (["best"] if best else []) + (["last"] if last else []):
            path = self.folder.sharded(kind, self.progress.step)
            if path.exists():  # stopped right after it was written
                continue
            moments = self._moments() if kind == "last" else {}
            moments = {name: m.clone() if name.endswith(TRAINED) else m for name, m in moments.items()}
            with self._averaged():
                shards.save(path, self._weights() | moments, header, self.world)
            if self.world.leads:
                self.folder.drop(kind, keep=path)
                self.folder.settle()
                self._tell(lambda listener, path=path: listener.saved(path, self.progress.step))  # type: ignore[misc]

    def _weights(self) -> dict[str, Tensor]:
        return {MODEL + name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors; and the weights that training goes on with, where the model keeps averages."""
        moments = {
            f"{OPTIMIZER}{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        if self.average is not None:
            moments |= {f"{OPTIMIZER}{name}.{TRAINED}": p.detach() for name, p in self.model.named_parameters()}
        return moments

    def _to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU of rank 0; nothing elsewhere. Slices are gathered one tensor at a time."""
        copies = {}
        for name, tensor in tensors.items():
            tensor = whole(tensor.detach())
            if self.world.leads:
                copies[name] = tensor.to("cpu", copy=True)
        return copies

    def _saved(self, path: Path, step: int) -> None:
        if path == self.folder.last:
            self.folder.drop("last", keep=path)  # shards of an earlier session
            self.folder.settle()  # what --overwrite set aside may go now
        if path == self.folder.best:
            self.folder.drop("best", keep=path)
        if self.config.train.keep:
            for old in self.folder.snapshots()[: -self.config.train.keep]:
                old.unlink(missing_ok=True)
        self._tell(lambda listener: listener.saved(path, step))

    def _restore(self, saved: Checkpoint, moments: Mapping[str, Tensor]) -> None:
        self.progress = saved.header.progress.model_copy(update={"precision": self.runtime.precision})
        self.statistics.loss_sum.fill_(self.progress.loss_sum)
        parameters = dict(self.model.named_parameters())
        for name, tensor in moments.items():
            name, _, key = name.rpartition(".")
            parameter = parameters[name]
            if key == TRAINED:
                parameter.data.copy_(like(tensor, parameter.data))
            else:  # a moment, or a count of steps
                value = like(tensor, parameter.data) if tensor.ndim else tensor.to(self.runtime.device)
                self.optimizer.state[parameter][key] = value
        if self.progress.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(self.progress.scaler)

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
        shards.load(path, self._weights() | moments)
        return {name.removeprefix(OPTIMIZER): tensor for name, tensor in moments.items()}

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the model holds the weights that it is judged by."""
        return self.average.swapped() if self.average is not None else contextlib.nullcontext()

    def _check_finite(self) -> None:
        if (step := self.world.largest(int(self.statistics.failed_at))) >= 0:
            raise self._diverged(step)

    def _check_weights(self) -> None:
        """Before weights that no evaluation has seen replace a good checkpoint: do they still give a finite loss?"""
        x, y = self.batches.at(self.progress.step, slice(0, 1))
        self.model.eval()
        with torch.no_grad(), self.runtime.uncompiled(), self.runtime.autocast():
            finite = bool(torch.isfinite(lm_loss(self.model(x), y)))
        self.model.train()
        if not finite:
            raise self._diverged(self.progress.step)

    def _diverged(self, step: int) -> MinigptError:
        self.saver.wait()
        kept = f"{self.folder.last} is as it was" if self.folder.last.exists() else "no checkpoint was written"
        error = MinigptError(
            f"the loss or its gradient is not finite at step {step}; {kept}. "
            f"Lower train.learning_rate (now {self.config.train.learning_rate:g}), add train.warmup_iters, "
            "or set train.grad_clip=1.0"
        )
        return self.world.everyones(error)

    def _record(self, **values: float) -> None:
        progress = self.progress
        seconds = round(self._seconds(), 3)
        record = {"step": progress.step, "tokens_seen": progress.tokens_seen, **values, "seconds": seconds}
        self._tell(lambda listener: listener.log(record))

    def _note(self, message: str) -> None:
        self._tell(lambda listener: listener.note(message))

    def _tell(self, what: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            what(listener)

    def _seconds(self) -> float:
        return time.perf_counter() - self.started


def make_model(config: Config, vocab_size: int, runtime: Runtime, weights: Mapping[str, Tensor] | None = None) -> GPT:
    """The model where it will be trained: with `weights` (whole, by name), or as `train.seed` draws them.

    They are drawn on the CPU, so that every device starts from the same. A sliced model is never whole in memory.
    """
    seed_everything(config.train.seed)
    if weights is None and runtime.parallel != "fsdp":
        model = GPT(config.model, vocab_size).to(runtime.device)
    else:
        model = empty_model(config.model, vocab_size)
        if runtime.parallel == "fsdp":
            shard(model, model.blocks, runtime.device, DTYPES[runtime.precision])
        model.to_empty(device=runtime.device)
        if config.model.tie_weights:
            model.head.weight = model.token_embedding.weight
        with torch.no_grad():
            for name, weight in initial_weights(model) if weights is None else weights.items():
                model.get_parameter(name).copy_(like(weight, model.get_parameter(name)))
    model.checkpoint_activations = runtime.checkpoint_activations
    return model
