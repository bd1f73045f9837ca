"""`minigpt train`: settings -> the engine -> checkpoints, a curve, and a verdict in plain words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt_cli.commands.console import Debug, command, find_checkpoint, note, tell
from minigpt_cli.commands.options import CONFIG, DEVICE, SETTINGS, among
from minigpt_cli.commands.plan import Asked, plan, show_one_step
from minigpt_cli.core.errors import Stopped, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from minigpt_cli.core.checkpoint import Checkpoint
    from minigpt_cli.core.metrics import Listener
    from minigpt_cli.core.run import RunFolder
    from minigpt_cli.core.runtime import Runtime
    from minigpt_cli.core.session import Job
    from minigpt_cli.core.world import World

PLAN = "Plan before you pay: --dry-run --world-size N"


def train(
    config: Annotated[str | None, CONFIG] = None,
    settings: Annotated[list[str] | None, SETTINGS] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DIR", help="The dataset folder. [default: the config's data.path, data/input]"),
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
    log: Annotated[
        list[str] | None,
        typer.Option(
            "--log",
            "--logger",  # which torchrun does not take for the beginning of its own --log-dir
            metavar="NAME",
            autocompletion=among("tensorboard", "wandb"),
            help="Show the run in tensorboard or wandb too (offline, in OUT/logs). Repeatable.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it would cost; one real step; write nothing.")
    ] = False,
    device: Annotated[str | None, DEVICE] = None,
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
    (with --logger for --log, which torchrun wants for itself).

    Example: minigpt train --config cpu --set train.max_iters=500 --out checkpoints/short

    What it would take on 8 GPUs, at once and without any:
    minigpt train --config gpt2 --dry-run --world-size 8 --vocab-size 50257 --tokens 9e9 --price 2.50
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: choose one")
    if config is None and not resume:
        raise UserError(
            "which config? For example --config cpu (on a CPU), --config gpt (on a GPU), "
            "--config finetune (with --init-from)"
        )
    asked = Asked(world_size or 0, utilisation, price, device_name, peak_tflops, tokens, vocab_size, as_json)
    if world_size is None and asked != Asked(0, 0.4, None, "H100", None, None, None, False):
        raise UserError("the options of a plan go with --dry-run --world-size N")
    if world_size is not None and not dry_run:
        raise UserError("--world-size plans, and goes with --dry-run; to train on several devices start with torchrun")
    from minigpt_cli.core.config import parse_override
    from minigpt_cli.core.session import make_job, settings_of
    from minigpt_cli.core.world import joined
    from minigpt_cli.extras.loggers import require

    loggers = list(dict.fromkeys(log or []))
    require(loggers)
    overrides = [parse_override(text) for text in settings or []]
    named = {"data.path": data, "out_dir": out, "runtime.device": device}
    overrides += [(key, value) for key, value in named.items() if value is not None]
    if world_size is not None:
        plan(settings_of(config, overrides), asked)
        return
    with joined() as world:
        weights = (lambda: _read_weights(init_from)) if init_from is not None else None
        job = make_job(config, overrides, world, note, weights=weights, resume=resume)
        if dry_run:
            show_one_step(job, job.runtime())
        else:
            _run(job, loggers, resume=resume, overwrite=overwrite, allow_data_change=allow_data_change)


def _read_weights(path: Path) -> Checkpoint:
    """A checkpoint of ours, or what a folder of Hugging Face's holds."""
    from minigpt_cli.core.checkpoint import SHARDED, load

    path = find_checkpoint(path)
    if path.is_dir() and path.suffix != SHARDED:
        from minigpt_cli.extras.huggingface import read

        return read(path, note=note)
    return load(path, weights_only=True)


def _run(job: Job, loggers: list[str], *, resume: bool, overwrite: bool, allow_data_change: bool) -> None:
    from minigpt_cli.commands.display import Display
    from minigpt_cli.core.session import run_session
    from minigpt_cli.core.signals import StopSignals
    from minigpt_cli.core.verdict import verdict

    device = "cpu"

    def begin(runtime: Runtime) -> None:
        nonlocal device
        device = runtime.device.type

    def listen(folder: RunFolder, saved: Checkpoint | None) -> list[Listener]:
        display = Display(job.config, start=saved.header.step if saved else 0, device=device)
        return [display, *(_logger(name, folder, job, saved, display.note) for name in loggers)]

    with StopSignals() as stop:
        result = run_session(
            job, resume=resume, overwrite=overwrite, allow_data_change=allow_data_change,
            stop=stop, note=note, begin=begin, listen=listen,
        )  # fmt: skip
    if result.reason == "stopped":
        stopped = f"stopped at step {result.progress.step:,}, all saved; go on with:\n  {_resume_command(job.world)}"
        raise job.world.everyones(Stopped(stopped, stop.exit_code))
    if result.reason == "complete" or not job.world.leads:
        return
    best = result.best or result.last
    if job.config.runtime.checkpoints == "sharded":
        more = f"Make one file of it: {command('export', '--ckpt', best, '--to', 'file', 'best.safetensors')}"
    else:
        more = f"Sample from it: {command('sample', '--ckpt', best, '--tokens', 500)}"
    tell(*verdict(result, result.metrics, job.config, len(job.dataset.train), job.n_parameters), more)


def _logger(name: str, folder: RunFolder, job: Job, saved: Checkpoint | None, note: Callable[[str], None]) -> Listener:
    from minigpt_cli.extras.loggers import Logger

    header = saved.header if saved is not None else None
    return Logger(
        name, folder.metrics, folder.logs, note, config=job.config.model_dump(),
        resume_at=header.step if header else None, evaluated=header is None or header.val_loss is not None,
        tokens_seen=header.tokens_seen if header else 0,
    )  # fmt: skip


def _resume_command(world: World) -> str:
    arguments = [a for a in sys.argv[1:] if a not in ("--overwrite", "--resume")]
    line = command(*arguments, "--resume")
    return line if world.size == 1 else f"torchrun ... -m minigpt_cli{line.removeprefix('minigpt')}"
