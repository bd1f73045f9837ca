"""`minigpt train`: settings -> the engine -> checkpoints, a curve, and a verdict in plain words."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt_cli.commands.console import Debug, note, safe
from minigpt_cli.commands.plan import Asked, plan, show_one_step
from minigpt_cli.core.errors import Stopped, UserError

if TYPE_CHECKING:
    from minigpt_cli.core.checkpoint import Checkpoint
    from minigpt_cli.core.config import Config
    from minigpt_cli.core.dataset import Dataset
    from minigpt_cli.core.run import RunFolder
    from minigpt_cli.core.runtime import Runtime
    from minigpt_cli.core.world import World

PLAN = "Plan before you pay: --dry-run --world-size N"
SLOW_HOURS = 1.0  # from here on, say before starting how long it will take


def train(
    config: Annotated[
        str | None,
        typer.Option("--config", help="A YAML file, or the name of a shipped config: cpu, modern, gpt, gpt2, ..."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one setting: section.key=value. Repeatable.", metavar="K=V"),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="The run folder. [default: the config's out_dir, checkpoints]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, exactly where it was.")
    ] = False,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from",
            metavar="CKPT|DIR",
            help="Start from the weights of a checkpoint, or of a Hugging Face folder; see --config finetune.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    allow_data_change: Annotated[
        bool, typer.Option("--allow-data-change", help="Resume although the dataset is another.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it would cost; one real step; write nothing.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, max=1 << 20, help="How many devices.", rich_help_panel=PLAN)
    ] = None,
    device_name: Annotated[
        str, typer.Option(metavar="NAME", help="Which GPU: H100, A100, 4090, ...", rich_help_panel=PLAN)
    ] = "H100",
    peak_tflops: Annotated[
        float | None, typer.Option(metavar="N", min=0.001, help="Its peak, if not known.", rich_help_panel=PLAN)
    ] = None,
    utilisation: Annotated[
        float, typer.Option(metavar="F", min=0.001, max=1, help="The share of it reached.", rich_help_panel=PLAN)
    ] = 0.4,
    price: Annotated[
        float | None, typer.Option(metavar="P", min=0, help="Of one device for an hour.", rich_help_panel=PLAN)
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(metavar="N", min=2, help="Of a corpus not prepared yet.", rich_help_panel=PLAN)
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", min=2, max=1 << 24, help="Likewise.", rich_help_panel=PLAN)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=PLAN)] = False,
    debug: Debug = False,
) -> None:
    """Train a GPT on a prepared dataset.

    The run folder gets last.safetensors (to resume from), best.safetensors (lowest validation loss), metrics.jsonl,
    loss.png and config.yaml. Ctrl-C saves and prints the command that goes on; a second Ctrl-C leaves at once.

    Several devices share each batch: torchrun --standalone --nproc-per-node 2 -m minigpt_cli train --config gpt

    Example: minigpt train --config cpu --set train.max_iters=500 --out checkpoints/short

    What it would take on 8 GPUs, at once and without any:
    minigpt train --config gpt2 --dry-run --world-size 8 --vocab-size 50257 --tokens 9e9 --price 2.50
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: choose one")
    asked = Asked(world_size or 0, utilisation, price, device_name, peak_tflops, tokens, vocab_size, as_json)
    if world_size is None and asked != Asked(0, 0.4, None, "H100", None, None, None, False):
        raise UserError("the options of a plan go with --dry-run --world-size N")
    if world_size is not None and not dry_run:
        raise UserError("--world-size plans, and goes with --dry-run; to train on several devices start with torchrun")
    from minigpt_cli.core.config import parse_override
    from minigpt_cli.core.world import joined

    overrides = [parse_override(text) for text in settings or []]
    overrides += [("out_dir", out)] if out is not None else []
    overrides += [("runtime.device", device)] if device is not None else []
    if world_size is not None:
        plan(_settings(config, overrides, resume=resume), asked)
        return
    with joined() as world:
        with world.together():
            chosen, dataset, vocab_size, start = _prepared(config, overrides, resume=resume, init_from=init_from)
        with world.together():
            settings_of_rank = {
                f"{s}.{k}": v for s, keys in chosen.model_dump(exclude={"out_dir"}).items() for k, v in keys.items()
            }
            world.require_same({"the data's fingerprint": dataset.meta.fingerprint, **settings_of_rank})
        if dry_run:
            show_one_step(chosen, dataset, vocab_size, _choose_runtime(chosen, None, vocab_size, world))
        else:
            _run(
                chosen,
                dataset,
                vocab_size,
                world,
                start=start,
                resume=resume,
                overwrite=overwrite,
                allow_data_change=allow_data_change,
            )


