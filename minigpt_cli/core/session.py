"""One session of training: settings whose every choice is made, a folder that is ours, then `train`. Knows no terminal.

What the command `minigpt train` and the Python interface have in common.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt_cli.core import checkpoint
from minigpt_cli.core.checkpoint import Checkpoint, Progress
from minigpt_cli.core.config import Config, load_config
from minigpt_cli.core.dataset import Dataset, require_known_tokens, require_window
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import atomic_write
from minigpt_cli.core.metrics import JsonLines, Listener, plot_losses
from minigpt_cli.core.model import empty_model
from minigpt_cli.core.optim import resolved
from minigpt_cli.core.run import RunFolder, check_resumable, open_run
from minigpt_cli.core.runtime import Runtime, Workload, choose_runtime
from minigpt_cli.core.shards import open_sharded
from minigpt_cli.core.start import require_tokenizer_of, starting_point, with_model_of
from minigpt_cli.core.tokenizer import from_json
from minigpt_cli.core.train import Result, train
from minigpt_cli.core.verdict import advice
from minigpt_cli.core.world import World

Note = Callable[[str], object]


@dataclass(frozen=True)
class Job:
    """What to train: resolved settings, the data that they name, and who does it."""

    config: Config
    dataset: Dataset
    vocab_size: int
    world: World
    start: Checkpoint | None = None  # the weights that a new run begins with; drawn if None
    began: float | None = None  # when the work began, by `time.perf_counter`: from here on the run's time counts

    def runtime(self, saved: Checkpoint | None = None) -> Runtime:
        """The machine's part of it. Raises UserError where the settings ask for what this machine has not."""
        config, model, train, world = self.config.runtime, self.config.model, self.config.train, self.world
        with world.together():
            pieces = train.pieces(world.size)
        gpt = empty_model(model, self.vocab_size)
        flops = gpt.flops_per_token() * train.batch_size * model.block_size // world.size
        steps = train.steps - (saved.header.step if saved else 0)
        workload = Workload(steps, model.n_layer, flops, gpt.parameter_counts()["total"])
        width, rows = model.n_embd, train.batch_size // (world.size * pieces) * model.block_size
        before = saved.header.progress if saved is not None else Progress()
        return choose_runtime(
            config, width=width, rows=rows, workload=workload, world=world,
            before=before.precision if saved is not None else None, compiled_before=before.compile,
        )  # fmt: skip

    def advice(self) -> str | None:
        """What does not suit the text, in a sentence. The rules are for weights drawn anew: to others, nothing."""
        if self.start is not None:
            return None
        return advice(self.config, len(self.dataset.train), self.n_parameters)

    @property
    def n_parameters(self) -> int:
        return _n_parameters(self.config, self.vocab_size)


def settings_of(config: str | None, overrides: Sequence[tuple[str, Any]]) -> Config:
    """The settings by name. `config` None: those of the run in `out_dir`. Raises UserError."""
    if config is not None:
        return load_config(config, overrides)
    out_dir = load_config(None, [(key, value) for key, value in overrides if key == "out_dir"]).out_dir
    file = Path(out_dir, "config.yaml")
    if not file.is_file():
        raise UserError(f"{file.parent}: no run to resume (there is no config.yaml); start one with --config")
    return load_config(str(file), [("out_dir", out_dir), *overrides])


def make_job(
    config: str | None, overrides: Sequence[tuple[str, Any]], world: World, note: Note, *,
    weights: Callable[[], Checkpoint] | None = None, resume: bool = False,
) -> Job:  # fmt: skip
    """Settings and data by name. `config` None: those of the run in `out_dir`, which is to be resumed.

    `weights` reads what a new run begins with, which brings its own model; a run that is resumed has its own. Raises
    UserError for settings or data that will not do, or are not the same for all ranks; nothing is written.
    """
    began = time.perf_counter()
    with world.together():
        chosen, source = settings_of(config, overrides), None
        if weights is not None and resume:
            chosen = with_model_of(chosen, settings_of(None, [("out_dir", chosen.out_dir)]).model, chosen.out_dir)
        elif weights is not None:
            source = weights()
            chosen = with_model_of(chosen, source.config.model, str(source.path))
        dataset = Dataset(chosen.data.path)
        if source is not None:
            require_tokenizer_of(source, dataset)
        require_window(dataset.train, chosen.model.block_size)
        vocab_size = from_json(dataset.meta.tokenizer).vocab_size
        for split in (dataset.train, dataset.val):
            require_known_tokens(split, vocab_size, dataset.folder)
        chosen = _resolved(chosen, dataset, vocab_size, note)
    with world.together():
        settings = {
            f"{s}.{k}": v for s, keys in chosen.model_dump(exclude={"out_dir"}).items() for k, v in keys.items()
        }
        world.require_same({"the data's fingerprint": dataset.meta.fingerprint, **settings})
    start = starting_point(source, chosen) if source is not None else None
    return Job(chosen, dataset, vocab_size, world, start, began)


