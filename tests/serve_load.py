"""How fast `minigpt serve` is under load: python tests/serve_load.py CHECKPOINT. A table on stdout.

A real server in a process of its own, and 1, 8 and 32 clients that each ask for a text at the same time, in turn with
`generate` in this process (one text, the server idle). The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from minigpt_cli.core.checkpoint import Checkpoint, load
from minigpt_cli.core.config import RuntimeConfig
from minigpt_cli.core.generate import Sampling, for_decoding, generate, read_back
from minigpt_cli.core.model import GPT
from minigpt_cli.core.runtime import Runtime, choose_decoding_runtime
from served import Server, started


def requests(server: Server, clients: int, tokens: int, more: dict[str, Any]) -> float:
    """Tokens per second over all clients, from the first request to the last answer."""
    with ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()
        replies = list(pool.map(lambda _: server.complete(max_tokens=tokens, **more), range(clients)))
        seconds = time.perf_counter() - begin
    assert {reply.status for reply in replies} == {200}
    return clients * tokens / seconds


def decode(model: GPT, runtime: Runtime, tokens: int) -> float:
    """Tokens per second of `generate`, with one text."""
    begin = time.perf_counter()
    prompt_BP = torch.zeros(1, 1, dtype=torch.long, device=runtime.device)
    record = runtime.record if runtime.records else None
    for _ in read_back(generate(model, prompt_BP, tokens, Sampling(), record=record), runtime.read_every):
        pass
    return tokens / (time.perf_counter() - begin)


def decoder(checkpoint: Checkpoint, precision: str) -> tuple[GPT, Runtime]:
    model = checkpoint.model()
    runtime = choose_decoding_runtime(RuntimeConfig(precision=precision), model.parameter_counts()["total"])
    return for_decoding(model.to(runtime.device), runtime), runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--stream", action="store_true", help="ask for events instead of whole answers")
    parser.add_argument("--seed", action="store_true", help="ask with a seed, which is computed by itself")
    chosen = parser.parse_args()
    more: dict[str, Any] = {"stream": chosen.stream} | ({"seed": 1} if chosen.seed else {})
    model, runtime = decoder(load(chosen.checkpoint, weights_only=True), chosen.precision)
    speeds: dict[int, list[float]] = {n: [] for n in (0, *chosen.clients)}  # 0: generate
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        threads = str(torch.get_num_threads())
        options = ("--precision", chosen.precision)
        with started(chosen.checkpoint, *options, errors=errors, OMP_NUM_THREADS=threads) as server:
            print(errors.read_text().splitlines()[0])
            requests(server, max(chosen.clients), 10, more)  # warms up
            for _ in range(chosen.rounds):
                for n, found in speeds.items():
                    found.append(
                        requests(server, n, chosen.tokens, more) if n else decode(model, runtime, chosen.tokens)
                    )
    one = statistics.median(speeds[chosen.clients[0]])
    print(f"\n| clients | tokens/s, median of {chosen.rounds} | lowest to highest | against {chosen.clients[0]} |")
    print("| --- | --- | --- | --- |")
    for n, found in speeds.items():
        middle = statistics.median(found)
        name = str(n) if n else "`generate`, one text"
        print(f"| {name} | {middle:,.0f} | {min(found):,.0f} to {max(found):,.0f} | {middle / one:.2f}x |")


if __name__ == "__main__":
    main()