def _prepared(
    config: str | None, overrides: list[tuple[str, Any]], *, resume: bool, init_from: Path | None
) -> tuple[Config, Dataset, int, Checkpoint | None]:
    """The settings of the run, its data, the size of the vocabulary, and the weights to start from, if any."""
    from minigpt_cli.core.dataset import Dataset, require_known_tokens, require_window
    from minigpt_cli.core.start import require_tokenizer_of, starting_point, with_model_of
    from minigpt_cli.core.tokenizer import from_json

    chosen = _settings(config, overrides, resume=resume)
    source = None
    if init_from is not None and resume:  # it goes on from its own checkpoint, as the model that it was begun with
        of_run = _settings_of_run(Path(chosen.out_dir), [])
        chosen = with_model_of(chosen, of_run.model, chosen.out_dir)
    elif init_from is not None:
        source = _read_weights(init_from)
        chosen = with_model_of(chosen, source.config.model, str(init_from))
    dataset = Dataset(chosen.data.path)
    if source is not None:
        require_tokenizer_of(source, dataset)
    require_window(dataset.train, chosen.model.block_size)
    vocab_size = from_json(dataset.meta.tokenizer).vocab_size
    for split in (dataset.train, dataset.val):
        require_known_tokens(split, vocab_size, dataset.folder)
    chosen = _with_horizon(chosen, dataset, vocab_size)
    return chosen, dataset, vocab_size, starting_point(source, chosen) if source is not None else None


def _read_weights(path: Path) -> Checkpoint:
    """A checkpoint of ours, or what a folder of Hugging Face's holds."""
    from minigpt_cli.core.checkpoint import SHARDED, load

    if (path / "best.safetensors").is_file():
        raise UserError(f"{path}: a run folder; name one of its checkpoints, such as {path / 'best.safetensors'}")
    if path.is_dir() and path.suffix != SHARDED:
        from minigpt_cli.extras.huggingface import read

        return read(path, note=note)
    return load(path, weights_only=True)


def _with_horizon(config: Config, dataset: Dataset, vocab_size: int) -> Config:
    if config.train.max_iters != "auto":
        return config
    import torch

    from minigpt_cli.core.model import GPT
    from minigpt_cli.core.optim import with_horizon

    with torch.device("meta"):
        n_parameters = GPT(config.model, vocab_size).parameter_counts()["total"]
    resolved = with_horizon(config, len(dataset.train), n_parameters)
    per_step = config.train.batch_size * config.model.block_size
    note(
        f"max_iters: {resolved.train.steps:,}, for {n_parameters:,} parameters and {len(dataset.train):,} tokens "
        f"({resolved.train.steps * per_step / len(dataset.train):.1f} passes over the text)"
    )
    return resolved


def _settings(config: str | None, overrides: list[tuple[str, Any]], *, resume: bool) -> Config:
    from minigpt_cli.core.config import load_config

    if config is None and not resume:
        raise UserError(
            "which config? For example --config cpu (on a CPU), --config gpt (on a GPU), "
            "--config finetune (with --init-from)"
        )
    chosen = load_config(config, overrides)
    if config is not None:
        return chosen
    return _settings_of_run(Path(chosen.out_dir), [("out_dir", chosen.out_dir), *overrides])  # which knows its own


