"""`minigpt train --dry-run`: what a run takes here, or (--world-size N) on machines that nobody has paid for yet."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt_cli.commands.console import duration, note, print_table, safe, size
from minigpt_cli.core.errors import UserError

if TYPE_CHECKING:
    from minigpt_cli.core.config import Config
    from minigpt_cli.core.plan import Effort, Memory, Setting
    from minigpt_cli.core.runtime import Runtime
    from minigpt_cli.core.session import Job


@dataclass(frozen=True)
class Asked:
    """The options of the plan. `tokens` and `vocab_size` stand for a corpus that is not prepared yet."""

    world_size: int
    utilisation: float
    price: float | None
    device_name: str
    peak_tflops: float | None
    tokens: float | None
    vocab_size: int | None
    as_json: bool


def plan(config: Config, asked: Asked) -> None:
    """Show it, as tables or as JSON. Allocates nothing, needs no GPU, writes nothing."""
    from minigpt_cli.core.model import empty_model
    from minigpt_cli.core.plan import Setting, plan_effort, plan_memory

    vocab_size, n_tokens = _corpus(config, asked)
    peak, precision = _peak(config, asked)
    model = empty_model(config.model, vocab_size)
    counts = model.parameter_counts()
    config = _with_steps(config, n_tokens, counts["total"])
    ways = ("ddp", "fsdp") if asked.world_size > 1 else ("none",)
    settings = [Setting("cuda", precision, asked.world_size, way, again) for again in (False, True) for way in ways]
    memory = [plan_memory(config, vocab_size, setting, n_tokens or 0) for setting in settings]
    chosen = replace(settings[0], recompute=config.runtime.checkpoint_activations)
    effort = plan_effort(config, vocab_size, chosen, peak * asked.utilisation)
    if not asked.as_json:
        _show(config, asked, counts, settings, memory, effort, peak, n_tokens)
        return
    per_step = config.train.batch_size * config.model.block_size
    document: dict[str, Any] = {
        "parameters": counts, "parameters_not_embedding": _not_embedding(counts), "vocab_size": vocab_size,
        "world_size": asked.world_size, "precision": precision, "peak_tflops": peak / 1e12,
        "utilisation": asked.utilisation, "steps": config.train.steps, "tokens_per_step": per_step,
        "micro_batch_size": _micro_batch(config, asked), "accumulation": config.train.pieces(asked.world_size),
        **asdict(effort), "flops_6n": 6 * counts["total"], "days": effort.seconds / 86400,
        "tokens_per_parameter": effort.tokens / counts["total"],
        "epochs": effort.tokens / n_tokens if n_tokens else None,
        "cost": effort.device_hours * asked.price if asked.price is not None else None,
        "memory": [
            {"parallel": setting.parallel, "checkpoint_activations": setting.recompute, **asdict(needed)}
            for setting, needed in zip(settings, memory, strict=True)
        ],
    }  # fmt: skip
    print(json.dumps(document))


def _corpus(config: Config, asked: Asked) -> tuple[int, int | None]:
    """The size of the vocabulary, and the tokens of the training text where they are known."""
    from minigpt_cli.core.dataset import Dataset
    from minigpt_cli.core.tokenizer import from_json

    tokens = int(asked.tokens) if asked.tokens is not None else None
    if asked.vocab_size is not None:
        return asked.vocab_size, tokens
    if not Path(config.data.path).exists():
        raise UserError(
            f"{config.data.path} is not prepared; to plan without it say how large its vocabulary will be and how many "
            "tokens it will have: --vocab-size 50257 --tokens 9e9"
        )
    dataset = Dataset(config.data.path)
    return from_json(dataset.meta.tokenizer).vocab_size, tokens or len(dataset.train)


def _peak(config: Config, asked: Asked) -> tuple[float, str]:
    """FLOP/s of a device at its best, and the precision that reaches them."""
    from minigpt_cli.core.gpus import PEAK_TFLOPS, peak_of

    precision = "bf16" if config.runtime.precision == "auto" else config.runtime.precision
    if asked.peak_tflops is not None:
        return asked.peak_tflops * 1e12, precision
    if precision == "fp32":
        raise UserError("the peaks that are known are those of 16-bit products; for fp32 say --peak-tflops")
    peak = peak_of(asked.device_name)
    if peak is None:
        raise UserError(
            f"--device-name {asked.device_name}: unknown or ambiguous; give --peak-tflops, or one of "
            f"{', '.join(PEAK_TFLOPS)}"
        )
    return peak, precision


def _with_steps(config: Config, n_tokens: int | None, n_parameters: int) -> Config:
    from minigpt_cli.core.optim import resolved

    if config.train.max_iters == "auto" and n_tokens is None:
        raise UserError("train.max_iters is auto, which follows from the tokens: say how many with --tokens")
    return resolved(config, n_tokens, n_parameters) if n_tokens is not None else config


def _micro_batch(config: Config, asked: Asked) -> int:
    return config.train.batch_size // (asked.world_size * config.train.pieces(asked.world_size))


def _not_embedding(counts: dict[str, int]) -> int:
    return counts["total"] - counts["token embedding"] - counts["position embedding"]


def _show(
    config: Config, asked: Asked, counts: dict[str, int], settings: list[Setting], memory: list[Memory],
    effort: Effort, peak: float, n_tokens: int | None,
) -> None:  # fmt: skip
    rows = [(name, f"{count:,}") for name, count in counts.items() if count]
    print_table("Parameters", [*rows, ("without embeddings", f"{_not_embedding(counts):,}")])

    train, T = config.train, config.model.block_size
    names = {"none": "as it is", "ddp": "DDP", "fsdp": "FSDP"}
    headers = [names[setting.parallel] + (", recomputing" if setting.recompute else "") for setting in settings]
    parts = list(dict.fromkeys(part for needed in memory for part in needed.parts))
    table = [(part, *(size(needed.parts.get(part, 0)) for needed in memory)) for part in parts]
    table += [("the most at once", *(size(needed.peak) for needed in memory))]
    table += [("which is at", *(needed.moment for needed in memory))]
    at_once = f"{_micro_batch(config, asked)} x {T:,} tokens at a time"
    print_table(f"Memory on each of {asked.world_size:,} devices, {at_once}", table, ["", *headers])

    per_step, pieces = train.batch_size * T, train.pieces(asked.world_size)
    flops = effort.flops_per_token
    time = [
        ("FLOPs per token", f"{flops:,} ({flops / (6 * counts['total']):.2f} x 6N)"),
        *([("  of them twice", f"{effort.recomputed:,}")] if effort.recomputed else []),
        ("tokens per step", f"{per_step:,} ({pieces:,} micro batch{'es' * (pieces > 1)} on each device)"),
        ("steps", f"{train.steps:,}"),
        ("tokens", f"{effort.tokens:,} ({effort.tokens / counts['total']:,.1f} per parameter)"),
        *([("epochs", f"{effort.tokens / n_tokens:,.2f} of {n_tokens:,} tokens")] if n_tokens else []),
        ("a device's peak", f"{peak / 1e12:,.0f} TFLOP/s, of which {asked.utilisation:.0%} are reached"),
        ("tokens/s", f"{effort.tokens_per_second:,.0f}"),
        ("time", _days(effort.seconds)),
        ("device hours", f"{effort.device_hours:,.1f}"),
        *([("cost", f"{effort.device_hours * asked.price:,.2f}")] if asked.price is not None else []),
    ]
    print_table("Time" if asked.price is None else "Time and money", time)
    print(safe("By arithmetic: nothing was measured, allocated or written. docs/scaling.md says how far it holds."))
    if math.isclose(asked.utilisation, 0.4):
        note("40 % of the peak is an assumption: minigpt bench measures yours (--utilisation)")


def _days(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:,.1f} days" if days >= 2 else f"{seconds / 3600:,.1f} hours"


def show_one_step(job: Job, runtime: Runtime) -> None:
    """--dry-run alone: what the run will cost on this machine, by arithmetic and by a real step. Writes nothing."""
    from minigpt_cli.commands.display import telling
    from minigpt_cli.core.measure import measure_training
    from minigpt_cli.core.model import empty_model
    from minigpt_cli.core.plan import plan_memory, setting_of
    from minigpt_cli.core.runtime import describe_device

    for line in runtime.notes:
        note(line)
    config, dataset, vocab_size = job.config, job.dataset, job.vocab_size
    train = config.train
    counts = empty_model(config.model, vocab_size).parameter_counts()
    print_table("Parameters", [(name, f"{count:,}") for name, count in counts.items() if count])
    per_step = train.batch_size * config.model.block_size
    memory = plan_memory(config, vocab_size, setting_of(runtime), len(dataset.train))
    with telling(lambda: "taking a few real steps, to time them"):
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
            ("weight decay", f"{train.decay_strength:g}"),
            *((f"memory: {part} (planned)", size(n_bytes)) for part, n_bytes in memory.parts.items()),
            ("memory: most at once (planned)", f"{size(memory.peak)}, at {memory.moment}"),
            ("memory: peak in a real step", size(speed.peak_memory_bytes)),
            ("device", describe_device(runtime.device)),
            ("one step", f"{speed.step_seconds * 1e3:,.0f} ms, loss {speed.loss:.3f}"),
            ("estimated time", duration(min(seconds, (train.max_minutes or float("inf")) * 60))),
        ],
    )
    if not runtime.world.leads:
        return
    if said := job.advice():
        print(safe(said))
    print("Nothing was written.")
