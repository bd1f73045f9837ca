"""The plan against what real training steps do: every byte that is held, counted operator by operator."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minigpt_cli.core import model as model_module
from minigpt_cli.core import plan as plan_module
from minigpt_cli.core.config import Config, parse_config
from minigpt_cli.core.measure import measure_training, random_tokens
from minigpt_cli.core.optim import WeightAverage, make_optimizer
from minigpt_cli.core.plan import Setting, plan_effort, plan_memory, setting_of
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.step import Statistics, train_step
from minigpt_cli.core.train import make_model

SHAPE: dict[str, Any] = {"n_layer": 3, "n_head": 2, "n_embd": 64, "block_size": 160}
MODERN: dict[str, Any] = {
    "position": "rope", "norm": "rmsnorm", "qk_norm": True, "n_kv_head": 1, "mlp": "swiglu", "bias": False,
}  # fmt: skip
# Each reaches its peak at another moment, or for another reason.
RUNS: dict[str, dict[str, Any]] = {
    "the blocks": {"batch_size": 8},
    "dropout": {"batch_size": 8, "dropout": 0.1, "mlp": "gelu"},
    "no norm, squared relu": {"batch_size": 8, "norm": "none", "mlp": "relu2"},
    "modern": {"batch_size": 8, **MODERN, "optimizer": "muon", "ema": 0.9},
    "recomputing": {"batch_size": 8, "n_layer": 6, "checkpoint_activations": True},
    "normed queries": {"batch_size": 8, "qk_norm": True, "position": "rope"},
    "the loss": {"batch_size": 4, "micro_batch_size": 1, "vocab": 3000, "logit_softcap": 30.0},
    "the loss in chunks": {"batch_size": 4, "vocab": 3000, "whole_logits": 1 << 20},
    "the loss in chunks, padded": {"batch_size": 4, "vocab": 3001, "vocab_multiple": 64, "whole_logits": 1 << 17},
    "the loss in chunks, capped": {"batch_size": 4, "vocab": 3000, "logit_softcap": 30.0, "whole_logits": 1 << 17},
    "the end of backward": {"batch_size": 1, "vocab": 30_000, "block_size": 16, "tie_weights": True},
    "the update": {"batch_size": 1, "n_embd": 256, "n_layer": 2, "block_size": 8, "optimizer": "muon"},
    "accumulating": {"batch_size": 2, "micro_batch_size": 1, "vocab": 30_000, "block_size": 16},
}  # fmt: skip


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that are still alive, and their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key)
        return made

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def config_of(changes: dict[str, Any]) -> Config:
    document: dict[str, Any] = {"model": dict(SHAPE), "train": {"max_iters": 10}, "runtime": {}}
    for key, value in changes.items():
        section = next(name for name in document if key in type(getattr(Config(), name)).model_fields)
        document[section][key] = value
    return parse_config(document, "test")


def held_by_two_steps(config: Config, vocab_size: int, runtime: Runtime) -> int:
    """The most bytes held in two whole steps: the second begins with the optimizer's state."""
    with Held() as held:
        model = make_model(config, vocab_size, runtime).train()
        optimizer, scaler = make_optimizer(model, config.train, runtime.update_dtype), runtime.scaler()
        average = WeightAverage(model, config.train.ema) if config.train.ema is not None else None
        counters, T = Statistics.zeros(runtime.device), config.model.block_size
        for step in range(2):
            windows = torch.randint(vocab_size, (config.train.batch_size, T + 1)).chunk(config.train.pieces(1))
            pieces = [(window[:, :-1], window[:, 1:]) for window in windows]
            train_step(model, optimizer, scaler, pieces, config, runtime, counters, step)
            if average is not None:
                average.update(step)
    return held.most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RUNS)
