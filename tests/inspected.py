"""Models, checkpoints and reports for the tests of `minigpt inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from minigpt_cli.core import checkpoint as checkpoints
from minigpt_cli.core.checkpoint import Checkpoint, load
from minigpt_cli.core.config import Config, ModelConfig
from minigpt_cli.core.model import GPT
from minigpt_cli.core.tokenizer import CharTokenizer, Tokenizer, train_bpe
from minigpt_cli.extras.inspect.analysis import analyse, as_plain
from minigpt_cli.extras.inspect.text import Text, Validation, given_text

V = 11
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
NOTHING = Validation(None, "", "none")
EVIL = "</script><script>pwned=1</script><img src=x onerror=pwned=1>{{7*7}}'\"&<!--\u2028\u202e\x1b[31m"


def made_checkpoint(
    folder: Path, model: GPT, tokenizer: Tokenizer, name: str = "best.safetensors", **header: Any
) -> Checkpoint:
    """A checkpoint file of this model, saved and loaded as any other."""
    fields: dict[str, Any] = {
        "config": Config(model=model.config).model_dump(), "tokenizer": tokenizer.to_json(), "step": 7,
        "tokens_seen": 1000, "val_loss": 2.5, "dataset_fingerprint": "none", "progress": {},
    }  # fmt: skip
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    if model.config.tie_weights:
        assert torch.equal(tensors["model.head.weight"], tensors["model.token_embedding.weight"])
    checkpoints.save(folder / name, tensors, fields | header)
    return load(folder / name)


def report_of(model: GPT, folder: Path, ids: list[int] | None = None, **more: Any) -> dict[str, Any]:
    """The report on `ids`, as JSON would give it back."""
    saved = made_checkpoint(folder, model, CharTokenizer("abcdefghijk"))
    text = Text(IDS.tolist() if ids is None else ids, "a test")
    validation = more.get("validation", NOTHING)
    return json.loads(json.dumps(as_plain(analyse(saved, saved.model(), text, validation)), allow_nan=False))


def evil_report(folder: Path) -> dict[str, Any]:
    """Hostile wherever it can be: vocabulary, prompt, file names, samples, where the data lay."""
    tokenizer = train_bpe([EVIL * 20], 300)
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=64), tokenizer.vocab_size)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "sample": EVIL, "val_loss": 1.0}))
    saved = made_checkpoint(folder, model, tokenizer, "<img src=x onerror=pwned=1>\x1b.safetensors")
    text = given_text(saved, EVIL, f"{EVIL}.txt")
    return analyse(saved, saved.model(), text, Validation(None, EVIL, EVIL))
