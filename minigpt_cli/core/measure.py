"""What a config will cost on this machine: counted where that is possible, measured where it is not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from minigpt_cli.core.allocator import freed_memory_kept
from minigpt_cli.core.config import Config
from minigpt_cli.core.dataset import Batches, Tokens, resident_bytes
from minigpt_cli.core.generate import Sampling, for_decoding, generate, read_back
from minigpt_cli.core.model import GPT
from minigpt_cli.core.optim import make_optimizer
from minigpt_cli.core.runtime import Runtime, memory_advice, peak_flops, peak_memory_bytes
from minigpt_cli.core.step import Statistics, TrainStep
from minigpt_cli.core.train import make_model


@dataclass(frozen=True)
class TrainingSpeed:
    step_seconds: float  # median of the steady state
    tokens_per_second: float
    first_step_seconds: float  # cold: allocation, and compiling where that is on
    peak_memory_bytes: int  # of the rank that used most
    flops_utilisation: float | None  # model FLOP/s over the device's dense 16-bit peak; None where that is unknown
    loss: float  # mean over the measured steps: proof that they were real


def measure_training(
    config: Config, tokens: Tokens, vocab_size: int, runtime: Runtime, *, steps: int, max_seconds: float
) -> TrainingSpeed:
    """Time whole steps (data, forward, backward, clip, optimizer) of a fresh model; the cold first one apart.

    Over all ranks, each of which must take part.
    """
    train, world = config.train, runtime.world
    pieces = train.pieces(world.size)
    start = time.perf_counter()
    seconds: list[float] = []
    with memory_advice(train, runtime.device, world.size), freed_memory_kept():
        model = make_model(config, vocab_size, runtime)
        optimizer = make_optimizer(model, train, runtime.update_dtype)
        scaler, counters = runtime.scaler(), Statistics.zeros(runtime.device)
        batches = Batches(
            tokens, config.model.block_size, train.batch_size,
            seed=train.seed, sampling=config.data.sampling, device=runtime.device, rows=world.share(train.batch_size),
            vocab_size=vocab_size, resident_bytes=resident_bytes(runtime.memory_bytes),
        )  # fmt: skip
        runtime.wrap(model, model.blocks, batches.in_pieces(0, pieces)[0][0])
        train_step = TrainStep(model, optimizer, scaler, config, runtime, counters)

        def step(number: int) -> None:
            train_step(batches.in_pieces(number, pieces), number)
            runtime.synchronize()

        step(0)
        first = time.perf_counter() - start
        begin = time.perf_counter()
        while world.any(not seconds or (len(seconds) < steps and time.perf_counter() - begin < max_seconds)):
            now = time.perf_counter()
            step(len(seconds) + 1)
            seconds.append(time.perf_counter() - now)
    median, tokens_per_step = statistics.median(seconds), train.batch_size * config.model.block_size
    peak = peak_flops(runtime.device)
    return TrainingSpeed(
        median, tokens_per_step / median, first, world.largest(peak_memory_bytes(runtime.device)),
        model.flops_per_token() * tokens_per_step / median / (peak * world.size) if peak else None,
        world.total(counters.loss_sum).item() / world.size / (len(seconds) + 1),
    )  # fmt: skip


def measure_decoding(
    config: Config, vocab_size: int, runtime: Runtime, *, streams: int, tokens: int, max_seconds: float
) -> float:
    """Tokens per second, over all streams, of a fresh model sampling from a one-token prompt, as `sample` does.

    The time in which steps are recorded is left out.
    """
    model = for_decoding(GPT(config.model, vocab_size).to(runtime.device), runtime)
    prompt = torch.zeros(streams, 1, dtype=torch.long, device=runtime.device)
    for _ in generate(model, prompt, 4, Sampling()):  # warm up
        pass
    recording = 0.0

    def record(work: Callable[[], None]) -> Callable[[], None]:
        nonlocal recording
        runtime.synchronize()
        begin = time.perf_counter()
        replay = runtime.record(work)
        recording += time.perf_counter() - begin
        return replay

    runtime.synchronize()
    start, made = time.perf_counter(), 0
    steps = generate(model, prompt, tokens, Sampling(), record=record if runtime.records else None)
    for _ in read_back(steps, runtime.read_every):
        made += 1
        if time.perf_counter() - start > max_seconds:
            break
    runtime.synchronize()
    return made * streams / (time.perf_counter() - start - recording)


def random_tokens(n: int, vocab_size: int) -> Tokens:
    """A stand-in for a corpus where only speed matters."""
    return (
        np.random.default_rng(0).integers(0, vocab_size, size=n).astype(np.uint16 if vocab_size <= 65536 else np.uint32)
    )
