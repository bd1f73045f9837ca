"""What `minigpt bench` compares with: the naive model of tests/oracle, and Hugging Face's GPT-2, at the same shape.

Ours and theirs take turns, so that whatever else the machine does slows both; medians count.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt_cli.core.config import Config
from minigpt_cli.core.dataset import Batches, Tokens
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.generate import Sampling, for_decoding, generate, read_back
from minigpt_cli.core.model import GPT
from minigpt_cli.core.optim import make_optimizer
from minigpt_cli.core.runtime import Runtime, seed_everything
from minigpt_cli.core.step import Statistics, TrainStep

ORACLE = Path(__file__).parents[2] / "tests"


@dataclass(frozen=True)
class Contender:
    """`train` takes one optimizer step on a batch (x, y); `decode` samples so many tokens after one, for all streams.
    `longest` is how many tokens that can be; None: any number."""

    what: str
    train: Callable[[Tensor, Tensor], None]
    decode: Callable[[int], None]
    longest: int | None = None


@dataclass(frozen=True)
class Race:
    """Tokens per second of the other, and how many times ours makes of them. `tokens` is what each stream decoded."""

    what: str
    train_tokens_per_second: float
    decode_tokens_per_second: float
    train_ratio: float
    decode_ratio: float
    tokens: int
    rounds: dict[str, int]


def require(names: list[str]) -> None:
    """Raise UserError, with the remedy, unless each of `names` can be compared with here."""
    for name in names:
        if name not in MAKERS:
            raise UserError(f"--baseline {name}: no such baseline; there are {' and '.join(MAKERS)}")
    if "naive" in names and not (ORACLE / "oracle" / "model.py").is_file():
        raise UserError(
            "--baseline naive: the naive model is tests/oracle of minigpt's repository and source distribution, not of "
            "the wheel; get one of these and `pip install -e .` there"
        )
    if "hf" in names and importlib.util.find_spec("transformers") is None:
        raise UserError("--baseline hf: transformers is not installed; pip install 'minigpt[hf]'")


def race(
    names: list[str], config: Config, data: Tokens, vocab_size: int, training: Runtime, decoding: Runtime, *,
    steps: int, streams: int, tokens: int, max_seconds: float,
) -> dict[str, Race]:  # fmt: skip
    """Run ours against each of `names` (naive, hf): up to `steps` rounds of one training step each, then as many of
    `tokens` tokens each, for about `max_seconds` a time, one round at least. Raises UserError as `require` does."""
    require(names)
    device = training.device
    others = {name: MAKERS[name](config, vocab_size, device, streams) for name in names}
    batches = Batches(data, config.model.block_size, config.train.batch_size, seed=1, sampling="random", device=device)
    x_BT, y_BT = batches.at(0)
    ours = _ours(config, vocab_size, training, decoding, streams, x_BT)
    results = {}
    for name, other in others.items():
        n = tokens if other.longest is None else min(tokens, other.longest)
        pair = (ours, other)
        for contender in pair:  # warm, and what is recorded or compiled has been so
            for _ in range(TrainStep.WARM_UP + 2 if training.records else 1):
                contender.train(x_BT, y_BT)
            contender.decode(min(n, 8))
        step_seconds = _take_turns([partial(c.train, x_BT, y_BT) for c in pair], steps, max_seconds, training)
        text_seconds = _take_turns([partial(c.decode, n) for c in pair], steps, max_seconds, decoding)
        our_step, step, our_text, text = (statistics.median(times) for times in step_seconds + text_seconds)
        results[name] = Race(
            other.what, x_BT.numel() / step, n * streams / text, step / our_step, text / our_text, n,
            {"train": len(step_seconds[0]), "decode": len(text_seconds[0])},
        )  # fmt: skip
    return results


def _take_turns(
    pair: Sequence[Callable[[], None]], rounds: int, max_seconds: float, runtime: Runtime
) -> list[list[float]]:
    """Seconds of each call, a list for each of the two; one round at least."""
    times: list[list[float]] = [[] for _ in pair]
    begin = time.perf_counter()
    while not times[0] or (len(times[0]) < rounds and time.perf_counter() - begin < max_seconds):
        for work, seconds in zip(pair, times, strict=True):
            start = time.perf_counter()
            work()
            runtime.synchronize()
            seconds.append(time.perf_counter() - start)
    return times


def _ours(
    config: Config, vocab_size: int, training: Runtime, decoding: Runtime, streams: int, example_BT: Tensor
) -> Contender:
    """What `minigpt train` and `minigpt sample` run."""
    seed_everything(config.train.seed)
    model = GPT(config.model, vocab_size).to(training.device)
    decoder = for_decoding(GPT(config.model, vocab_size).to(decoding.device), decoding)
    optimizer, counters = make_optimizer(model, config.train, training.update_dtype), Statistics.zeros(training.device)
    pieces = config.train.accumulation
    training.wrap(model, model.blocks, example_BT.chunk(pieces)[0])
    step = TrainStep(model, optimizer, training.scaler(), config, training, counters)

    def train(x_BT: Tensor, y_BT: Tensor) -> None:
        step(list(zip(x_BT.chunk(pieces), y_BT.chunk(pieces), strict=True)), 0)

    def decode(n: int) -> None:
        prompt_BP = torch.zeros(streams, 1, dtype=torch.long, device=decoding.device)
        record = decoding.record if decoding.records else None
        for _ in read_back(generate(decoder, prompt_BP, n, Sampling(), record=record), decoding.read_every):
            pass

    return Contender("ours", train, decode)


def _naive(config: Config, vocab_size: int, device: torch.device, streams: int) -> Contender:
    """As the seed's scripts run: float32, a Python loop over heads, no cache, the context computed for every token."""
    sys.path.insert(0, str(ORACLE))
    try:
        from oracle.generate import crop_and_recompute
        from oracle.model import NaiveGPT
        from oracle.operations import TorchOps
    finally:
        sys.path.remove(str(ORACLE))
    operations = TorchOps()
    model = NaiveGPT(config.model, vocab_size, operations).to(device)
    prompt_BP = torch.zeros(streams, 1, dtype=torch.long, device=device)

    def decode(n: int) -> None:
        model.eval()
        crop_and_recompute(model, prompt_BP, n, config.model.block_size, greedy=False)

    train = _plain_step(model, config, lambda x_BT, y_BT: operations.cross_entropy(model(x_BT), y_BT))
    return Contender("naive, float32", train, decode)


