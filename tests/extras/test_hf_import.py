"""Imports of small random models that transformers itself made and saved; and folders that are refused, or damaged."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import itertools
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import published
from minigpt_cli.core import checkpoint as checkpoints
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.errors import CheckpointError, MinigptError, UserError
from minigpt_cli.core.files import MAX_JSON_BYTES
from minigpt_cli.core.generate import Sampling, generate
from minigpt_cli.extras.huggingface import read
from minigpt_cli.extras.huggingface.architectures import ARCHITECTURES
from minigpt_cli.extras.huggingface.settings import options_of, settings_of

TOKENIZER = published.qwen()
V = published.LEARNED + 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 24, "max_position_embeddings": 12, "vocab_size": V, "bos_token_id": None,
         "eos_token_id": None, "pad_token_id": None}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 12, "vocab_size": V,
        "bos_token_id": None, "eos_token_id": None}  # fmt: skip
WHOLE_HEADS = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}}

# model_type, settings, and what the config must come to.
IMPORTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gpt2", GPT2, {"mlp": "gelu_tanh", "tie_weights": True, "bias_qkv": True, "dropout": 0.1, "mlp_width": None}),
    ("gpt2", GPT2 | {"activation_function": "relu", "tie_word_embeddings": False, "n_inner": 20, "resid_pdrop": 0.3},
     {"mlp": "relu", "tie_weights": False, "mlp_width": 20, "dropout_attn": 0.1, "dropout_mlp": 0.3}),
    ("llama", GROUPED, {"n_kv_head": 2, "norm": "rmsnorm", "rope_base": 10000.0, "norm_eps": None}),
    ("llama", SMALL | {"head_dim": 10, "rope_theta": 300.0, "rms_norm_eps": 1e-3, "tie_word_embeddings": True,
                       "attention_dropout": 0.2},
     {"head_width": 10, "rope_base": 300.0, "norm_eps": 1e-3, "tie_weights": True, "dropout_attn": 0.2}),
    ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}, {"bias": True, "bias_qkv": True}),
    ("mistral", GROUPED | {"sliding_window": None}, {"n_kv_head": 2, "bias": False}),
    ("qwen2", GROUPED, {"bias_qkv": True, "bias": False, "qk_norm": False}),
    ("qwen3", GROUPED | {"head_dim": 6, "rope_theta": 1e6}, {"qk_norm": True, "head_width": 6, "rope_base": 1e6}),
    ("stablelm", GROUPED | WHOLE_HEADS | {"qk_layernorm": True, "use_qkv_bias": True},
     {"qk_norm": True, "norm": "layernorm", "bias_qkv": True, "rope_base": 500.0}),
    ("starcoder2", GROUPED | {"sliding_window": None}, {"mlp": "gelu_tanh", "bias": True, "tie_weights": True}),
    ("persimmon", {**SMALL, **WHOLE_HEADS}, {"mlp": "relu2", "qk_norm": True, "bias_qkv": True}),
    ("arcee", GROUPED, {"mlp": "relu2", "norm": "rmsnorm", "norm_eps": 1e-5}),
    ("apertus", GROUPED | {"hidden_act": "relu", "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
     {"mlp": "relu", "qk_norm": True, "rope_base": 77.0}),
]  # fmt: skip


def saved(
    folder: Path, kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32, **how: Any
) -> transformers.PreTrainedModel:
    """A random model in which every number matters, saved by transformers, with a tokenizer beside it."""
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            zeros = kind == "stablelm" and "norm" in name and name.endswith("bias")  # ours has none there
            copies = "norms." in name  # of each head, and alike in ours
            parameter.add_(0.1 if copies else torch.randn_like(parameter), alpha=0 if zeros else 0.1)
    model.save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return model


def assert_same_function(found: checkpoints.Checkpoint, theirs: transformers.PreTrainedModel) -> None:
    """Logits of our checkpoint, saved and loaded, and greedy text with its cache."""
    ours = found.model().eval()
    ids = torch.randint(V, (2, 12))
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), theirs(ids).logits.float(), rtol=0, atol=1e-4)
        expected = theirs.generate(ids[:1, :4], max_new_tokens=8, do_sample=False)[0, 4:].tolist()
        assert [int(chosen) for chosen, _ in generate(ours, ids[:1, :4], 8, Sampling(0.0))] == expected


@pytest.mark.parametrize(
    ("kind", "settings", "expected"), IMPORTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_model_of_transformers_is_the_same_function_here(
    kind: str, settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    theirs = saved(tmp_path, kind, settings)
    found = read(tmp_path)
    assert {option: getattr(found.config.model, option) for option in expected} == expected
    assert (found.header.step, found.header.val_loss, found.header.dataset_fingerprint) == (0, None, "imported")
    written = tmp_path / "ours.safetensors"
    checkpoints.save(written, found.tensors, found.header.model_dump(exclude={"versions", "checksums"}))
    assert_same_function(checkpoints.load(written), theirs)


def test_shards_a_single_file_bf16_and_names_without_a_prefix(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "shards", "llama", GROUPED, max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same_function(read(tmp_path / "shards"), theirs)
    theirs = saved(tmp_path / "half", "gpt2", GPT2, torch.bfloat16)
    file = tmp_path / "half" / "model.safetensors"
    found = read(file)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    assert_same_function(found, theirs.float())
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()  # the mask, which GPT-2's own file holds too
    save_file(bare, file)
    assert_same_function(read(file), theirs)


def test_rows_that_stand_for_no_token_are_left_out_and_a_context_may_be_cut(tmp_path: Path) -> None:
    for kind, settings in (("gpt2", GPT2), ("llama", SMALL | {"tie_word_embeddings": True})):
        folder, notes = tmp_path / kind, []
        theirs = saved(folder, kind, settings | {"vocab_size": V + 50})
        found = read(folder, block_size=7, note=notes.append)
        assert "50 rows of its vocabulary stand for no token, and are left out" in notes
        ids = torch.randint(V, (2, 7))
        with torch.inference_mode():
            logits = found.model().eval()(ids)
            torch.testing.assert_close(logits, theirs(ids).logits[:, :, :V], rtol=0, atol=1e-4)
        assert found.config.model.block_size == 7
        with pytest.raises(UserError, match="--block-size 13: this model's context is 1 to 12"):
            read(folder, block_size=13)


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2", GPT2)
    notes: list[str] = []
    read(tmp_path, note=notes.append)
    left_out = (
        "embd_pdrop 0.1 (dropout of the embeddings) is left out: minigpt has none, and only training would use it"
    )
    assert notes == [left_out]
    (tmp_path / "tokenizer.json").write_text(json.dumps(published.llama3()))
    read(tmp_path, note=notes.append)
    assert notes[2:] == ["its tokenizer puts <|begin_of_text|> around every text; minigpt does not, so predictions may "
                         "differ", "1 rows of its vocabulary stand for no token, and are left out"]  # fmt: skip


@pytest.mark.parametrize("shape", published.DOCUMENTS)
def test_a_tokenizer_of_a_published_shape_gives_its_own_ids(shape: str, tmp_path: Path) -> None:
    document = published.DOCUMENTS[shape]()
    saved(tmp_path, "gpt2", GPT2)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    ours, theirs = read(tmp_path).tokenizer, tokenizers.Tokenizer.from_str(json.dumps(document))
    for text in (published.TEXT, "  x\n\n 12345 e\u0301 <think>e</think> 東", "", " "):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == ids
        assert ours.decode(ids) == ours.given_back(text)


# What is refused


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    saved(folder / "llama", "llama", GROUPED)
    saved(folder / "gpt2", "gpt2", GPT2)
    saved(folder / "stablelm", "stablelm", SMALL | WHOLE_HEADS | {"qk_layernorm": True})
    return folder


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling 'llama3' cannot be imported"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling 'yarn'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_scaling"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 cannot be imported"),
    ("llama", {"attention_bias": True}, r"layers.0.self_attn.q_proj.bias is missing"),
    ("llama", {"mlp_bias": True}, "attention_bias False cannot be imported"),
    ("llama", {"hidden_act": "gelu"}, "a llama model with mlp gelu cannot be imported"),
    ("llama", {"hidden_act": "quick_gelu"}, "model.mlp|mlp: .*quick_gelu"),
    ("llama", {"hidden_size": "many"}, "n_embd: .* not 'many'"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_head 3 does not divide n_head 4"),
    ("llama", {"num_hidden_layers": 900}, "900 layers, and there are 21 tensors"),
    ("llama", {"intermediate_size": 1 << 20}, r"is F32 \[24, 16\], and config.json makes it \[1048576, 16\]"),
    ("llama", {"num_hidden_layers": 1}, "has no place for model.layers.1"),
    ("llama", {"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
    ("llama", {"vocab_size": 200}, "vocab_size 200, but the tokenizer has 293"),
    ("llama", {"vocab_size": 1 << 40}, "vocab_size 1099511627776"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantized weights"),
    ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types other than full_attention"),
    ("llama", {"model_type": "mixtral"}, "model_type 'mixtral' is not among"),
    ("llama", {"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096 cannot be imported"),
    ("llama", {"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window True cannot be imported"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    ("gpt2", {"activation_function": "silu"}, "a gpt2 model with mlp swiglu"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual True"),
    ("stablelm", {"rope_parameters": {"rope_theta": 1e4}}, "partial_rotary_factor 0.25"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), SETTINGS, ids=lambda value: str(value)[:40])
def test_what_our_model_is_not_is_refused_by_name(
    kind: str, changes: dict[str, Any], message: str, folders: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders / kind, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message) as caught:
        read(folder)
    assert len(str(caught.value)) < 400


NONSENSE = [None, True, -1, 0, 0.5, 1 << 70, "x", [], [1], {}, {"rope_type": 3}, {"rope_theta": "x"}, float("nan")]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_any_nonsense_in_a_config_is_refused_or_harmless(kind: str, tiny: Callable[..., ModelConfig]) -> None:
    shape = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias_head": False}
    good = {"model_type": kind} | settings_of(kind, tiny(**shape))
    for key, value in itertools.product((*good, "rope_scaling", "layer_types"), NONSENSE):
        with contextlib.suppress(UserError):
            options_of(good | {key: value}, "config.json")
    for key in good:
        with contextlib.suppress(UserError):
            options_of({name: value for name, value in good.items() if name != key}, "config.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.norm.bias", "is not zero"), ("model.layers.1.self_attn.q_layernorm.norms.2.weight", "from head to head")],
)
def test_numbers_that_our_model_has_no_place_for_are_refused(
    name: str, message: str, folders: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders / "stablelm", tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name] += 0.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        read(folder)


Damage = Callable[[Path], object]


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _index(weight_map: object) -> Damage:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _as_int8(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, folder / "model.safetensors")


DAMAGES: dict[str, tuple[Damage, type[MinigptError], str]] = {
    "only a pickle": (_pickled, UserError, "its weights are a pickle"),
    "no config": (lambda f: (f / "config.json").unlink(), UserError, "there is no config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), UserError, "no tokenizer.json in it; transformers"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), UserError, "no model.safetensors"),
    "a list": (_rewrite("config.json", lambda b: b"[]"), UserError, "not a JSON object"),
    "no JSON": (_rewrite("config.json", lambda b: b"{"), UserError, "not a JSON document"),
    "deep JSON": (_rewrite("config.json", lambda b: b"[" * 100_000), UserError, "not a JSON document"),
    "much JSON": (_rewrite("config.json", lambda b: b" " * (MAX_JSON_BYTES + 1)), UserError, "of JSON, at most"),
    "many parts": (_rewrite("tokenizer.json", lambda b: b"[" + b"[]," * 4_000_000), UserError, "parts, at most"),
    "a path outside": (_index({"a": "../model.safetensors"}), UserError, "does not name safetensors files"),
    "a pickle in the index": (_index({"a": "pytorch_model.bin"}), UserError, "does not name safetensors files"),
    "an index of numbers": (_index({"a": 1}), UserError, "does not name safetensors files"),
    "a shard that is not there": (_index({"a": "b.safetensors"}), UserError, "no such file"),
    "cut short": (_rewrite("model.safetensors", lambda b: b[:-100]), CheckpointError, "damaged"),
    "empty": (_rewrite("model.safetensors", lambda b: b""), CheckpointError, "cut short"),
    "a header of a terabyte": (_rewrite("model.safetensors", lambda b: (1 << 40).to_bytes(8, "little") + b[8:]),
                               CheckpointError, "not a safetensors file"),
    "a header that is a list": (_rewrite("model.safetensors", lambda b: b"\2" + bytes(7) + b"[]" + b"x" * 99),
                                CheckpointError, "not a safetensors file"),
    "other numbers": (_as_int8, UserError, r"is I8 .*F32, BF16, F16 can be read"),
    "SentencePiece": (_rewrite("tokenizer.json", lambda b: json.dumps(published.sentencepiece()).encode()), UserError,
                      "tokenizer.json: this tokenizer normalizes text"),
    "whole words": (_rewrite("tokenizer.json", lambda b: b'{"model": {"type": "WordLevel", "vocab": {"cat": 0}}}'),
                    UserError, "only those that minigpt writes"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_folder_that_cannot_be_read_says_why(case: str, folders: Path, tmp_path: Path) -> None:
    damage, kind, message = DAMAGES[case]
    folder = Path(shutil.copytree(folders / "llama", tmp_path / "copy"))
    damage(folder)
    with pytest.raises(kind, match=message):
        read(folder)


def test_a_header_that_lies_about_its_size_takes_no_memory(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "llama", tmp_path / "copy"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 31)  # a hole: it takes no room on the disk
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read(folder)
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_JSON_BYTES
    tracemalloc.stop()


def test_a_path_that_is_no_model_says_why(tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    for path, message in (("no", "no such file or folder"), ("x.bin", "give a folder, or a .safetensors file")):
        with pytest.raises(UserError, match=message):
            read(tmp_path / path)
