"""`minigpt bench`: how fast this machine trains and samples a config."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt_cli.commands.console import Debug, note, print_table, size
from minigpt_cli.commands.options import CONFIG, DEVICE, SETTINGS, among
from minigpt_cli.core.errors import UserError

if TYPE_CHECKING:
    from minigpt_cli.core.config import Config
    from minigpt_cli.core.world import World


def bench(
    config: Annotated[str, CONFIG],
    settings: Annotated[list[str] | None, SETTINGS] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps to time, at most.")] = 20,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to decode.")] = 500,
    streams: Annotated[int, typer.Option("--streams", min=1, help="Samples to decode side by side.")] = 1,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="Time for each of the two measurements, at most.")
    ] = 20,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            metavar="NAME",
            autocompletion=among("naive", "hf"),
            help="Compare with naive (the seed's way, from the repository) or hf (transformers' GPT-2). Repeatable.",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", min=2, max=1 << 24, help="Take random tokens of so many kinds.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Annotated[str | None, DEVICE] = None,
    debug: Debug = False,
) -> None:
    """Time real training steps (data, forward, backward, clip, optimizer) and decoding.

    Uses the config's dataset where it is prepared, random tokens of 65 kinds (--vocab-size) where it is not. The median
    step counts; the first, cold step is given apart. Close other programs: they cost more than you think.

    With --baseline ours and the other take turns, one training step or one text each, and the medians are compared.
    Within its context only for hf, which goes no further. On a CPU take a small batch: the naive model is slow.

    Example: minigpt bench --config gpt --set train.batch_size=8 --json
    """
    from minigpt_cli.core.config import load_config, parse_override
    from minigpt_cli.core.world import joined
    from minigpt_cli.extras.baselines import require

    names = [name.strip() for text in baseline or [] for name in text.split(",")]
    require(names)
    overrides = [parse_override(text) for text in settings or []]
    overrides += [("runtime.device", device)] if device is not None else []
    chosen = load_config(config, overrides)
    with joined() as world:
        if names and world.size > 1:
            raise world.everyones(UserError("--baseline compares single processes; leave torchrun out"))
        result = _measure(
            chosen, names, world, vocab_size, steps=steps, tokens=tokens, streams=streams, seconds=seconds
        )
    if not world.leads:
        return
    if as_json:
        print(json.dumps(result))
    else:
        _print(result, f"bench {config}")


def _measure(
    chosen: Config, names: list[str], world: World, vocab_size: int | None, *,
    steps: int, tokens: int, streams: int, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from minigpt_cli.commands.display import telling
    from minigpt_cli.core.dataset import Dataset, require_known_tokens, require_window
    from minigpt_cli.core.measure import measure_decoding, measure_training, random_tokens
    from minigpt_cli.core.model import empty_model
    from minigpt_cli.core.optim import resolved
    from minigpt_cli.core.runtime import choose_decoding_runtime, choose_runtime, describe_device
    from minigpt_cli.core.tokenizer import from_json
    from minigpt_cli.extras.baselines import race

    with world.together():
        rows = chosen.train.batch_size // (world.size * chosen.train.pieces(world.size)) * chosen.model.block_size
    runtime = choose_runtime(chosen.runtime, width=chosen.model.n_embd, rows=rows, world=world)
    if vocab_size is None and Path(chosen.data.path).is_dir():
        dataset = Dataset(chosen.data.path)
        data, vocab_size, corpus = dataset.train, from_json(dataset.meta.tokenizer).vocab_size, chosen.data.path
    else:
        vocab_size, corpus = vocab_size or 65, "random tokens"
        data = random_tokens(max(1_000_000, 2 * chosen.model.block_size), vocab_size)
    require_window(data, chosen.model.block_size)
    require_known_tokens(data, vocab_size, Path(chosen.data.path))
    parameters = empty_model(chosen.model, vocab_size).parameter_counts()["total"]
    chosen = resolved(chosen, len(data), parameters)
    decoder = choose_decoding_runtime(chosen.runtime, parameters)
    for line in (*runtime.notes, *(line for line in decoder.notes if line not in runtime.notes)):
        note(line)
    with telling(lambda: "timing training steps"):
        training = measure_training(chosen, data, vocab_size, runtime, steps=steps, max_seconds=seconds)
    decoding = None
    if world.leads:
        with telling(lambda: "timing decoding"):
            decoding = measure_decoding(
                chosen, vocab_size, decoder, streams=streams, tokens=tokens, max_seconds=seconds
            )
    baselines: dict[str, Any] = {}
    if names:
        with telling(lambda: f"taking turns with {' and '.join(names)}"):
            races = race(
                names, chosen, data, vocab_size, runtime, decoder,
                steps=steps, streams=streams, tokens=tokens, max_seconds=seconds,
            )  # fmt: skip
        baselines = {name: asdict(against) for name, against in races.items()}
    result: dict[str, Any] = {
        "train_tokens_per_second": training.tokens_per_second, "decode_tokens_per_second": decoding,
        "peak_memory_bytes": training.peak_memory_bytes,
        "parameters": parameters,
        "step_seconds": training.step_seconds, "first_step_seconds": training.first_step_seconds,
        "flops_utilisation": training.flops_utilisation, "decode_streams": streams, "data": corpus,
        "device": describe_device(runtime.device), "precision": runtime.precision,
        "decode_precision": decoder.decoding, "decode_compiled": decoder.compile,
        "compiled": runtime.compile, "torch": torch.__version__,
        "ranks": world.size, "parallel": runtime.parallel,
    }  # fmt: skip
    return result | ({"baselines": baselines} if baselines else {})


def _print(result: dict[str, Any], title: str) -> None:
    mfu, streams = result["flops_utilisation"], result["decode_streams"]
    first, compiled = result["first_step_seconds"], ", compiled" if result["compiled"] else ""
    ranks = f", {result['ranks']} ranks ({result['parallel']})" if result["ranks"] > 1 else ""
    rows_shown = [
        ("training", f"{result['train_tokens_per_second']:,.0f} tokens/s"),
        ("one step", f"{result['step_seconds'] * 1e3:,.1f} ms (the first, cold: {first:,.1f} s)"),
        (
            "decoding",
            f"{result['decode_tokens_per_second']:,.0f} tokens/s "
            f"({streams} stream{'s' if streams > 1 else ''}, {result['decode_precision']})",
        ),
        ("peak memory", size(result["peak_memory_bytes"])),
        ("model FLOPs utilisation", f"{mfu:.1%}" if mfu is not None else "unknown: no data-sheet peak for this device"),
        ("parameters", f"{result['parameters']:,}"),
        ("data", result["data"]),
        ("device", f"{result['device']}, {result['precision']}{compiled}{ranks}"),
    ]
    for name, race_ in result.get("baselines", {}).items():
        rows_shown += [
            (f"against {name}", race_["what"]),
            ("  its training", f"{race_['train_tokens_per_second']:,.0f} tokens/s; ours {race_['train_ratio']:.2f}x"),
            ("  its decoding", f"{race_['decode_tokens_per_second']:,.0f} tokens/s; ours {race_['decode_ratio']:.1f}x"),
        ]
    print_table(title, rows_shown)
