"""`minigpt train`: settings -> the engine -> checkpoints, a curve, and a verdict in plain words."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt_cli.commands.console import Debug, duration, note, print_table, safe, size
from minigpt_cli.commands.options import CONFIG, DEVICE, SETTINGS, among
from minigpt_cli.core.errors import Stopped, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from minigpt_cli.core.checkpoint import Checkpoint
    from minigpt_cli.core.metrics import Listener
    from minigpt_cli.core.run import RunFolder
    from minigpt_cli.core.runtime import Runtime
    from minigpt_cli.core.session import Job
    from minigpt_cli.core.world import World

SLOW_HOURS = 1.0  # from here on, say before starting how long it will take


def train(
    config: Annotated[str | None, CONFIG] = None,
    settings: Annotated[list[str] | None, SETTINGS] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="The run folder. [default: the config's out_dir, checkpoints]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, exactly where it was.")
    ] = False,
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
    debug: Debug = False,
) -> None:
    """Train a GPT on a prepared dataset.

    The run folder gets last.safetensors (to resume from), best.safetensors (lowest validation loss), metrics.jsonl,
    loss.png and config.yaml. Ctrl-C saves and prints the command that goes on; a second Ctrl-C leaves at once.

    Several devices share each batch: torchrun --standalone --nproc-per-node 2 -m minigpt_cli train --config gpt
    (with --logger for --log, which torchrun wants for itself).

    Example: minigpt train --config cpu --set train.max_iters=500 --out checkpoints/short
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: choose one")
    if config is None and not resume:
        raise UserError("which config? For example --config cpu (on a CPU) or --config gpt (on a GPU)")
    from minigpt_cli.core.config import parse_override
    from minigpt_cli.core.session import make_job
    from minigpt_cli.core.world import joined
    from minigpt_cli.extras.loggers import require

    loggers = list(dict.fromkeys(log or []))
    require(loggers)
    overrides = [parse_override(text) for text in settings or []]
    overrides += [("out_dir", out)] if out is not None else []
    overrides += [("runtime.device", device)] if device is not None else []
    with joined() as world:
        job = make_job(config, overrides, world, note)
        if dry_run:
            _show_plan(job)
        else:
            _run(job, loggers, resume=resume, overwrite=overwrite, allow_data_change=allow_data_change)


def _run(job: Job, loggers: list[str], *, resume: bool, overwrite: bool, allow_data_change: bool) -> None:
    from minigpt_cli.commands.display import Display
    from minigpt_cli.core.session import run_session
    from minigpt_cli.core.signals import StopSignals
    from minigpt_cli.core.verdict import verdict

    def listen(folder: RunFolder, saved: Checkpoint | None) -> list[Listener]:
        display = Display(job.config, start=saved.header.step if saved else 0)
        return [display, *(_logger(name, folder, job, saved, display.note) for name in loggers)]

    with StopSignals() as stop:
        result = run_session(
            job, resume=resume, overwrite=overwrite, allow_data_change=allow_data_change,
            stop=stop, note=note, begin=lambda runtime: _warn_if_slow(job, runtime), listen=listen,
        )  # fmt: skip
    if result.reason == "stopped":
        stopped = f"stopped at step {result.progress.step:,}, all saved; go on with:\n  {_resume_command(job.world)}"
        raise job.world.everyones(Stopped(stopped, stop.exit_code))
    if result.reason == "complete" or not job.world.leads:
        return
    for line in verdict(result, result.metrics, job.config):
        print(safe(line))
    best = shlex.quote(str(result.best or result.last))
    if job.config.runtime.checkpoints == "sharded":
        print(safe(f"Make one file of it: minigpt export --ckpt {best} --to file best.safetensors"))
    else:
        print(safe(f"Sample from it: minigpt sample --ckpt {best} --tokens 500"))


def _logger(name: str, folder: RunFolder, job: Job, saved: Checkpoint | None, note: Callable[[str], None]) -> Listener:
    from minigpt_cli.extras.loggers import Logger

    header = saved.header if saved is not None else None
    return Logger(
        name, folder.metrics, folder.logs, note, config=job.config.model_dump(),
        resume_at=header.step if header else None, evaluated=header is None or header.val_loss is not None,
        tokens_seen=header.tokens_seen if header else 0,
    )  # fmt: skip


def _warn_if_slow(job: Job, runtime: Runtime) -> None:
    """Before hours begin: measure two steps, say how long it will take, and name the config that takes minutes."""
    from dataclasses import replace

    import torch

    from minigpt_cli.core.measure import measure_training
    from minigpt_cli.core.model import GPT

    config = job.config
    tokens = config.train.batch_size * config.model.block_size * config.train.steps
    with torch.device("meta"):
        flops = GPT(config.model, job.vocab_size).flops_per_token() * tokens
    if flops < 1e15:  # under an hour on anything
        return
    eager = replace(runtime, compile=False)
    speed = measure_training(config, job.dataset.train, job.vocab_size, eager, steps=1, max_seconds=0)
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


def _show_plan(job: Job) -> None:
    """--dry-run: what the run will cost, by arithmetic and by one real step. Writes nothing."""
    import torch

    from minigpt_cli.core.measure import estimate_memory, measure_training
    from minigpt_cli.core.model import GPT
    from minigpt_cli.core.runtime import describe_device, memory_advice
    from minigpt_cli.core.verdict import dropout_advice

    config, dataset, vocab_size, world = job.config, job.dataset, job.vocab_size, job.world
    runtime = job.runtime()
    for line in runtime.notes:
        note(line)
    train = config.train
    with torch.device("meta"):
        counts = GPT(config.model, vocab_size).parameter_counts()
    print_table("Parameters", [(name, f"{count:,}") for name, count in counts.items() if count])
    per_step = train.batch_size * config.model.block_size
    with memory_advice(train, runtime.device, world.size):
        memory = estimate_memory(config, vocab_size)
    speed = measure_training(config, dataset.train, vocab_size, runtime, steps=3, max_seconds=2)
    evaluations = train.steps // train.eval_interval + 1
    seconds = speed.step_seconds * (train.steps + evaluations * len(dataset.val) / per_step / 3)  # forward: a third
    print_table(
        "This run",
        [
            ("training tokens", f"{len(dataset.train):,}"),
            ("tokens per step", f"{per_step:,}"),
            ("steps per epoch", f"{len(dataset.train) / per_step:,.1f}"),
            ("steps", f"{train.steps:,}"),
            ("epochs", f"{train.steps * per_step / len(dataset.train):,.1f}"),
            *((f"memory: {part} (estimated)", size(n_bytes)) for part, n_bytes in memory.items()),
            ("memory: peak in a real step", size(speed.peak_memory_bytes)),
            ("device", describe_device(runtime.device)),
            ("one step", f"{speed.step_seconds * 1e3:,.0f} ms, loss {speed.loss:.3f}"),
            ("estimated time", duration(min(seconds, (train.max_minutes or float("inf")) * 60))),
        ],
    )
    if not world.leads:
        return
    if advice := dropout_advice(config, train.steps * per_step / len(dataset.train)):
        print(safe(advice))
    print("Nothing was written.")
