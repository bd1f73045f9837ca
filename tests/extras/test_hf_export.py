"""Exports, judged by transformers itself: the same logits, the same ids, the same text; and what cannot be exported."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import published
from inspected import made_checkpoint
from minigpt_cli.core.checkpoint import Checkpoint
from minigpt_cli.core.config import Config, ModelConfig, load_config
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.generate import Sampling, generate
from minigpt_cli.core.model import GPT
from minigpt_cli.core.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    same_ids,
    train_bpe,
    with_end_of_text,
)
from minigpt_cli.extras.huggingface import read, write
from minigpt_cli.extras.huggingface.architectures import ARCHITECTURES
from minigpt_cli.extras.huggingface.card import plain
from minigpt_cli.extras.huggingface.settings import settings_of
from minigpt_cli.extras.huggingface.write import FILES

Tiny = Callable[..., ModelConfig]
CHARACTERS = CharTokenizer("\n abcdefghij")
MODERN = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "bias_head": False}
LAYER = MODERN | {"norm": "layernorm"}


def shaken(config: ModelConfig, folder: Path, tokenizer: Tokenizer = CHARACTERS, **header: Any) -> Checkpoint:
    """A checkpoint whose every number matters: no gain is 1, no bias 0."""
    model = GPT(config, tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder.mkdir(exist_ok=True)
    return made_checkpoint(folder, model, tokenizer, config=Config(model=config).model_dump(), **header)


def assert_same_function(saved: Checkpoint, folder: Path) -> None:
    """Logits over the whole window, and greedy text as `generate` makes it with its own cache."""
    ours, theirs = saved.model().eval(), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(saved.tokenizer.vocab_size, (2, saved.config.model.block_size))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)
        new = saved.config.model.block_size - 3
        made = theirs.generate(ids[:1, :3], max_new_tokens=new, do_sample=False)
        expected = [int(chosen) for chosen, _ in generate(ours, ids[:1, :3], new, Sampling(0.0))]
    assert made[0, 3:].tolist() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cpu", "StableLm"), ("modern", "Qwen3"), ("gpt", "GPT2LMHeadModel"), ("v2", "GPT2LMHeadModel")],
)
def test_a_shipped_config_is_the_same_function_in_transformers(name: str, expected: str, tmp_path: Path) -> None:
    config = load_config(name, [("model.n_layer", 1)]).model
    saved = shaken(config, tmp_path, CharTokenizer("".join(map(chr, range(32, 97)))))
    notes: list[str] = []
    assert write(saved, tmp_path / "out", note=notes.append).startswith(expected)
    assert_same_function(saved, tmp_path / "out")
    assert ("dropout" in "".join(notes)) == (name == "v2")  # they cannot say its rates
    assert getattr(AutoConfig.from_pretrained(tmp_path / "out"), "embd_pdrop", 0) == 0  # GPT-2's, by default 0.1


@pytest.mark.parametrize(
    "tokenizer", [CHARACTERS, ByteTokenizer(), train_bpe(["a text " * 9], 260)], ids=lambda t: t.kind
)
def test_an_end_of_text_ends_texts_there_and_comes_back(tokenizer: Tokenizer, tmp_path: Path, tiny: Tiny) -> None:
    saved = shaken(tiny(bias_head=False), tmp_path, with_end_of_text(tokenizer))
    end = saved.tokenizer.end_of_text
    write(saved, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert end == theirs.eos_token_id == model.generation_config.eos_token_id == model.config.vocab_size - 1
    text = "a b<|endoftext|>c" if tokenizer.kind != "char" else "abc"
    assert theirs(text).input_ids == saved.tokenizer.encode(text).tolist()
    assert theirs.decode([*saved.tokenizer.encode("abc"), end], skip_special_tokens=True) == "abc"
    assert read(tmp_path / "out").tokenizer.to_json() == saved.tokenizer.to_json()
    assert same_ids(tokenizer.to_json(), tokenizer.to_json())
    assert not same_ids(saved.tokenizer.to_json(), tokenizer.to_json())  # it has an id more
    marked = saved.tokenizer.to_json()
    unmarked = {key: value for key, value in marked.items() if key != "end_of_text"}
    assert same_ids(marked, unmarked) == (tokenizer.kind == "bpe")


# Each architecture, and each option that it can have. What is left out is as in `tiny`: GPT-2's.
EXPORTS: list[tuple[str, dict[str, Any]]] = [
    *(("GPT2", {"bias_head": False, **o}) for o in (
        {"mlp": "gelu"}, {"mlp": "gelu_tanh", "bias_qkv": True, "tie_weights": True}, {"mlp": "relu2", "bias": False},
        {"n_kv_head": 1, "bias_qkv": True}, {"position": "none"}, {"norm_eps": 0.05, "mlp_width": 24},
        {"tie_weights": True, "bias_head": True}, {"dropout": 0.3})),
    *(("Llama", MODERN | o) for o in (
        {}, {"bias": True}, {"bias_qkv": True}, {"bias": True, "bias_qkv": True, "n_kv_head": 1}, {"head_width": 12},
        {"tie_weights": True, "norm_eps": 0.05, "rope_base": 100.0, "mlp_width": 20})),
    *(("Qwen3", MODERN | {"qk_norm": True} | o) for o in ({}, {"bias_qkv": True, "n_kv_head": 1}, {"head_width": 12})),
    *(("StableLm", LAYER | o) for o in ({}, {"qk_norm": True, "n_kv_head": 1}, {"bias_qkv": True, "bias_head": True})),
    *(("Starcoder2", LAYER | o) for o in ({"mlp": "gelu_tanh", "bias": True}, {"mlp": "relu2", "n_kv_head": 1})),
    *(("Persimmon", LAYER | {"qk_norm": True} | o) for o in ({"mlp": "relu2", "bias": True}, {"mlp": "gelu"},
                                                           {"mlp": "relu", "n_kv_head": 1, "bias_qkv": True})),
    *(("Arcee", MODERN | o) for o in ({"mlp": "relu2"}, {"mlp": "gelu", "bias": True, "head_width": 12})),
    *(("Apertus", MODERN | {"qk_norm": True} | o) for o in ({"mlp": "relu2"}, {"mlp": "relu", "bias_qkv": True})),
    *(("VaultGemma", MODERN | {"logit_softcap": 2.0} | o) for o in ({}, {"n_kv_head": 1, "head_width": 12})),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "options"), EXPORTS, ids=str)
def test_every_option_that_some_architecture_has_is_the_same_function_there_and_back(
    expected: str, options: dict[str, Any], tmp_path: Path, tiny: Tiny
) -> None:
    saved = shaken(tiny(block_size=12, **options), tmp_path)
    assert write(saved, tmp_path / "out").startswith(expected)
    assert_same_function(saved, tmp_path / "out")
    if options.get("bias_head") and not options.get("bias", True):
        with pytest.raises(UserError, match="has no such bias"):  # it went into norms that have none in our model
            read(tmp_path / "out")
        return
    back = read(tmp_path / "out")
    assert (back.header.step, back.tokenizer.to_json()) == (0, CHARACTERS.to_json())
    ids = torch.randint(len(CHARACTERS.chars), (2, 12))
    with torch.inference_mode():
        torch.testing.assert_close(back.model().eval()(ids), saved.model().eval()(ids), rtol=0, atol=1e-5)
    if set(back.tensors) == set(saved.tensors) and not options.get("n_kv_head") and not options.get("logit_softcap"):
        folded = {"model.norm.bias"} if options.get("bias_head") else set()
        assert all(torch.equal(back.tensors[n], t) for n, t in saved.tensors.items() if n not in folded)
        same = {"position": saved.config.model.position, "bias_head": saved.config.model.bias_head}
        assert back.config.model.model_copy(update=same) == saved.config.model


REFUSALS = {
    "no blocks, no norm": ({"n_layer": 0, "norm": "none"}, "GPT2LMHeadModel, cannot have model.norm=none"),
    "learned positions, RMSNorm": ({"norm": "rmsnorm", "bias_head": False}, "cannot have model.norm=rmsnorm"),
    "a gate with biases": (LAYER | {"bias": True}, "LlamaForCausalLM, cannot have model.norm=layernorm"),
    "a head's bias": (MODERN | {"bias_head": True}, "LlamaForCausalLM, cannot have model.bias_head=true"),
    "a cap": ({"logit_softcap": 3.0}, "cannot have model.logit_softcap=3.0"),
    "wide heads": ({"head_width": 12}, "cannot have model.head_width=12"),
    "two at once": (
        {"qk_norm": True, "logit_softcap": 3.0},
        "cannot have model.qk_norm=true and model.logit_softcap=3",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_architecture_expresses_is_refused_and_the_option_is_named(
    case: str, tmp_path: Path, tiny: Tiny
) -> None:
    options, message = REFUSALS[case]
    with pytest.raises(UserError, match=re.escape(message)):
        write(shaken(tiny(**options), tmp_path / "made"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_heads_bias_is_folded_where_the_head_is_wide_enough_and_refused_where_not(tmp_path: Path, tiny: Tiny) -> None:
    """16 numbers of the final norm's bias can make 12 biases of the head, but not 20: unless these happen to fit."""
    assert write(shaken(tiny(), tmp_path / "12"), tmp_path / "out") == "GPT2LMHeadModel"  # is checked above
    more = CharTokenizer("".join(map(chr, range(64, 84))))
    saved = shaken(tiny(), tmp_path / "20", more)
    with pytest.raises(UserError, match=r"model.bias_head: .* folded .*20 tokens, a width of 16: it misses .* by "):
        write(saved, tmp_path / "never")
    head = saved.tensors["model.head.weight"]
    saved.tensors["model.head.bias"] = head @ torch.randn(16)
    write(saved, tmp_path / "fits")
    assert_same_function(saved, tmp_path / "fits")


