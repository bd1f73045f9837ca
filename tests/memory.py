"""Predicted against measured peak memory of real training steps, each shape in processes of its own.

    python tests/memory.py [--device cpu|cuda] [--only WORDS]

Measured is, on a CPU, by how much a process grew: its largest resident size, less what it was with libraries loaded
and a small model trained. glibc keeps much of what is freed for later; `needed` is without that
(MALLOC_MMAP_THRESHOLD_=65536), `kept` with it. On CUDA it is the allocator's peak. docs/scaling.md has the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch

from minigpt_cli.core.config import Config, load_config, parse_override
from minigpt_cli.core.measure import measure_training, random_tokens
from minigpt_cli.core.plan import plan_memory, setting_of
from minigpt_cli.core.runtime import Runtime, peak_memory_bytes
from minigpt_cli.core.world import joined

SHAPES: dict[str, tuple[str, int, int, str]] = {  # what it is: config, vocabulary, ranks, settings
    "gpt, batch 8": ("gpt", 65, 1, "train.batch_size=8"),
    "gpt, batch 32 by 8": ("gpt", 65, 1, "train.batch_size=32 train.micro_batch_size=8"),
    "modern, batch 16": ("modern", 65, 1, "model.dropout=0.2 train.batch_size=16"),
    "modern, batch 16, recomputing": (
        "modern", 65, 1, "model.dropout=0.2 train.batch_size=16 runtime.checkpoint_activations=true",
    ),
    "gpt2, context 256, batch 1": (
        "gpt2", 50257, 1, "model.block_size=256 train.batch_size=1 train.micro_batch_size=1",
    ),
    "gpt2-modern, batch 2 by 1": ("gpt2-modern", 50257, 1, "train.batch_size=2 train.micro_batch_size=1"),
    "gpt2, 2 ranks, DDP": (
        "gpt2", 50257, 2, "model.block_size=256 train.batch_size=2 train.micro_batch_size=1 runtime.parallel=ddp",
    ),
    "gpt2, 2 ranks, FSDP": (
        "gpt2", 50257, 2, "model.block_size=256 train.batch_size=2 train.micro_batch_size=1 runtime.parallel=fsdp",
    ),
    "gpt2, 2 ranks, FSDP, by 2": (
        "gpt2", 50257, 2, "model.block_size=256 train.batch_size=4 train.micro_batch_size=1 runtime.parallel=fsdp",
    ),
}  # fmt: skip


def grown(config: Config, vocab_size: int, runtime: Runtime) -> int:
    """Bytes by which three real training steps made the process, or the device's memory, grow."""
    tokens = random_tokens(100_000, vocab_size)
    warm = load_config("bigram", [("model.n_layer", 1), ("model.n_head", 2), ("train.batch_size", 2)])
    measure_training(warm, random_tokens(1000, 65), 65, runtime, steps=1, max_seconds=60)
    before = peak_memory_bytes(runtime.device)
    measure_training(config, tokens, vocab_size, runtime, steps=2, max_seconds=600)
    return peak_memory_bytes(runtime.device) - (before if runtime.device.type == "cpu" else 0)


def one(name: str, precision: str, device: str) -> None:
    """Print the result of one shape as JSON."""
    config_name, vocab_size, _, settings = SHAPES[name]
    overrides = [
        ("train.max_iters", 100),
        ("train.weight_decay", 0.1),
        *(parse_override(text) for text in settings.split()),
    ]
    config = load_config(config_name, overrides)
    with joined() as world:
        parallel = config.runtime.parallel if world.size > 1 else "none"
        place = torch.device(device, world.local_rank) if device == "cuda" else torch.device(device)
        again = config.runtime.checkpoint_activations
        runtime = Runtime(place, precision, False, (), world, parallel, again)
        planned = plan_memory(config, vocab_size, setting_of(runtime), 100_000)
        measured = world.largest(grown(config, vocab_size, runtime))
    if world.leads:
        print(json.dumps({"planned": planned.peak, "moment": planned.moment, "measured": measured}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="only the shapes whose name contains this")
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "PRECISION"), help="only this one, here, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        one(*arguments.one, arguments.device)
        return
    print("| shape | precision | planned | the most at | needed | planned / needed | kept |\n" + "| --- " * 7 + "|")
    for name, (_, _, ranks, _) in SHAPES.items():
        for precision in ("fp32", "bf16") if arguments.only in name else ():
            needed = run(name, precision, arguments.device, ranks, MALLOC_MMAP_THRESHOLD_="65536")
            kept = run(name, precision, arguments.device, ranks) if arguments.device == "cpu" else needed
            ratio = needed["planned"] / needed["measured"]
            sizes = [f"{n / 1e6:,.0f} MB" for n in (needed["planned"], needed["measured"], kept["measured"])]
            print(f"| {name} | {precision} | {sizes[0]} | {needed['moment']} | {sizes[1]} | {ratio:.2f} | {sizes[2]} |")
            sys.stdout.flush()


def run(name: str, precision: str, device: str, ranks: int, **environment: str) -> dict[str, Any]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, __file__, "--device", device, "--one", name, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{name}, {precision}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
