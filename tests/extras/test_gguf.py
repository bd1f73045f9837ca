"""GGUF files: read back with the gguf library, and, where llama-cpp-python is installed, run by llama.cpp itself."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import published
from inspected import made_checkpoint
from minigpt_cli.core.checkpoint import Checkpoint
from minigpt_cli.core.config import Config, ModelConfig, load_config
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.model import GPT
from minigpt_cli.core.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    train_bpe,
    with_end_of_text,
)
from minigpt_cli.extras.gguf import write_gguf

Tiny = Callable[..., ModelConfig]
ASCII = CharTokenizer("\n" + "".join(map(chr, range(32, 96))))
MODERN = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "bias_head": False}
GPT2 = {"mlp": "gelu_tanh", "bias_head": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", MODERN | {"n_kv_head": 1, "bias_qkv": True, "rope_base": 500.0}),
    "llama with biases": ("llama", MODERN | {"bias": True, "head_width": 12, "tie_weights": True}),
    "qwen3": ("qwen3", MODERN | {"qk_norm": True, "n_kv_head": 1, "norm_eps": 1e-3}),
    "stablelm": ("stablelm", MODERN | {"norm": "layernorm", "qk_norm": True}),
    "stablelm of one head, tied": ("stablelm", MODERN | {"norm": "layernorm", "qk_norm": True, "n_head": 1,
                                                         "tie_weights": True}),
    "gpt2": ("gpt2", GPT2 | {"bias_qkv": True, "tie_weights": True}),
    "gpt2 with grouped keys": ("gpt2", GPT2 | {"n_kv_head": 1, "position": "none"}),
}  # fmt: skip


def shaken(config: ModelConfig, folder: Path, tokenizer: Tokenizer = ASCII, by: float = 0.1) -> Checkpoint:
    model = GPT(config, tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return made_checkpoint(folder, model, tokenizer, config=Config(model=config).model_dump())


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_an_end_of_text_is_said_or_refused(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny(**MODERN)
    learned = with_end_of_text(train_bpe(["a text " * 9], 260))
    write_gguf(shaken(config, tmp_path, learned), tmp_path / "x.gguf")
    assert fields(tmp_path / "x.gguf")["tokenizer.ggml.eos_token_id"] == learned.end_of_text
    with pytest.raises(UserError, match="has no end of text"):
        write_gguf(shaken(config, tmp_path, ByteTokenizer(end_of_text=True)), tmp_path / "y.gguf")


@pytest.mark.parametrize("case", MODELS)
def test_a_file_read_back_holds_the_weights_and_what_they_mean(case: str, tmp_path: Path, tiny: Tiny) -> None:
    kind, options = MODELS[case]
    config = tiny(**options)
    saved = shaken(config, tmp_path)
    write_gguf(saved, tmp_path / "x.gguf")
    found = fields(tmp_path / "x.gguf")
    tensors = {
        tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors
    }
    assert found["general.architecture"] == kind
    assert (found[f"{kind}.block_count"], found[f"{kind}.context_length"], found[f"{kind}.vocab_size"]) == (2, 8, 65)
    eps = found[f"{kind}.attention.layer_norm_{'rms_' if config.norm == 'rmsnorm' else ''}epsilon"]
    assert eps == pytest.approx(config.norm_eps or (1e-6 if config.norm == "rmsnorm" else 1e-5))
    assert found.get(f"{kind}.rope.freq_base", config.rope_base) == config.rope_base
    ours = saved.part("model.")
    assert torch.equal(tensors["token_embd.weight"], ours["token_embedding.weight"])
    assert torch.equal(tensors["blk.1.ffn_down.weight"], ours["blocks.1.mlp.down.weight"])
    assert torch.equal(tensors["blk.1.attn_output.weight"], ours["blocks.1.attn.proj.weight"])
    up = tensors["blk.0.ffn_up.weight"]
    both = torch.cat([tensors["blk.0.ffn_gate.weight"], up]) if config.mlp == "swiglu" else up
    assert torch.equal(both, ours["blocks.0.mlp.up.weight"])
    if kind == "stablelm":
        whole = ours["blocks.0.attn.norm_q.weight"].expand(config.n_head, -1)
        assert torch.equal(tensors["blk.0.attn_q_norm.weight"].view(whole.shape), whole)
    if kind == "llama":  # q . k of a rotation that pairs neighbours is ours, which pairs halves
        q, D = ours["blocks.0.attn.qkv.weight"][: config.n_head * config.each_head], config.each_head
        pairs = torch.stack([torch.arange(D // 2), torch.arange(D // 2) + D // 2], dim=1).flatten()
        assert torch.equal(tensors["blk.0.attn_q.weight"].unflatten(0, (-1, D)), q.unflatten(0, (-1, D))[:, pairs])
    assert ("output.weight" in tensors) == (kind == "stablelm" or not config.tie_weights)


TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "char": (lambda: ASCII, {"model": "rwkv"}),
    "byte": (ByteTokenizer, {"model": "rwkv"}),
    "bpe": (lambda: train_bpe([published.TEXT], 300), {"model": "gpt2", "pre": "gpt-2"}),
    "gpt2": (lambda: BpeTokenizer(published.gpt2()), {"model": "gpt2", "pre": "gpt-2"}),
    "llama3": (lambda: BpeTokenizer(published.llama3()), {"model": "gpt2", "pre": "llama-bpe"}),
    "qwen": (lambda: BpeTokenizer(published.qwen()), {"model": "gpt2", "pre": "qwen2"}),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_is_there_with_one_name_for_each_id(case: str, tmp_path: Path, tiny: Tiny) -> None:
    make, expected = TOKENIZERS[case]
    tokenizer = make()
    write_gguf(shaken(tiny(**MODERN), tmp_path, tokenizer), tmp_path / "x.gguf")
    found = {k.removeprefix("tokenizer.ggml."): v for k, v in fields(tmp_path / "x.gguf").items() if ".ggml." in k}
    assert {key: found[key] for key in expected} == expected
    assert len(set(found["tokens"])) == len(found["tokens"]) == len(found["token_type"]) == tokenizer.vocab_size
    if expected["model"] == "rwkv":
        assert [bytes.fromhex(token[2:]) for token in found["tokens"]] == tokenizer.token_bytes()
        assert "eos_token_id" not in found
    else:
        assert tokenizer.token_bytes()[found["eos_token_id"]] == b"\xff"  # which no text holds
        assert (found["add_bos_token"], found["add_eos_token"]) == (False, False)
        assert found["merges"] == tokenizer.to_json()["tokenizer"]["model"]["merges"]


def test_what_llama_cpp_does_otherwise_is_refused_by_name(tmp_path: Path, tiny: Tiny) -> None:
    strange = published.qwen()
    strange["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+"}
    cases: list[tuple[dict[str, Any], Tokenizer, str]] = [
        (GPT2 | {"mlp": "relu"}, ASCII, "llama.cpp's gpt2 cannot have model.mlp=relu, only gelu_tanh"),
        (MODERN | {"mlp": "relu2"}, ASCII, "as ArceeForCausalLM, which this model is, llama.cpp does not"),
        (MODERN | {"qk_norm": True, "bias_qkv": True}, ASCII, "qwen3 cannot have model.bias_qkv=true"),
        ({"norm": "none"}, ASCII, "cannot have model.norm=none"),
        (MODERN, CharTokenizer("aé"), "no tokenizer for characters beyond ASCII"),
        (MODERN, BpeTokenizer(strange), "splits text in a way"),
        (MODERN, BpeTokenizer(published.llama3() | {"model": published.qwen()["model"]}), "splits text in a way"),
    ]
    for options, tokenizer, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            write_gguf(shaken(tiny(**options), tmp_path, tokenizer), tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*x.gguf*"))


def test_without_the_library_one_line_says_what_to_install(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = shaken(tiny(**MODERN), tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MinigptError, match=r"pip install 'minigpt\[gguf\]'"):
        write_gguf(saved, tmp_path / "x.gguf")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("case", [*MODELS, "cpu", "modern"])
@pytest.mark.parametrize("name", ["char", "byte", "bpe", "qwen"])
def test_llama_cpp_gives_the_same_ids_and_logits(case: str, name: str, tmp_path: Path, tiny: Tiny) -> None:
    import llama_cpp

    tokenizer = TOKENIZERS[name][0]()
    config = tiny(**MODELS[case][1]) if case in MODELS else load_config(case, [("model.n_layer", 2)]).model
    saved = shaken(config.model_copy(update={"block_size": 32}), tmp_path, tokenizer, by=0.05)
    write_gguf(saved, tmp_path / "x.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=32, logits_all=True, verbose=False, n_threads=1,
                             flash_attn=False, type_k=0, type_v=0)  # fmt: skip
    text = "THE CAT, SAT 12 ON\n  IT'S" if name == "char" else published.TEXT[:30]
    ids = tokenizer.encode(text)[:24].tolist()
    assert theirs.tokenize(text.encode(), add_bos=False)[:24] == ids
    assert theirs.detokenize(ids) == b"".join(tokenizer.token_bytes()[i] for i in ids)
    theirs.eval(ids)
    with torch.inference_mode():
        ours = saved.model().eval()(torch.tensor([ids]))[0]
    found = torch.from_numpy(theirs.scores[: len(ids)])
    # GPT-2's activation comes from a table of half precision there.
    torch.testing.assert_close(found, ours, rtol=0, atol=2e-3 if config.mlp == "gelu_tanh" else 1e-4)