def run_session(
    job: Job, *, resume: bool, overwrite: bool, allow_data_change: bool, stop: Callable[[], object], note: Note,
    begin: Callable[[Runtime], object] = lambda runtime: None,
    listen: Callable[[RunFolder, Checkpoint | None], Sequence[Listener]],
) -> Result:  # fmt: skip
    """Train in the folder that the settings name, and leave there all that a run leaves.

    `begin` is called on every rank before a new run writes anything; `listen` on the one that leads, with the
    checkpoint to resume, if any: it gives those who hear of the run besides metrics.jsonl. Raises UserError for a
    folder that will not do.
    """
    config, world, path = job.config, job.world, Path(job.config.out_dir)
    runtime = job.runtime()  # before the folder is touched: there may be no such device
    with contextlib.ExitStack() as held:
        with world.together():
            if resume and not path.is_dir():
                raise UserError(f"{path}: no run to resume; run without --resume to start")
            folder = held.enter_context(open_run(path)) if world.leads else RunFolder(path)
            saved = None
            if world.leads:
                saved = _where_to_start(config, folder, world, note, resume=resume, overwrite=overwrite)
        saved = _same_for_all(job, saved, note, allow_data_change=allow_data_change)
        evaluated = saved is not None and saved.header.val_loss is not None
        if saved is not None and saved.header.step >= config.train.steps and evaluated:
            note(
                f"{path}: this run is finished (step {saved.header.step:,}); "
                "to go on give it more steps: --resume --set train.max_iters=N"
            )
            fine_tuned = saved.header.initialised_from is not None
            return Result.of("complete", saved.header.progress, job.dataset, folder, fine_tuned=fine_tuned)
        if saved is not None:
            note(f"resuming {saved.path} at step {saved.header.step:,}")
            runtime = job.runtime(saved)
        elif job.start is not None:
            note(f"starting from the weights of {job.start.path}")
        for line in runtime.notes:
            note(line)
        if saved is None:
            if said := job.advice():
                note(said)
            begin(runtime)
        listeners: list[Listener] = []
        try:
            if world.leads:
                if saved is None:
                    folder.set_aside()
                with atomic_write(folder.config) as file:
                    file.write(config.to_yaml().encode())
                if world.launch is not None:
                    folder.launch.write_text(world.launch)
                resume_at = saved.header.step if saved is not None else None
                data_step = saved.header.progress.data_step if saved is not None else 0
                listeners = [JsonLines(folder.metrics, resume_at=resume_at, evaluated=evaluated, data_step=data_step)]
                listeners += listen(folder, saved)
            return train(
                config, job.dataset, folder, runtime, listeners, resume=saved or job.start, stop=stop, began=job.began
            )
        finally:
            for listener in listeners:
                listener.close()
            if world.leads:
                try:
                    plot_losses(folder.metrics, folder.picture)
                except Exception as error:  # a picture is worth no run
                    note(f"{folder.picture}: not drawn: {error}")


def _where_to_start(
    config: Config, folder: RunFolder, world: World, note: Note, *, resume: bool, overwrite: bool
) -> Checkpoint | None:
    """The checkpoint to go on from; None for a new run. Raises UserError where the folder is not free for one."""
    if world.restarts and folder.launch.exists() and folder.launch.read_text() == (world.launch or ""):
        resume, overwrite = folder.has_last(), True  # torchrun started this very run before, and a rank died
    if folder.holds_run() and not (resume or overwrite):
        raise UserError(
            f"{folder.path} already holds a run: --resume goes on with it, --overwrite replaces it, "
            "--out DIR goes elsewhere"
        )
    foreign = folder.config.exists() and not folder.holds_run() and not folder.holds_failure()
    if foreign and folder.config.read_bytes() != config.to_yaml().encode():
        raise UserError(f"{folder.config} is not a run's: it would be replaced; choose another folder with --out")
    if not resume:
        return None
    saved, problems = folder.newest()
    for problem in problems:
        note(problem)
    return saved


def _same_for_all(job: Job, saved: Checkpoint | None, note: Note, *, allow_data_change: bool) -> Checkpoint | None:
    """On every rank the checkpoint that the one which leads has chosen, once it fits the settings and the data."""
    start = job.world.texts(str(saved.path) if saved else "")[0]
    changed: dict[str, tuple[Any, Any]] = {}
    with job.world.together():
        if start and not job.world.leads:
            there = Path(start)
            saved = open_sharded(there, check=False) if there.is_dir() else checkpoint.load(there)
        if saved is not None:
            changed = check_resumable(saved, job.config, job.dataset, allow_data_change=allow_data_change)
    for key, (old, new) in changed.items():
        note(f"changed since the last session: {key}: {old} -> {new}")
    if saved is not None and saved.header.dataset_fingerprint != job.dataset.meta.fingerprint:
        note("other data than before: `best`, patience and passes are counted from here")
    return saved


def _resolved(config: Config, dataset: Dataset, vocab_size: int, note: Note) -> Config:
    if "auto" not in (config.train.max_iters, config.train.weight_decay):
        return config
    n_parameters = _n_parameters(config, vocab_size)
    chosen = resolved(config, len(dataset.train), n_parameters)
    passes = chosen.train.steps * config.train.batch_size * config.model.block_size / len(dataset.train)
    found = [("max_iters", f"{chosen.train.steps:,}"), ("weight_decay", f"{chosen.train.decay_strength:g}")]
    for key, value in found:
        if getattr(config.train, key) == "auto":
            text = f"{len(dataset.train):,} tokens and {passes:.1f} passes over them"
            note(f"{key}: {value}, for {n_parameters:,} parameters, {text}")
    if chosen.train.warmup_iters < config.train.warmup_iters:
        note(f"warmup_iters: {chosen.train.warmup_iters} instead of {config.train.warmup_iters}, for so few steps")
    return chosen


def _n_parameters(config: Config, vocab_size: int) -> int:
    return empty_model(config.model, vocab_size).parameter_counts()["total"]