def test_the_planned_peak_is_what_real_steps_hold(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = dict(RUNS[name])
    vocab_size = changes.pop("vocab", 40)
    if whole := changes.pop("whole_logits", None):
        for module in (model_module, plan_module):
            monkeypatch.setattr(module, "WHOLE_LOGITS", whole)
    config = config_of(changes)
    again = config.runtime.checkpoint_activations
    runtime = Runtime(torch.device("cpu"), precision, compile=False, checkpoint_activations=again)
    planned = plan_memory(config, vocab_size, setting_of(runtime))
    assert planned.peak == pytest.approx(held_by_two_steps(config, vocab_size, runtime), rel=0.08), planned
    if name.split()[0] == "the":
        assert planned.moment.split()[1] in name.replace("blocks", "through"), planned


GPT2: dict[str, Any] = {"tie_weights": True, "bias_head": False, "n_layer": 12, "n_head": 12, "n_embd": 768,
                        "block_size": 1024, "mlp": "gelu", "bias_qkv": True}  # fmt: skip


def test_what_several_devices_hold_by_hand() -> None:
    """With DDP a whole copy each; with FSDP a slice of weights, gradients and moments, and what is gathered of others:
    embeddings and two blocks in 16 bits."""
    config, V, C = config_of({**GPT2, "batch_size": 64, "ema": 0.9}), 50257, 768
    block = 12 * C * C + 13 * C
    everything = 12 * block + (V + 1024) * C + 2 * C
    ddp, fsdp = (plan_memory(config, V, Setting("cuda", "bf16", 8, way)).parts for way in ("ddp", "fsdp"))
    for part, numbers in (("weights", 1), ("optimizer", 2), ("average", 1)):
        assert ddp[part] == 4 * numbers * everything
        assert fsdp[part] == pytest.approx(ddp[part] / 8, abs=4)
    assert ddp["gathered"] == 2 * (12 * 12 * C * C + V * C)  # autocast's copies of matrices, the head's too
    assert fsdp["gathered"] == 2 * ((V + 1024) * C + 2 * C + 2 * block)
    assert ddp["activations"] == fsdp["activations"]


def test_what_cuda_keeps_of_a_block_by_hand() -> None:
    """Autocast to bf16: two norms (input, two statistics in float32) and their results; q, k, v, the result of
    attention and a float32 a head; the feed-forward before and after GELU. Then the last norm, the head's input, ids.
    """
    config, C = config_of({**GPT2, "batch_size": 1}), 768
    block = 2 * (2 * C + 8 + 2 * C) + 2 * 3 * C + 2 * C + 4 * 12 + 2 * 2 * 4 * C
    ends = 2 * C + 8 + 2 * C + 16
    once = plan_memory(config, 50257, Setting("cuda", "bf16")).parts["activations"]
    again = plan_memory(config, 50257, Setting("cuda", "bf16", recompute=True)).parts["activations"]
    assert once == 1024 * (12 * block + ends)
    assert again == 1024 * (11 * 2 * C + block + ends)  # what goes into each block; and one of them whole


def test_the_training_text_counts_on_a_gpu_while_it_lies_there() -> None:
    config = config_of({"batch_size": 1})
    for kind, n_tokens, expected in (("cuda", 10**9, 4 * 10**9), ("cuda", 2 * 10**9, 0), ("cpu", 10**9, 0)):
        parts = plan_memory(config, 40, Setting(kind, "fp32"), n_tokens).parts
        assert parts.get("training text", 0) == expected


@pytest.mark.parametrize(
    ("changes", "setting", "workspaces"),
    [
        ({}, Setting("cuda", "bf16"), 4),
        ({"micro_batch_size": 1}, Setting("cuda", "bf16"), 2),  # not recorded
        ({}, Setting("cuda", "bf16", recompute=True), 2),
        ({}, Setting("cuda", "bf16", 2, "ddp"), 2),
        ({}, Setting("cpu", "fp32"), 0),
    ],
)
def test_cublas_has_a_workspace_for_each_thread_and_stream(
    changes: dict[str, Any], setting: Setting, workspaces: int
) -> None:
    """33.6 MB each on an H100, as PyTorch's allocator counts them."""
    memory = plan_memory(config_of({"batch_size": 2, **changes}), 40, setting)
    assert memory.parts.get("cuBLAS", 0) == pytest.approx(33_570_816 * workspaces, rel=0.001)


def test_effort_by_hand() -> None:
    config = config_of({**GPT2, "batch_size": 512, "micro_batch_size": 16, "max_iters": 1000})
    matrices = 12 * 12 * 768 * 768
    per_token = 6 * (matrices + 50257 * 768 + 2 * 12 * 1024 * 768)
    effort = plan_effort(config, 50257, Setting(ranks=8), 400e12)
    assert effort.flops_per_token == per_token
    assert effort.tokens == 1000 * 512 * 1024
    assert effort.tokens_per_second == pytest.approx(8 * 400e12 / per_token)
    assert effort.seconds == pytest.approx(effort.tokens / effort.tokens_per_second)
    assert effort.device_hours == pytest.approx(8 * effort.seconds / 3600)
    again = plan_effort(config, 50257, Setting(ranks=8, recompute=True), 400e12)
    assert again.recomputed == 2 * (matrices + 2 * 12 * 1024 * 768)  # the blocks' forward pass
    assert again.seconds / effort.seconds == pytest.approx(1 + again.recomputed / per_token)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["the blocks", "modern", "recomputing", "the loss in chunks", "accumulating"])
def test_the_planned_peak_is_what_cuda_allocates(name: str) -> None:
    changes = {**RUNS[name], "n_embd": 256, "block_size": 256}
    vocab_size = changes.pop("vocab", 40)
    changes.pop("whole_logits", None)
    config = config_of(changes)
    again = config.runtime.checkpoint_activations
    runtime = Runtime(torch.device("cuda"), "bf16", compile=False, checkpoint_activations=again)
    tokens = random_tokens(1000, vocab_size)
    torch.cuda.reset_peak_memory_stats()
    measured = measure_training(config, tokens, vocab_size, runtime, steps=2, max_seconds=60).peak_memory_bytes
    assert plan_memory(config, vocab_size, setting_of(runtime), 1000).peak == pytest.approx(measured, rel=0.15)
