"""How much faster than the naive model, in one interleaved run: medians of training steps, and tokens per second.

    python tests/oracle/speed.py [--config gpt] [--batch 8] [--rounds 5] [--tokens 300]

The naive model trains and samples as the seed's scripts do: float32, a Python loop over heads, no cache. Ours is what
`minigpt train` and `minigpt sample` run on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from minigpt_cli.core.config import load_config
from minigpt_cli.core.dataset import Batches
from minigpt_cli.core.generate import Sampling, generate
from minigpt_cli.core.measure import random_tokens
from minigpt_cli.core.model import GPT
from minigpt_cli.core.optim import make_optimizer
from minigpt_cli.core.runtime import choose_runtime, describe_device
from minigpt_cli.core.train import Statistics, train_step
from oracle.generate import crop_and_recompute
from oracle.model import NaiveGPT
from oracle.operations import TorchOps

VOCABULARY = 65


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=300)
    arguments = parser.parse_args()
    config = load_config(arguments.config, [("train.batch_size", arguments.batch), ("runtime.device", "cpu")])
    T = config.model.block_size
    runtime = choose_runtime(config.runtime, width=config.model.n_embd, rows=arguments.batch * T)
    batches = Batches(
        random_tokens(100_000, VOCABULARY), T, arguments.batch, seed=1, sampling="random", device=runtime.device
    )

    ours = GPT(config.model, VOCABULARY)
    optimizer, scaler = make_optimizer(ours, config.train), runtime.scaler()
    counters = Statistics.zeros(runtime.device)
    naive = NaiveGPT(config.model, VOCABULARY, TorchOps())
    naive_optimizer = torch.optim.AdamW(naive.parameters(), lr=config.train.learning_rate)

    def our_step() -> None:
        train_step(ours, optimizer, scaler, batches.in_pieces(0, 1), config, runtime, counters, 0)

    def naive_step() -> None:
        x, y = batches.at(0)
        loss = TorchOps().cross_entropy(naive(x), y)
        naive_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        naive_optimizer.step()

    prompt = torch.zeros(1, 1, dtype=torch.long)

    def our_text() -> None:
        for _ in generate(ours, prompt, arguments.tokens, Sampling()):
            pass

    def naive_text() -> None:
        naive.eval()
        crop_and_recompute(naive, prompt, arguments.tokens, T, greedy=False)

    work = {"train ours": our_step, "train naive": naive_step, "decode ours": our_text, "decode naive": naive_text}
    times: dict[str, list[float]] = {name: [] for name in work}
    our_step()
    naive_step()  # warm
    for _ in range(arguments.rounds):
        for name, function in work.items():
            ours.train("train" in name)
            naive.train("train" in name)
            times[name].append(seconds(function))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "device": describe_device(runtime.device), "torch": torch.__version__, "precision": runtime.precision,
                "train_tokens_per_second": arguments.batch * T / medians["train ours"],
                "decode_tokens_per_second": arguments.tokens / medians["decode ours"],
                "train_ratio": medians["train naive"] / medians["train ours"],
                "decode_ratio": medians["decode naive"] / medians["decode ours"],
            },
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