def test_rows_that_stand_for_no_token_are_left_out(tmp_path: Path, tiny: Tiny) -> None:
    saved = shaken(tiny(bias_head=False), tmp_path)
    expected = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    for name in ("model.token_embedding.weight", "model.head.weight"):
        saved.tensors[name] = torch.cat([expected[name], torch.ones(4, 16)])
    write(saved, tmp_path / "out")
    back = read(tmp_path / "out")
    assert all(torch.equal(back.tensors[n], expected[n]) for n in ("model.token_embedding.weight", "model.head.weight"))


# Tokenizers

TRICKY = "  a\n\n\tb  c \r\n'll <|endoftext|> 1234 Éé e\u0301 東京 😀\u200f\0 ."
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: CharTokenizer("".join(sorted(set(TRICKY + published.TEXT)))),
    "byte": ByteTokenizer,
    "bpe": lambda: train_bpe([published.TEXT], 300),
    **{name: lambda make=make: BpeTokenizer(make()) for name, make in published.DOCUMENTS.items()},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_gives_the_same_ids_and_the_same_text(kind: str, tmp_path: Path, tiny: Tiny) -> None:
    tokenizer = TOKENIZERS[kind]()
    write(shaken(tiny(bias_head=False), tmp_path, tokenizer), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (TRICKY, published.TEXT, " ", "", "a , b . c 's n't"):
        ids = tokenizer.encode(text).tolist()
        assert theirs(text).input_ids == theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == tokenizer.given_back(text)
    ids = tokenizer.encode(TRICKY).tolist()
    for start, end in itertools.combinations(range(0, len(ids), 3), 2):  # cut anywhere, also inside a character
        assert theirs.decode(ids[start:end]) == tokenizer.decode(ids[start:end])
    assert theirs.bos_token is theirs.eos_token is None
    assert read(tmp_path / "out").tokenizer.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("kind", [kind for kind, there in ARCHITECTURES.items() if not there.only_read])
def test_no_architecture_brings_a_tokenizer_of_its_own(kind: str, tmp_path: Path, tiny: Tiny) -> None:
    """transformers chooses the class of a tokenizer by model_type too, and some rebuild what the file says."""
    write(shaken(tiny(bias_head=False), tmp_path, ByteTokenizer()), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    options = {"bias_head": False, "position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
    (tmp_path / "out" / "config.json").write_text(
        json.dumps({"model_type": kind, "vocab_size": config["vocab_size"]} | settings_of(kind, tiny(**options)))
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TRICKY).input_ids == list(TRICKY.encode())


def test_an_unknown_character_is_an_error_there_as_here(tmp_path: Path, tiny: Tiny) -> None:
    write(shaken(tiny(bias_head=False), tmp_path), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(Exception, match="Missing"):
        theirs("abcz")
    assert "refuses others with an error" in (tmp_path / "out" / "README.md").read_text()


# The folder


def test_a_folder_appears_whole_and_replaces_only_an_export(tmp_path: Path, tiny: Tiny) -> None:
    saved = shaken(tiny(bias_head=False), tmp_path / "made")
    out = tmp_path / "deep" / "out"
    write(saved, out)
    assert set(os.listdir(out)) == FILES
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / "config.json").stat().st_mode}
    with pytest.raises(UserError, match="already holds a model; replace it with --force"):
        write(saved, out)
    (out / "README.md").write_text("mine")
    write(saved, out, force=True)
    assert (out / "README.md").read_text() != "mine"
    (out / ".DS_Store").touch()
    write(saved, out, force=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files and is never replaced"):
        write(saved, out, force=True)
    assert os.listdir(out.parent) == ["out"]


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    write(shaken(tiny(bias_head=False), tmp_path / "made"), tmp_path / "out")
    assert {path.stat().st_ino for path in (tmp_path / "out").iterdir()} <= flushed


def test_a_failure_leaves_nothing_behind(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    saved = shaken(tiny(bias_head=False), tmp_path / "made")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(saved, tmp_path / "outs" / "out")
    assert os.listdir(tmp_path / "outs") == []


def test_text_from_a_header_is_never_markup() -> None:
    evil = "<script>alert(1)</script> [a](http://b) `c` **d** | e\n# f\n- g\x1b[31m www.h.i &lt;"
    shown = plain(evil)
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert not re.search(r"(?<!\\)[<>\[\]`*|#&:/]|www\.", shown)
    assert re.sub(r"\\(.)", r"\1", shown) == evil.replace("\n", " ").replace("\x1b", "\ufffd")


def test_a_card_says_nothing_that_is_not_known(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny(bias_head=False)
    write(shaken(config, tmp_path, val_loss=None, step=0), tmp_path / "new")
    write(shaken(config, tmp_path, ByteTokenizer(), val_loss=2.0), tmp_path / "bytes")
    new, trained = ((tmp_path / name / "README.md").read_text() for name in ("new", "bytes"))
    assert not any(word in new for word in ("loss", "perplexity", "bits", "data |", "license:"))
    assert "| validation loss | 2.0000 nats per token |" in trained
    assert "| bits per byte | 2.8854 |" in trained  # 2 / ln 2
