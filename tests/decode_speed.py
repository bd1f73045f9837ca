"""How long one token takes on this CPU: by decode.c and operator by operator, for several streams and threads.

    python tests/decode_speed.py gpt --set runtime.precision=bf16

Milliseconds, medians of interleaved steps; with bf16 on a CPU without instructions for it, decode.c reads bf16 copies
and the operators stay in float32. It wants a quiet machine; docs/benchmarks.md has results.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer

from minigpt_cli.core import generate as generation
from minigpt_cli.core.config import Config, load_config, parse_override
from minigpt_cli.core.generate import Sampling, cache_dtype, for_decoding, generate, read_back
from minigpt_cli.core.layers import KVCache
from minigpt_cli.core.model import GPT
from minigpt_cli.core.native import NativeStep
from minigpt_cli.core.runtime import choose_decoding_runtime
from runs import cpu_threads

VOCABULARY = 65


def main(
    config: str,
    settings: Annotated[list[str] | None, typer.Option("--set")] = None,
    streams: str = "1,4,16,32,64",
    rounds: int = 40,
    tokens: int = 250,
) -> None:
    chosen = load_config(config, [("runtime.device", "cpu"), *map(parse_override, settings or [])])
    every, size = torch.get_num_threads(), chosen.model.block_size
    model = decoder(chosen)
    assert isinstance(model.native, NativeStep), "decode.c could not be compiled"
    model.native.most_streams = 1 << 30  # it is to compute them all
    print("| streams | tokens behind | threads | decode.c | operators |\n| --- | --- | --- | --- | --- |")
    for count in map(int, streams.split(",")):
        places = [(behind, n) for n in (1, every) for behind in (0, size - 1)] if count == 1 else [(size // 2, every)]
        for behind, threads in places:
            ours, theirs = steps(model, count, behind, threads, rounds)
            print(f"| {count} | {behind} | {threads} | {ours:.3f} | {theirs:.3f} |")
    for name, numbers in {"chosen as it goes": (1, every), "1": (1,), str(every): (every,)}.items():
        print(f"`generate`, {tokens} tokens, threads {name}: {whole(model, tokens, numbers):.3f} ms each")


def decoder(config: Config) -> GPT:
    model = GPT(config.model, VOCABULARY).eval()
    return for_decoding(model, choose_decoding_runtime(config.runtime, model.parameter_counts()["total"]))


@torch.inference_mode()
def steps(model: GPT, streams: int, behind: int, threads: int, rounds: int) -> list[float]:
    """Milliseconds of a step by decode.c, however many the streams, and by the model's own operators."""
    ids_B1, native = torch.zeros(streams, 1, dtype=torch.long), model.native
    dtypes = cache_dtype(model, streams), model.token_embedding.weight.dtype
    caches = [KVCache(streams, model.config, torch.device("cpu"), dtype) for dtype in dtypes]
    seconds: list[list[float]] = [[], []]
    with cpu_threads(threads):
        for _ in range(rounds):
            for way, times, cache in zip((native, None), seconds, caches, strict=True):
                model.native = way
                for _ in range(3):
                    cache.length, start = behind, time.perf_counter()
                    model(ids_B1, cache)
                    times.append(time.perf_counter() - start)
    model.native = native
    return [1e3 * statistics.median(times) for times in seconds]


def whole(model: GPT, tokens: int, threads: tuple[int, ...]) -> float:
    """Milliseconds a token of a text takes, with what chooses and hands it over."""
    generation.thread_numbers = lambda *_: threads
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        for _ in read_back(generate(model, torch.zeros(1, 1, dtype=torch.long), tokens, Sampling()), 1):
            pass
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:]) / tokens


if __name__ == "__main__":
    typer.run(main)
