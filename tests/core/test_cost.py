"""What a step costs, counted rather than timed: operators, the bytes they are given, waiting for the device."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.dataset import Batches
from minigpt_cli.core.generate import Sampling, choose, for_decoding, generate
from minigpt_cli.core.layers import KVCache
from minigpt_cli.core.measure import random_tokens
from minigpt_cli.core.model import GPT
from minigpt_cli.core.optim import make_optimizer
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.step import Statistics, train_step
from runs import small_config

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
SAMPLINGS = [Sampling(), Sampling(0.0), Sampling(0.8, top_k=5, top_p=0.9)]


class Meter(TorchDispatchMode):
    """Counts operators by name, and the bytes of the tensors that those which compute are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if not func.is_view:
            tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


def decode_step(
    behind: int, precision: str = "fp32", sampling: Sampling = SAMPLINGS[0], *, native: bool = False, **options: Any
) -> Meter:
    """The meter after one token behind so many others: the model's pass, and the choice."""
    config = ModelConfig(**{"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 256, **options})
    model = for_decoding(GPT(config, 65).eval(), Runtime(torch.device("cpu"), precision, compile=native))
    with torch.inference_mode():
        cache = KVCache(1, config, torch.device("cpu"), model.token_embedding.weight.dtype)
        cache.length = behind
        ids = torch.zeros(1, 1, dtype=torch.long)
        with Meter() as meter:
            choose(model(ids, cache)[:, -1].float(), sampling)
    return meter


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_token_costs_as_many_operators_wherever_it_stands(position: str, precision: str) -> None:
    early, late = (decode_step(n, precision, position=position) for n in (10, 200))
    assert early.calls == late.calls
    if position == "rope":
        assert decode_step(5000, precision, position=position).calls == early.calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_token_reads_grows_only_in_attention_and_only_to_the_window(precision: str) -> None:
    early, full, later = (decode_step(n, precision, position="rope").bytes for n in (10, 255, 5000))
    assert later == full
    grown = {name for name in full if full[name] != early[name]}
    assert len(grown) == 1
    assert "attention" in grown.pop()
    size, layers = (2 if precision == "bf16" else 4), 3
    keys_and_values = 2 * (256 - 11) * 32 * size * layers
    assert sum(full.values()) - sum(early.values()) == keys_and_values


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_of_a_decode_step_takes_no_more_operators_than_this(precision: str) -> None:
    """Each takes some microseconds, which is what a small model waits for."""
    one, two = (decode_step(10, precision, n_layer=n).calls.total() for n in (1, 2))
    assert two - one <= 24


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_token_of_decode_c_takes_a_few_operators_whatever_the_model(position: str) -> None:
    counts = {
        decode_step(behind, precision, native=True, n_layer=n, position=position).calls.total()
        for n in (1, 3) for precision in ("fp32", "bf16") for behind in (0, 200)
    }  # fmt: skip
    assert len(counts) == 1
    assert counts.pop() <= 16


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_decode_step_reads_nothing_back(precision: str, sampling: Sampling) -> None:
    for position in ("learned", "rope"):
        calls = decode_step(10, precision, sampling, position=position, qk_norm=True, logit_softcap=9.0).calls
        assert not [name for name in WAITS if calls[name]]


def test_there_is_one_prefill_for_the_prompt_and_one_for_each_refill() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16), 65)
    lengths: list[int] = []
    model.token_embedding.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    for _ in generate(model, torch.zeros(1, 5, dtype=torch.long), 100, Sampling()):
        pass
    assert lengths[:12] == [5] + [1] * 11  # to the window
    assert lengths[12:] == ([8] + [1] * 8) * 9 + [8] + [1] * 6


@contextmanager
def training(runtime: Runtime, **changes: Any) -> Iterator[Any]:
    """A function that takes one training step."""
    config = small_config(**changes)
    model = GPT(config.model, 40).to(runtime.device)
    optimizer, scaler = make_optimizer(model, config.train), runtime.scaler()
    counters = Statistics.zeros(runtime.device)
    batches = Batches(random_tokens(1000, 40), 8, 4, seed=1, sampling="random", device=runtime.device)
    taken = iter(range(100))

    def step() -> None:
        number = next(taken)
        train_step(model, optimizer, scaler, [batches.at(number)], config, runtime, counters, number)

    yield step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_reads_nothing_back(precision: str) -> None:
    with training(Runtime(torch.device("cpu"), precision, compile=False), grad_clip=1.0) as step:
        step()
        with Meter() as meter:
            step()
    assert not [name for name in WAITS if meter.calls[name]]


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 490), ("bf16", 530)])
def test_a_training_step_takes_no_more_operators_than_this(precision: str, limit: int) -> None:
    """Two layers with dropout, forward, backward, clip and optimizer, as it is today and a few more. Each is a kernel
    or two on a GPU. If this fails and the new operators are worth it, raise the number; but look at them first."""
    with training(Runtime(torch.device("cpu"), precision, compile=False), grad_clip=1.0) as step:
        step()
        with Meter() as meter:
            step()
    assert limit / 2 < meter.calls.total() <= limit, meter.calls


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_decoding_never_waits_for_the_gpu(recorded: bool, sampling: Sampling) -> None:
    runtime = Runtime(torch.device("cuda"), "fp32", compile=False)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=256), 65).to(runtime.device)
    notes: list[str] = []
    steps = generate(
        model, torch.zeros(2, 5, dtype=torch.long, device="cuda"), 30, sampling,
        record=runtime.record if recorded else None, note=notes.append,
    )  # fmt: skip
    for _ in range(10):  # warm, and recorded
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(15):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert notes == []


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("options", [{}, {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}], ids=str)
def test_a_cuda_graph_samples_what_eager_decoding_samples(options: dict[str, Any]) -> None:
    runtime = Runtime(torch.device("cuda"), "fp32", compile=False)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=160, **options), 65).to(runtime.device)
    prompt = torch.zeros(3, 1, dtype=torch.long, device="cuda")
    notes: list[str] = []
    texts = []
    for record in (None, runtime.record):
        generator = torch.Generator("cuda").manual_seed(1)
        steps = generate(model, prompt, 400, Sampling(), generator=generator, record=record, note=notes.append)
        texts.append(torch.stack([ids for ids, _ in steps]).tolist())
    assert notes == []
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same > 100, f"{same} of 400 agree"  # a draw on the edge may fall the other way, and the texts part
