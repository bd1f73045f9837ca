"""Small real runs: a dataset made by hand, settings of a second, and a listener that remembers."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minigpt_cli.core import checkpoint, shards
from minigpt_cli.core.checkpoint import SHARDED, Header
from minigpt_cli.core.config import Config, ModelConfig, parse_config
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.metrics import JsonLines, Listener
from minigpt_cli.core.model import GPT
from minigpt_cli.core.run import RunFolder, open_run
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.train import Result, train


@contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """PyTorch computes with `n` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def varied_model(config: ModelConfig, vocab_size: int, by: float) -> GPT:
    """A model in evaluation whose weights are large enough for every part to matter, and for varied text."""
    model = GPT(config, vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return model


RunTraining = Callable[..., "tuple[RunFolder, Recorder, Result]"]
CPU = Runtime(torch.device("cpu"), "fp32", compile=False)


def write_dataset(folder: Path, text: str) -> Dataset:
    """A dataset folder made by hand, as the format says: characters, split 90/10."""
    characters = sorted(set(text))
    place = {character: i for i, character in enumerate(characters)}
    ids = np.array([place[c] for c in text], dtype="<u2")
    n = int(0.9 * len(ids))
    folder.mkdir(parents=True)
    ids[:n].tofile(folder / "train.bin")
    ids[n:].tofile(folder / "val.bin")
    sizes = [{"tokens": k, "characters": k, "bytes": k} for k in (n, len(ids) - n)]
    meta = {
        "format_version": 1, "dtype": "uint16", "tokenizer": {"kind": "char", "chars": "".join(characters)},
        "train": sizes[0], "val": sizes[1], "inputs": [], "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    return Dataset(folder)


OPTIONS = {
    "position": ("learned", "none"),
    "norm": ("layernorm", "none"),
    "mlp": ("relu", "gelu"),
    "bias": (True, False),
    "bias_qkv": (True, False),
    "bias_head": (True, False),
    "tie_weights": (True, False),
}
MODERN = {
    "position": ("rope", "learned"),
    "norm": ("rmsnorm", "layernorm"),
    "qk_norm": (True, False),
    "n_kv_head": (1, None),
    "mlp": ("relu2", "swiglu"),
    "logit_softcap": (5.0, None),
}
MODEL_CHOICES = [
    dict(zip(table, values, strict=True))
    for table in (OPTIONS, MODERN)
    for values in itertools.product(*table.values())
]
MODEL_CHOICES += [{"vocab_multiple": 8, "tie_weights": tie} for tie in (True, False)]

SMALL: dict[str, dict[str, Any]] = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "dropout": 0.1},
    "train": {"batch_size": 4, "max_iters": 12, "learning_rate": 1e-2, "log_interval": 3, "eval_interval": 6,
              "checkpoint_interval": 6},
}  # fmt: skip


def saved(folder: RunFolder, kind: str = "last") -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of the folder's `last` or `best`, in either form, as they are stored. Everything verifies."""
    path = folder.newest_of(kind)
    assert path is not None, f"{folder.path}: no {kind}"
    if path.suffix != SHARDED:
        return checkpoint.load(path).header, load_file(path)
    tensors = {name: torch.empty(shape) for name, shape in shards.shapes(path).items()}
    shards.load(path, tensors)
    return shards.open_sharded(path).header, tensors


def small_config(**changes: Any) -> Config:
    """`small_config(dropout=0.0, max_iters=8)`: a config of seconds; each change finds its own section."""
    document = {section: dict(values) for section, values in SMALL.items()} | {"data": {}, "runtime": {}}
    for key, value in changes.items():
        section = next(name for name in document if key in type(getattr(Config(), name)).model_fields)
        document[section][key] = value
    return parse_config(document, "test")


class Recorder(Listener):
    """Remembers what a run told. `stop_at` asks for a stop after that step, as a signal would; `events` happen."""

    def __init__(self, stop_at: int | None = None, events: dict[int, Callable[[], object]] | None = None) -> None:
        self.events = events or {}
        self.records: list[dict[str, Any]] = []
        self.saves: list[tuple[str, int]] = []
        self.samples: list[str] = []
        self.notes: list[str] = []
        self.step, self.stop_at = 0, stop_at

    def log(self, record: dict[str, Any]) -> None:
        self.step = record["step"]
        self.records.append(record)

    def progress(self, step: int) -> None:
        self.step = step
        self.events.get(step, lambda: None)()

    def saved(self, path: Path, step: int) -> None:
        self.saves.append((path.name, step))

    def sample(self, step: int, text: str) -> None:
        self.samples.append(text)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def stop(self) -> bool:
        return self.stop_at is not None and self.step >= self.stop_at

    def losses(self, key: str) -> dict[int, float]:
        return {record["step"]: record[key] for record in self.records if key in record}


def run_in(
    path: Path, dataset: Dataset, config: Config, runtime: Runtime, recorder: Recorder, *, resume: bool = False
) -> tuple[RunFolder, Recorder, Result]:
    """A run as the command makes one: of several ranks, the first holds the folder and writes the metrics."""
    with open_run(path) if runtime.world.leads else nullcontext(RunFolder(path)) as folder:
        start = folder.newest()[0] if resume else None
        if start is None and runtime.world.leads:
            folder.set_aside()
        evaluated = start is not None and start.header.val_loss is not None
        listeners: list[Any] = [recorder]
        if runtime.world.leads:
            at, data_step = (start.header.step, start.header.progress.data_step) if start else (None, 0)
            listeners.append(JsonLines(folder.metrics, resume_at=at, evaluated=evaluated, data_step=data_step))
        try:
            result = train(config, dataset, folder, runtime, listeners, resume=start, stop=recorder.stop)
        finally:
            for metrics in listeners[1:]:
                metrics.close()
    return folder, recorder, result


class OnlyFloat32(TorchDispatchMode):
    """A device without float64, as Apple's GPUs are: whatever an operator makes of it is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_iter(made)), func
        return made
