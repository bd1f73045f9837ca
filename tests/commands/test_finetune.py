"""`prepare --tokenizer CKPT` and `train --init-from CKPT`: going on with another text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from commands.conftest import TINY, Done, call, sets, tree
from minigpt_cli import train
from minigpt_cli.core import checkpoint

QUICK = sets(
    train__batch_size=4, train__max_iters=30, train__eval_interval=15, train__learning_rate=1e-2, train__min_lr=0,
    train__warmup_iters=0, train__lr_schedule="constant", runtime__device="cpu", runtime__precision="fp32",
    data__path="data/new",
)  # fmt: skip
NEW = "winter and winter and no king; " * 200  # characters that the first text has, too


def fine_tune(source: str, *arguments: object) -> Done:
    return call("train", "--config", "finetune", "--init-from", source, *QUICK, *arguments)


@pytest.fixture
def new(here: Path) -> Path:
    """`here`, and the new text prepared with the tokens of its model."""
    (here / "new.txt").write_text(NEW)
    done = call("prepare", "new.txt", "--tokenizer", "checkpoints/best.safetensors")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == (
        "Next: minigpt train --config finetune --init-from checkpoints/best.safetensors --data data/new"
    )
    return here


@pytest.mark.parametrize("averaged", [False, True])
def test_fine_tuning_starts_at_the_loss_that_eval_gives_and_gets_better(new: Path, averaged: bool) -> None:
    source = "checkpoints/best.safetensors"
    if averaged:
        assert call("train", "--config", "gpt", *TINY, *sets(train__ema=0.8), "--out", "ema").code == 0
        source = "ema/best.safetensors"
        assert checkpoint.load(source).header.weights == "averaged"
    before = json.loads(call("eval", "--ckpt", source, "--data", "data/new", "--json").out)["loss"]
    done = fine_tune(source)
    assert done.code == 0, done.err
    assert f"starting from the weights of {source}" in done.err
    folder = new / "checkpoints" / "finetune"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    assert losses[0] == pytest.approx(before, abs=1e-6)
    assert losses[30] < losses[15] < losses[0] - 0.3
    best = checkpoint.load(folder / "best.safetensors")
    assert best.header.initialised_from is not None
    assert (best.header.initialised_from.name, best.header.initialised_from.step) == ("best.safetensors", 20)
    assert best.config.model == checkpoint.load(source).config.model
    assert "began as │ best.safetensors, step 20" in " ".join(call("info", folder / "best.safetensors").out.split())


def test_a_resumed_fine_tune_goes_on_from_its_own_last_and_needs_the_source_no_more(new: Path) -> None:
    source = "checkpoints/best.safetensors"
    assert fine_tune(source, "--out", "whole").code == 0
    assert fine_tune(source, "--out", "halves", *sets(train__max_iters=15)).code == 0
    (new / source).unlink()
    done = fine_tune(source, "--out", "halves", "--resume")
    assert done.code == 0, done.err
    assert "resuming halves/last.safetensors at step 15" in done.err
    whole, halves = (checkpoint.load(f"{name}/last.safetensors") for name in ("whole", "halves"))
    assert halves.header.initialised_from == whole.header.initialised_from is not None
    assert all(torch.equal(halves.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_what_it_began_with_is_known_when_it_ends(new: Path) -> None:
    assert fine_tune("checkpoints/best.safetensors", "--out", "tuned", *sets(train__max_iters=15)).code == 0
    resumed = train(resume=True, out="tuned", settings={"train.max_iters": 20})
    complete = train(resume=True, out="tuned")
    assert (resumed.reason, resumed.fine_tuned) == ("finished", True)
    assert (complete.reason, complete.fine_tuned) == ("complete", True)
    assert not train(resume=True, out="checkpoints").fine_tuned


def test_a_source_that_never_gets_better_stays_the_best(new: Path) -> None:
    done = fine_tune("checkpoints/best.safetensors", *sets(train__learning_rate=10.0, train__max_iters=2))
    assert done.code == 0, done.err
    best, source = (checkpoint.load(f"checkpoints/{name}best.safetensors") for name in ("finetune/", ""))
    assert best.header.step == 0
    assert all(torch.equal(best.tensors[name], tensor) for name, tensor in source.part("").items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "gpt"], ["describes another model", "model.n_layer: 6, there 1", "--config finetune"]),
        (["--set", "model.block_size=32"], ["block_size 32 is more than the 16 tokens"]),
        (["--set", "data.path=data/own"], ["another tokenizer", "prepare TEXT --out DIR --tokenizer checkpoints/best"]),
        (["--init-from", "nowhere.safetensors"], ["nowhere.safetensors: no such checkpoint"]),
        (["--init-from", "new.txt"], ["new.txt: not a checkpoint"]),
    ],
    ids=str,
)
def test_starts_that_are_wrong(new: Path, arguments: list[str], words: list[str]) -> None:
    assert call("prepare", "new.txt", "--out", "data/own").code == 0
    before = tree(new)
    done = fine_tune("checkpoints/best.safetensors", *arguments)
    assert done.code == (1 if "new.txt" in arguments else 2)
    for word in words:
        assert word in done.error
    assert tree(new) == before


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [("new.safetensors", "no such checkpoint"), ("checkpoints/config.yaml", "not a JSON document")],
)
def test_tokenizers_that_are_wrong(new: Path, tokenizer: str, words: str) -> None:
    done = call("prepare", "new.txt", "--out", "data/other", "--tokenizer", tokenizer)
    assert done.code == 2
    assert words in done.error
    assert not (new / "data" / "other").exists()


def test_a_model_that_knows_no_end_of_text_takes_no_documents(new: Path) -> None:
    (new / "new.jsonl").write_text('{"text": "winter"}\n' * 50)
    done = call("prepare", "new.jsonl", "--out", "data/other", "--tokenizer", "checkpoints/best.safetensors")
    assert done.code == 2
    assert "no token that ends a document" in done.error
    assert not (new / "data" / "other").exists()


def test_characters_that_the_model_does_not_know_are_named(new: Path) -> None:
    (new / "greek.txt").write_text(NEW + "λόγος")
    done = call("prepare", "greek.txt", "--tokenizer", "checkpoints/best.safetensors")
    assert done.code == 2
    assert "not in the vocabulary of 26 characters" in done.error
    assert not (new / "data" / "greek").exists()


@pytest.mark.skipif(importlib.util.find_spec("minigpt_cli.extras.huggingface") is None, reason="not there yet")
def test_fine_tuning_a_hugging_face_folder(new: Path) -> None:
    """GPT-2 as transformers writes it, with a tokenizer that our `prepare` learned."""
    transformers = pytest.importorskip("transformers")
    (new / "words.txt").write_text(NEW + (new / "input.txt").read_text())
    assert call("prepare", "words.txt", "--out", "data/bpe", "--tokenizer", "bpe", "--vocab-size", "300").code == 0
    document = json.loads((new / "data" / "bpe" / "meta.json").read_text())["tokenizer"]["tokenizer"]
    vocab_size = len(document["model"]["vocab"])
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    )
    theirs.save_pretrained("gpt2")
    (new / "gpt2" / "tokenizer.json").write_text(json.dumps(document))
    done = call("prepare", "new.txt", "--out", "data/hf", "--tokenizer", "gpt2")
    assert done.code == 0, done.err
    shorter = sets(data__path="data/hf", model__block_size=16, model__vocab_multiple=64)
    done = fine_tune("gpt2", *shorter, "--out", "tuned")
    assert done.code == 0, done.err
    records = [json.loads(line) for line in (new / "tuned" / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    tuned = checkpoint.load("tuned/best.safetensors")
    tokens = torch.from_numpy(_tokens(new / "data" / "hf" / "val.bin"))[: 16 * 8 + 1]
    with torch.no_grad():
        first = theirs.eval()(tokens[:-1].view(8, 16), labels=None).logits
    expected = torch.nn.functional.cross_entropy(first.flatten(0, 1), tokens[1:]).item()
    assert losses[0] == pytest.approx(expected, abs=0.05)  # of the first windows only
    assert losses[30] < losses[0] - 0.3
    assert tuned.config.model.mlp == "gelu_tanh"
    assert tuned.header.initialised_from is not None
    assert tuned.header.initialised_from.name == "gpt2"


def _tokens(path: Path) -> object:
    import numpy as np

    return np.fromfile(path, dtype="<u2").astype(np.int64)
