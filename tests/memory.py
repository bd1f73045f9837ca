"""Predicted against measured peak memory of real training steps, each shape in a process of its own.

    python tests/memory.py [--device cpu|cuda] [--markdown]

On a CPU measured is by how much the process grew (its largest resident size, less what it was before the model was
built, with libraries loaded and warm); on CUDA the allocator's peak. docs/scaling.md has the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from minigpt_cli.core.config import Config, load_config, parse_override
from minigpt_cli.core.measure import measure_training, random_tokens
from minigpt_cli.core.plan import Setting, plan_memory
from minigpt_cli.core.runtime import Runtime, peak_memory_bytes

SHAPES: dict[str, tuple[str, int, list[str]]] = {  # what it is: config, vocabulary, settings
    "gpt, batch 8": ("gpt", 65, ["train.batch_size=8"]),
    "gpt, batch 32 by 8": ("gpt", 65, ["train.batch_size=32", "train.micro_batch_size=8"]),
    "modern, batch 16, moving average": ("modern", 65, ["train.batch_size=16", "train.ema=0.99"]),
    "gpt2, context 256, one sequence": (
        "gpt2", 50257, ["model.block_size=256", "train.batch_size=1", "train.micro_batch_size=1"],
    ),
    "gpt2-modern, two by one": ("gpt2-modern", 50257, ["train.batch_size=2", "train.micro_batch_size=1"]),
}  # fmt: skip


def measure(config: Config, vocab_size: int, runtime: Runtime) -> int:
    """Bytes by which three real training steps made the process, or the device's memory, grow."""
    tokens = random_tokens(100_000, vocab_size)
    warm = load_config("bigram", [("model.n_layer", 1), ("model.n_head", 2), ("train.batch_size", 2)])
    measure_training(warm, random_tokens(1000, 65), 65, runtime, steps=1, max_seconds=60)
    before = peak_memory_bytes(runtime.device)
    measure_training(config, tokens, vocab_size, runtime, steps=2, max_seconds=600)
    return peak_memory_bytes(runtime.device) - (before if runtime.device.type == "cpu" else 0)


def one(name: str, precision: str, device: str) -> dict[str, Any]:
    config_name, vocab_size, settings = SHAPES[name]
    config = load_config(config_name, [parse_override(text) for text in settings])
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_iters": 100})})
    planned = plan_memory(config, vocab_size, Setting(device, precision))
    measured = measure(config, vocab_size, Runtime(torch.device(device), precision, compile=False))
    return {"planned": planned.peak, "moment": planned.moment, "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "PRECISION"), help="only this one, here, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one, arguments.device)))
        return
    print("| shape | precision | measured | planned | planned / measured | the most at |\n" + "| --- " * 6 + "|")
    for name in SHAPES:
        for precision in ("fp32", "bf16"):
            command = [sys.executable, __file__, "--device", arguments.device, "--one", name, precision]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            ratio = found["planned"] / found["measured"]
            print(
                f"| {name} | {precision} | {found['measured'] / 1e6:,.0f} MB | {found['planned'] / 1e6:,.0f} MB | "
                f"{ratio:.2f} | {found['moment']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