def _settings_of_run(folder: Path, overrides: list[tuple[str, Any]]) -> Config:
    from minigpt_cli.core.config import load_config

    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: no run to resume (there is no config.yaml); start one with --config")
    return load_config(str(file), overrides)


def _run(
    config: Config, dataset: Dataset, vocab_size: int, world: World, *, start: Checkpoint | None,
    resume: bool, overwrite: bool, allow_data_change: bool,
) -> None:  # fmt: skip
    from minigpt_cli.commands.display import Display
    from minigpt_cli.core import checkpoint
    from minigpt_cli.core.files import atomic_write
    from minigpt_cli.core.metrics import JsonLines, plot_losses, read_metrics
    from minigpt_cli.core.run import RunFolder, check_resumable, open_run
    from minigpt_cli.core.shards import open_sharded
    from minigpt_cli.core.signals import StopSignals
    from minigpt_cli.core.train import train as run_training
    from minigpt_cli.core.verdict import verdict

    path = Path(config.out_dir)
    runtime = _choose_runtime(config, None, vocab_size, world)  # before the folder is touched: is there such a device?
    with StopSignals() as stop, ExitStack() as held:
        with world.together():
            if resume and not path.is_dir():
                raise UserError(f"{path}: no run to resume; run without --resume to start")
            folder = held.enter_context(open_run(path)) if world.leads else RunFolder(path)
            saved = _where_to_start(config, folder, world, resume=resume, overwrite=overwrite) if world.leads else None
        going_on = world.texts(str(saved.path) if saved else "")[0]
        with world.together():
            if going_on and not world.leads:
                there = Path(going_on)
                saved = open_sharded(there, check=False) if there.is_dir() else checkpoint.load(there)
            changed = (
                check_resumable(saved, config, dataset, allow_data_change=allow_data_change)
                if saved is not None
                else {}
            )
        for key, (old, new) in changed.items():
            note(f"changed since the last session: {key}: {old} -> {new}")
        evaluated = saved is not None and saved.header.val_loss is not None
        if saved is not None and saved.header.step >= config.train.steps and evaluated:
            note(
                f"{path}: this run is finished (step {saved.header.step:,}); "
                "to go on give it more steps: --resume --set train.max_iters=N"
            )
            return
        if saved is not None:
            note(f"resuming {saved.path} at step {saved.header.step:,}")
            runtime = _choose_runtime(config, saved, vocab_size, world)
        elif start is not None:
            note(f"starting from the weights of {start.path}")
        for line in runtime.notes:
            note(line)
        if saved is None:
            _warn_if_slow(config, dataset, vocab_size, runtime)
        listeners: list[JsonLines | Display] = []
        if world.leads:
            if saved is None:
                folder.set_aside()
            with atomic_write(folder.config) as file:
                file.write(config.to_yaml().encode())
            if world.launch is not None:
                folder.launch.write_text(world.launch)
            metrics = JsonLines(folder.metrics, resume_at=saved.header.step if saved else None, evaluated=evaluated)
            listeners = [metrics, Display(config, start=saved.header.step if saved else 0)]
        try:
            result = run_training(config, dataset, folder, runtime, listeners, resume=saved or start, stop=stop)
        finally:
            for listener in listeners:
                listener.close()
            if world.leads:
                try:
                    plot_losses(folder.metrics, folder.picture)
                except Exception as error:  # a picture is worth no run
                    note(f"{folder.picture}: not drawn: {error}")
        if result.reason == "stopped":
            stopped = f"stopped at step {result.progress.step:,}, all saved; go on with:\n  {_resume_command(world)}"
            raise world.everyones(Stopped(stopped, stop.exit_code))
        if not world.leads:
            return
        for line in verdict(result, read_metrics(folder.metrics), config):
            print(safe(line))
        best = shlex.quote(str(result.best or result.last))
        if config.runtime.checkpoints == "sharded":
            print(safe(f"Make one file of it: minigpt export --ckpt {best} --to file best.safetensors"))
        else:
            print(safe(f"Sample from it: minigpt sample --ckpt {best} --tokens 500"))


