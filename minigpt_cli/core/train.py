"""The training loop: the order of steps, evaluations and checkpoints. It knows neither YAML nor a terminal.

What a step does depends only on the weights, the optimizer's state, and (seed, step): so a run can be stopped, resumed,
evaluated or sampled at any moment without changing what is learned.
"""

from __future__ import annotations

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
from minigpt_cli.core.checkpoint import MODEL, Checkpoint, Progress
from minigpt_cli.core.config import Config
from minigpt_cli.core.dataset import Batches, Dataset, resident_bytes
from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.evaluate import evaluate
from minigpt_cli.core.generate import Sampling, generate
from minigpt_cli.core.metrics import Listener, Record, read_metrics
from minigpt_cli.core.model import GPT, empty_model, initial_weights, lm_loss
from minigpt_cli.core.optim import learning_rate_at, set_learning_rate
from minigpt_cli.core.run import BackgroundSaver, RunFolder
from minigpt_cli.core.runtime import DTYPES, Runtime, memory_advice, peak_flops, seed_everything, system_figures
from minigpt_cli.core.sharding import like, shard
from minigpt_cli.core.state import TrainState
from minigpt_cli.core.step import Statistics, TrainStep
from minigpt_cli.core.tokenizer import Tokenizer, from_json

SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class Result:
    """How a run ended. `reason`: finished | patience | time | stopped | complete (there was nothing left to do)."""

    reason: str
    progress: Progress
    epochs: float  # passes over the data; after a change of data, over the new data
    best: Path | None
    last: Path
    fine_tuned: bool = False  # it began with weights from elsewhere

    @classmethod
    def of(cls, reason: str, progress: Progress, dataset: Dataset, folder: RunFolder, *, fine_tuned: bool) -> Result:
        """With what lies in the folder by now."""
        epochs = (progress.tokens_seen - progress.data_tokens) / len(dataset.train)
        last = folder.newest_of("last") or folder.last
        return cls(reason, progress, epochs, folder.newest_of("best"), last, fine_tuned)

    @property
    def metrics(self) -> list[Record]:
        """What metrics.jsonl holds: a mapping for each logged step, each evaluation and each sample."""
        return read_metrics(self.last.parent / "metrics.jsonl")


def train(
    config: Config, dataset: Dataset, folder: RunFolder, runtime: Runtime, listeners: Sequence[Listener], *,
    resume: Checkpoint | None = None, stop: Callable[[], object] = lambda: None, began: float | None = None,
) -> Result:  # fmt: skip
    """Train until `max_iters`, `max_minutes`, `patience` or `stop()` says so, and leave the run in `folder`.

    `stop` is asked after every step, by several ranks about twice a second; when it answers with something true the run
    saves and returns. `began` (of `time.perf_counter`) is when the run's time starts to count, now if None. Raises
    MinigptError when the loss or the gradient is not finite, or when a checkpoint cannot be written.
    """
    with memory_advice(config.train, runtime.device, runtime.world.size), freed_memory_kept():
        trainer = Trainer(config, dataset, folder, runtime, listeners, resume, stop, began)
        try:
            reason = trainer.run()
        finally:
            trainer.saver.close()
    return Result.of(reason, trainer.progress, dataset, folder, fine_tuned=trainer.origin is not None)