def _hugging_face(config: Config, vocab_size: int, device: torch.device, streams: int) -> Contender:
    """transformers' GPT-2, of as many layers and heads, as wide and with as long a context; generates with its cache.

    What GPT-2 has not (rotary positions, other norms or feed-forwards, an untied head, ...) is GPT-2's own here.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = config.model
    theirs = GPT2Config(
        vocab_size=vocab_size, n_positions=shape.block_size, n_embd=shape.n_embd, n_layer=shape.n_layer,
        n_head=shape.n_head, resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(theirs)
    model.to(device)
    prompt_BP = torch.zeros(streams, 1, dtype=torch.long, device=device)

    def loss(x_BT: Tensor, y_BT: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x_BT).logits.flatten(0, 1), y_BT.flatten())

    def decode(n: int) -> None:
        model.eval()
        attend = torch.ones_like(prompt_BP)
        made = model.generate(
            prompt_BP, attention_mask=attend, max_new_tokens=n, min_new_tokens=n, do_sample=True, pad_token_id=0
        )
        assert made.shape[1] == n + 1, "every token must have been made"

    what = f"transformers' GPT-2, float32, {shape.n_layer} layers of {shape.n_embd}"
    return Contender(what, _plain_step(model, config, loss), decode, longest=shape.block_size - 1)


def _plain_step(model: nn.Module, config: Config, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., None]:
    """One AdamW step on the whole batch at once, as PyTorch does it by default."""
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=config.train.learning_rate)

    def train(x_BT: Tensor, y_BT: Tensor) -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss(x_BT, y_BT).backward()
        optimizer.step()

    return train


MAKERS: dict[str, Callable[[Config, int, torch.device, int], Contender]] = {"naive": _naive, "hf": _hugging_face}