def _where_to_start(
    config: Config, folder: RunFolder, world: World, *, resume: bool, overwrite: bool
) -> Checkpoint | None:
    """The checkpoint to go on from; None for a new run. Raises UserError where the folder is not free for one."""
    if world.restarts and folder.launch.exists() and folder.launch.read_text() == (world.launch or ""):
        resume, overwrite = folder.has_last(), True  # torchrun started this very run before, and a rank died
    if folder.holds_run() and not (resume or overwrite):
        raise UserError(
            f"{folder.path} already holds a run: --resume goes on with it, --overwrite replaces it, "
            "--out DIR goes elsewhere"
        )
    resolved = config.to_yaml().encode()
    if folder.config.exists() and not folder.holds_run() and folder.config.read_bytes() != resolved:
        raise UserError(f"{folder.config} is not a run's: it would be replaced; choose another folder with --out")
    if not resume:
        return None
    saved, problems = folder.newest()
    for problem in problems:
        note(problem)
    return saved


def _choose_runtime(config: Config, saved: Checkpoint | None, vocab_size: int, world: World) -> Runtime:
    import torch

    from minigpt_cli.core.model import GPT
    from minigpt_cli.core.runtime import Workload, choose_runtime

    model, train = config.model, config.train
    with world.together():
        pieces = train.pieces(world.size)
    with torch.device("meta"):
        gpt = GPT(model, vocab_size)
    flops = gpt.flops_per_token() * train.batch_size * model.block_size // world.size
    steps = train.steps - (saved.header.step if saved else 0)
    workload = Workload(steps, model.n_layer, flops, gpt.parameter_counts()["total"])
    width, rows = model.n_embd, train.batch_size // (world.size * pieces) * model.block_size
    if saved is not None and config.runtime.precision == "auto":  # a measured choice could fall otherwise this time
        as_before = config.runtime.model_copy(update={"precision": saved.header.progress.precision})
        with suppress(UserError):  # another machine, which cannot do what that one did
            return choose_runtime(as_before, width=width, rows=rows, workload=workload, world=world)
    return choose_runtime(config.runtime, width=width, rows=rows, workload=workload, world=world)


def _warn_if_slow(config: Config, dataset: Dataset, vocab_size: int, runtime: Runtime) -> None:
    """Before hours begin: measure two steps, say how long it will take, and name the config that takes minutes."""
    from dataclasses import replace

    import torch

    from minigpt_cli.core.measure import measure_training
    from minigpt_cli.core.model import GPT

    tokens = config.train.batch_size * config.model.block_size * config.train.steps
    with torch.device("meta"):
        flops = GPT(config.model, vocab_size).flops_per_token() * tokens
    if flops < 1e15:  # under an hour on anything
        return
    eager = replace(runtime, compile=False)
    speed = measure_training(config, dataset.train, vocab_size, eager, steps=1, max_seconds=0)
    hours = speed.step_seconds * config.train.steps / 3600
    if config.train.max_minutes is not None:
        hours = min(hours, config.train.max_minutes / 60)
    if hours >= SLOW_HOURS:
        note(
            f"warning: this will take about {hours:.0f} hours on {runtime.device} ({speed.step_seconds:.1f} s a step); "
            "--config cpu takes minutes"
        )


def _resume_command(world: World) -> str:
    arguments = [a for a in sys.argv[1:] if a not in ("--overwrite", "--resume")]
    program = ["minigpt"] if world.size == 1 else ["torchrun", "...", "-m", "minigpt_cli"]
    return shlex.join([*program, *arguments, "--resume"])