class Trainer:
    """The state of a run: model, optimizer, scaler, progress, and the loop over them."""

    def __init__(
        self, config: Config, dataset: Dataset, folder: RunFolder, runtime: Runtime, listeners: Sequence[Listener],
        resume: Checkpoint | None, stop: Callable[[], object], began: float | None = None,
    ) -> None:  # fmt: skip
        self.config, self.dataset, self.folder, self.runtime = config, dataset, folder, runtime
        self.world = runtime.world
        self.listeners = listeners if self.world.leads else []
        self.started = began if began is not None else time.perf_counter()
        self.asked_to_stop = stop
        self.ask_every = 1  # steps between two times that ranks agree on stopping; see `_ask`
        self.pieces = config.train.pieces(self.world.size)
        checkpoint.require_storable(dataset.meta.tokenizer)
        self.tokenizer: Tokenizer = from_json(dataset.meta.tokenizer)
        self.progress = progress_of(resume, dataset, runtime)
        self.batches = Batches(
            dataset.train, config.model.block_size, config.train.batch_size,
            seed=config.train.seed, sampling=config.data.sampling, device=runtime.device,
            rows=self.world.share(config.train.batch_size),
            vocab_size=self.tokenizer.vocab_size, resident_bytes=resident_bytes(runtime.memory_bytes),
            shift=self.progress.sequences(config.model.block_size) - self.progress.step * config.train.batch_size,
        )  # fmt: skip
        model = make_model(config, self.tokenizer.vocab_size, runtime, resume.part(MODEL) if resume else None)
        self.state = TrainState(model, config.train, runtime, resume)
        self.model, self.optimizer = model, self.state.optimizer
        self.scaler = runtime.scaler()
        if self.progress.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(self.progress.scaler)
        self.statistics = Statistics.zeros(runtime.device)
        self.statistics.loss_sum.fill_(self.progress.loss_sum)
        example_BT = self.batches.in_pieces(self.progress.step, self.pieces)[0][0]
        note = runtime.wrap(self.model, self.model.blocks, example_BT)
        if note:
            self._note(note)
        self.train_step = TrainStep(
            self.model, self.optimizer, self.scaler, config, runtime, self.statistics, self._note
        )
        self.saver = BackgroundSaver(self._saved)
        self.saved_at, self.unsaved = -1, False  # the step of `last`; whether more is known of that step by now
        if resume and resume.path.parent == folder.path and resume.path.name.startswith("last"):
            self.saved_at = self.progress.step
            self.unsaved = resume.header.dataset_fingerprint != dataset.meta.fingerprint
        self.origin = resume.header.initialised_from if resume else None
        self.started -= self.progress.seconds
        self.saved_time = time.perf_counter()

    def run(self) -> str:
        """The order of things. Returns the reason it ended."""
        train, progress = self.config.train, self.progress
        self._catch_up()
        log_from = (progress.step, time.perf_counter())  # tokens/s are counted over steps, not over evaluations
        while (reason := self._reason_to_end()) is None:
            self._step()
            self.saver.poll()
            if progress.step % train.log_interval == 0 or progress.step == train.steps:
                log_from = self._log(log_from)
            samples = train.sample_interval is not None and progress.step % train.sample_interval == 0
            evaluates, numbered = (progress.step % n == 0 for n in (train.eval_interval, train.checkpoint_interval))
            saves = numbered or self._time_to_save()
            if samples or evaluates or saves:
                self.runtime.synchronize()  # steps that the device has yet to do are no part of the pause
                pause = time.perf_counter()
                if samples:
                    self._sample()
                if saves:
                    self._save(last=True, numbered=numbered)
                if evaluates:
                    self._evaluate()
                log_from = (log_from[0], log_from[1] + time.perf_counter() - pause)
            self._tell(lambda listener: listener.progress(progress.step))
        if reason != "stopped" and progress.evaluated_at < progress.step:
            self._evaluate(scheduled=False)
            reason = reason if progress.evaluated_at == progress.step else "stopped"
        if self.saved_at < progress.step or self.unsaved:
            self._save(last=True, numbered=True)
        self.saver.wait()
        return reason

    def _catch_up(self) -> None:
        """Make up for an evaluation that the run was stopped before, and find the loss to beat on data new to it."""
        progress = self.progress
        if progress.val_loss is None and (self.origin is not None or progress.data_step > 0):
            self._evaluate(scheduled=False)
        elif progress.evaluated_at < progress.step and progress.step % self.config.train.eval_interval == 0:
            self._evaluate()

    def _time_to_save(self) -> bool:
        """Whether `checkpoint_minutes` have passed since the last save.

        Several ranks must agree on it, and do so only at the steps that are logged: an exchange costs time.
        """
        train = self.config.train
        if train.checkpoint_minutes is None or (self.world.size > 1 and self.progress.step % train.log_interval):
            return False
        return self.world.any(time.perf_counter() - self.saved_time >= 60 * train.checkpoint_minutes)

    def _reason_to_end(self) -> str | None:
        train, progress = self.config.train, self.progress
        if progress.step >= train.steps:
            return "finished"
        if (asked := self._ask()) == "stopped":
            return asked
        if train.patience is not None and progress.worse >= train.patience:
            return "patience"
        return asked

    def _ask(self) -> str | None:
        """Whether a rank was asked to stop, or has used up `max_minutes`. All ranks get the same answer. A run takes at
        least one step, even if compiling took all its time.

        To agree takes an exchange, which would be felt at every short step: it happens about twice a second.
        """
        if self.world.size > 1 and self.progress.step % self.ask_every:
            return None
        limit = self.config.train.max_minutes
        late = limit is not None and self.progress.step > 0 and self._seconds() >= 60 * limit
        return (None, "time", "stopped")[self.world.largest(2 if self.asked_to_stop() else int(late))]

    def _step(self) -> None:
        step, train = self.progress.step, self.config.train
        set_learning_rate(self.optimizer, learning_rate_at(step, train) / train.learning_rate)
        self.train_step(self.batches.in_pieces(step, self.pieces), step)
        if self.state.average is not None:
            self.state.average.update(step)
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
        steps_per_second = (progress.step - log_from[0]) / (now - log_from[1])
        self.ask_every = -self.world.largest(-max(1, min(train.log_interval, int(steps_per_second / 2))))
        tokens_per_second = steps_per_second * train.batch_size * self.config.model.block_size
        self._record(
            train_loss=loss,
            lr=learning_rate_at(progress.step - 1, train),
            grad_norm=self.statistics.grad_norm.item(),
            tokens_per_second=tokens_per_second,
            **self._utilisation(tokens_per_second),
            **system_figures(self.runtime.device),
        )
        return progress.step, now

    def _utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B): the share of the devices' peak that the matrix
        products of the model take. Nothing where the peak is not known."""
        peak = peak_flops(self.runtime.device)
        return {"mfu": tokens_per_second * self.model.flops_per_token() / (peak * self.world.size)} if peak else {}

    def _loss_sum(self) -> float:
        """Of the steps since the last log, each step's mean over all ranks."""
        return self.world.total(self.statistics.loss_sum).item() / self.world.size

    def _evaluate(self, *, scheduled: bool = True) -> None:
        """Score the validation split, and save `best` if no evaluation of this run was better.

        It may take long, so the steps before it are saved first if it ends the run, or if there is no `last` of this
        data yet: a `best` is never without one. Patience counts only what `eval_interval` scheduled, so that ending
        early and going on changes nothing.
        """
        progress = self.progress
        other_data = self.unsaved and self.saved_at == progress.step  # and `last` does not say so yet
        if self.saved_at < 0 or other_data or (not scheduled and self.saved_at < progress.step):
            self._save(last=True)
        self._check_finite()
        with self.state.averaged(), self.runtime.uncompiled():
            score = evaluate(self.model, self.dataset.val, self.runtime, stop=self._poll)
        if score is None:  # asked to stop; the evaluation is made up for when the run is resumed
            return
        if not math.isfinite(score.loss):
            raise self._diverged(progress.step)
        progress.val_loss, progress.evaluated_at, self.unsaved = score.loss, progress.step, True
        self._record(val_loss=score.loss, val_standard_error=score.standard_error)
        if scheduled and (progress.patience_loss is None or score.loss < progress.patience_loss):
            progress.patience_loss, progress.worse = score.loss, 0
        elif scheduled:
            progress.worse += 1
        if progress.best_loss is None or score.loss < progress.best_loss:
            progress.best_loss, progress.best_step = score.loss, progress.step
            self._save(best=True)

    def _poll(self) -> bool:
        """Between two batches of an evaluation: tell of what was saved meanwhile, and whether to stop."""
        self.saver.poll()
        return self.world.any(self.asked_to_stop())

    def _sample(self) -> None:
        if not self.world.leads and self.runtime.parallel != "fsdp":  # a sliced model takes every rank to run
            return
        generator = torch.Generator(self.runtime.device).manual_seed(self.config.train.seed)
        prompt = torch.tensor([[self.tokenizer.end_of_text or 0]], device=self.runtime.device)
        with self.state.averaged(), self.runtime.uncompiled(), self.runtime.autocast():
            ids = [
                int(ids_B) for ids_B, _ in generate(self.model, prompt, SAMPLE_TOKENS, Sampling(), generator=generator)
            ]
        self.model.train()
        self._tell(lambda listener: listener.sample(self.progress.step, self.tokenizer.decode(ids)))

    def _save(self, *, last: bool = False, best: bool = False, numbered: bool = False) -> None:
        """Save everything as `last`, or the model as `best`; `numbered`: with a snapshot, if the run keeps them."""
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
            "weights": "trained" if self.state.average is None else "averaged", "initialised_from": self.origin,
        }  # fmt: skip
        same_step = self.saved_at == progress.step
        if last:
            self.saved_at, self.saved_time, self.unsaved = progress.step, time.perf_counter(), False
        if self.config.runtime.checkpoints == "sharded":
            self._save_shards("best" if best else "last", header, same_step=last and same_step)
            return
        with self.state.averaged():
            tensors = self.state.to_host(self.state.weights())
        if last:
            tensors |= self.state.to_host(self.state.moments())
        paths = [folder.last, *([folder.snapshot(progress.step)] if numbered and self.config.train.keep else [])]
        if self.world.leads:  # a background thread writes the copies
            self.saver.submit([(path, tensors) for path in (paths if last else [folder.best])], header)

    def _save_shards(self, kind: str, header: dict[str, Any], *, same_step: bool) -> None:
        """Every rank writes its slices; what they replace goes when they are whole.

        `same_step`: `last` holds these very tensors, so only its header is new.
        """
        path = self.folder.sharded(kind, self.progress.step)
        if same_step and self.world.any(self.world.leads and path.exists()):
            shards.replace_header(path, header, self.world)
        else:
            self.state.save_shards(path, header, optimizer=kind == "last")
        if self.world.leads:
            self._saved(path, self.progress.step)

    def _saved(self, path: Path, step: int) -> None:
        """A checkpoint is on the disk: now what it replaces may go."""
        for kind in ("last", "best"):
            if path in (self.folder.path / f"{kind}.safetensors", self.folder.sharded(kind, step)):
                self.folder.drop(kind, keep=path)
        self.folder.drop_old()
        if self.config.train.keep:
            for old in self.folder.snapshots()[: -self.config.train.keep]:
                old.unlink(missing_ok=True)
        self._tell(lambda listener: listener.saved(path, step))

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
        last = self.folder.newest_of("last")
        kept = f"{last} is kept" if last is not None else "no checkpoint was written"
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
        if progress.data_step:
            record["data_step"] = progress.data_step  # figures on other data than those before it
        self._tell(lambda listener: listener.log(record))

    def _note(self, message: str) -> None:
        self._tell(lambda listener: listener.note(message))

    def _tell(self, what: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            what(listener)

    def _seconds(self) -> float:
        return time.perf_counter() - self.started


def progress_of(resume: Checkpoint | None, dataset: Dataset, runtime: Runtime) -> Progress:
    """Where the run stands. On other data than before, everything that was measured on the old data starts again."""
    before = resume.header.progress if resume is not None else Progress()
    compiled = runtime.compile if runtime.device.type == "cuda" else None  # elsewhere it never is by itself
    progress = before.model_copy(update={"precision": runtime.precision, "compile": compiled})
    if resume is None:
        return progress
    return progress if resume.header.dataset_fingerprint == dataset.meta.fingerprint else progress.on_other_data()


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
