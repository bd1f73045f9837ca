"""A checkpoint -> one GGUF file, for what llama.cpp computes exactly. Weights stay float32.

The weights are those of the export to transformers, under the names of the `gguf` library. Its own names of
architectures are those of transformers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core import bpe
from minigpt_cli.core.checkpoint import MODEL, Checkpoint
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.files import atomic_write
from minigpt_cli.core.tokenizer import BpeTokenizer, Tokenizer
from minigpt_cli.extras.huggingface.architectures import ARCHITECTURES, Values
from minigpt_cli.extras.huggingface.settings import choose, resolved
from minigpt_cli.extras.huggingface.weights import pack

# What llama.cpp has of each: its GPT-2 knows one activation, its Qwen3 no biases.
CAN: dict[str, dict[str, Values]] = {
    "gpt2": {"mlp": ("gelu_tanh",)}, "llama": {}, "qwen3": {"bias_qkv": (False,)}, "stablelm": {},
}  # fmt: skip
# How text is split before it is merged, by the name under which llama.cpp knows it; and whether whole words come first.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTERS = {_LETTERS + r"\p{N}{1,3}" + _OTHERS: ("llama-bpe", True), _LETTERS + r"\p{N}" + _OTHERS: ("qwen2", False)}


def write_gguf(checkpoint: Checkpoint, path: Path) -> str:
    """Write `path`, whole or not at all, and return the name of the architecture.

    UserError for what llama.cpp cannot compute or tokenize exactly; MinigptError where the library is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MinigptError("GGUF files are written with the gguf library: pip install 'minigpt[gguf]'")
    import gguf

    config, vocab_size = checkpoint.config.model, checkpoint.tokenizer.vocab_size
    kind = _kind(config)
    describe_vocabulary = _vocabulary(checkpoint.tokenizer)
    theirs = {
        name: _as_llama_cpp(kind, name, tensor, config)
        for name, tensor in _with_whole_norms(pack(kind, config, checkpoint.part(MODEL), vocab_size)).items()
    }
    if kind == "stablelm" and config.tie_weights:  # it wants both
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(number, config.n_layer)
    with atomic_write(path) as file:
        writer = gguf.GGUFWriter(file.name, kind)
        _describe(writer, config, vocab_size)
        describe_vocabulary(writer)
        for name, tensor in theirs.items():
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return ARCHITECTURES[kind].name


def _kind(config: ModelConfig) -> str:
    kind = choose(config)
    if kind not in CAN:
        raise UserError(f"as {ARCHITECTURES[kind].name}, which this model is, llama.cpp does not compute it exactly")
    for option, values in CAN[kind].items():
        if (value := getattr(config, option)) not in values:
            raise UserError(
                f"llama.cpp's {kind} cannot have model.{option}={str(value).lower()}, only "
                f"{' or '.join(str(v).lower() for v in values)}"
            )
    return kind


def _with_whole_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms of which every head has a copy (StableLM's) as one tensor, (H, D)."""
    stacked: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        place, mark, _ = name.partition(".norms.")
        stacked.setdefault(f"{place}.weight" if mark else name, []).append(tensor)
    return {
        name: torch.stack(parts) if ".norms." not in name and len(parts) > 1 else parts[0]
        for name, parts in stacked.items()
    }


def _as_llama_cpp(kind: str, name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """GPT-2's matrices the usual way round; Llama's pairs side by side, (0, 1), (2, 3), ..., where ours lie apart."""
    if kind == "gpt2" and ".h." in name and tensor.dim() == 2:
        return tensor.t()
    if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
        return tensor.unflatten(0, (-1, 2, config.each_head // 2)).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _describe(writer: Any, config: ModelConfig, vocab_size: int) -> None:
    ours = resolved(config)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(ours["mlp_width"])
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(ours["n_kv_head"] if config.position == "rope" else config.n_head)
    writer.add_vocab_size(vocab_size)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(ours["norm_eps"])
    else:
        writer.add_layer_norm_eps(ours["norm_eps"])
    if config.position == "rope":
        writer.add_rope_freq_base(config.rope_base)
        writer.add_rope_dimension_count(config.each_head)
        writer.add_key_length(config.each_head)
        writer.add_value_length(config.each_head)


def _vocabulary(tokenizer: Tokenizer) -> Callable[[Any], None]:
    """What writes the tokenizer. UserError where llama.cpp has none that gives the same ids."""
    if isinstance(tokenizer, BpeTokenizer):
        return _merged(tokenizer)
    pieces = tokenizer.token_bytes()
    if tokenizer.end_of_text is not None:
        raise UserError(
            "llama.cpp's tokenizer of single bytes has no end of text, which this one has; export to transformers, or "
            "train with --tokenizer bpe"
        )
    if any(len(piece) > 1 for piece in pieces):
        raise UserError(
            "llama.cpp has no tokenizer for characters beyond ASCII; export to transformers, or train with "
            "--tokenizer byte or bpe"
        )

    def describe(writer: Any) -> None:
        # RWKV's: the longest token that fits, here always one byte; and no special tokens, which the others assume.
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list([rf"\x{piece[0]:02x}" for piece in pieces])
        writer.add_token_types([1] * len(pieces))

    return describe


def _merged(tokenizer: BpeTokenizer) -> Callable[[Any], None]:
    import gguf

    document = tokenizer.to_json()["tokenizer"]
    model, added = document["model"], document["added_tokens"]
    *splits, level = document["pre_tokenizer"]["pretokenizers"]
    by_regex = [
        s.get("pattern", {}).get("Regex") for s in splits if s.get("behavior") == "Isolated" and not s.get("invert")
    ]
    known = ("gpt-2", False) if level.get("use_regex", True) and not splits else None
    if len(splits) == len(by_regex) == 1 and not level.get("use_regex", True):
        known = SPLITTERS.get(by_regex[0])
    if known is None or known[1] != model["ignore_merges"]:
        raise UserError("this tokenizer splits text in a way that is not among those of llama.cpp that can be named")
    kinds = gguf.TokenType
    tokens = {i: (token, kinds.NORMAL) for token, i in model["vocab"].items()}
    tokens |= {t["id"]: (t["content"], kinds.CONTROL if t["special"] else kinds.USER_DEFINED) for t in added}
    table = [tokens.get(i, (f"[UNUSED_{i}]", kinds.UNUSED)) for i in range(tokenizer.vocab_size)]
    # llama.cpp takes token 11 for the end of a text unless told otherwise. No valid text holds the byte 0xff.
    never = model["vocab"][next(character for character, byte in bpe.ALPHABET.items() if byte == 0xFF)]

    def describe(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(known[0])
        writer.add_token_list([token for token, _ in table])
        writer.add_token_types([int(kind) for _, kind in table])
        writer.add_token_merges(model["merges"] or ["\u2610 \u2610"])  # none is an error: one that nothing leads to
        writer.add_bos_token_id(never)
        writer.add_eos_token_id(never if tokenizer.end_of_text is None else tokenizer.end_of_text)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)

    return describe
