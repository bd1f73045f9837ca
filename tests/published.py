"""Small tokenizer.json documents in exactly the shapes in which well-known models publish theirs."""

from __future__ import annotations

import json
from typing import Any

from minigpt_cli.core import bpe

TEXT = "The cat sat on the mat; it's 12 o'clock, and I'll say\n\tso. \r\n  Naïve café, 東京 and 😀 in 1984!\n\n" * 20
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEARNED = 290  # tokens, before the special ones
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _byte_level(**flags: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True} | flags


def _splitting(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def _learned(as_pairs: bool, **more: Any) -> dict[str, Any]:
    model = bpe.learn([TEXT], LEARNED)["model"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, **more, "vocab": model["vocab"],
            "merges": merges if as_pairs else [" ".join(pair) for pair in merges]}  # fmt: skip


def _document(model: dict[str, Any], special: list[tuple[str, bool]], **parts: Any) -> dict[str, Any]:
    first = len(model["vocab"])
    added = [{"id": first + i, "content": name, **_FLAGS, "special": kind} for i, (name, kind) in enumerate(special)]
    document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                "decoder": _byte_level(use_regex=True), "model": model} | parts  # fmt: skip
    return json.loads(json.dumps(document))


def gpt2() -> dict[str, Any]:
    """No type in the model, merges as strings, the special token in the vocabulary too."""
    model = _learned(as_pairs=False)
    for key in ("type", "byte_fallback"):
        del model[key]
    document = _document(model, [("<|endoftext|>", True)], pre_tokenizer=_byte_level(), post_processor=_byte_level())
    model["vocab"]["<|endoftext|>"] = len(model["vocab"])
    return document | {"model": model}


def llama3() -> dict[str, Any]:
    """ignore_merges, digits in threes, and a template that puts a special token before every text."""
    begin = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [LEARNED],
                                                         "tokens": ["<|begin_of_text|>"]}}}  # fmt: skip
    return _document(
        _learned(as_pairs=True, ignore_merges=True), [("<|begin_of_text|>", True), ("<|end_of_text|>", True)],
        pre_tokenizer=_splitting(_LLAMA_3),
        post_processor={"type": "Sequence", "processors": [_byte_level(), template]},
    )  # fmt: skip


def qwen() -> dict[str, Any]:
    """NFC, single digits, special tokens behind the vocabulary, and added ones that are not special."""
    special = [("<|endoftext|>", True), ("<|im_start|>", True), ("<think>", False)]
    return _document(
        _learned(as_pairs=False, ignore_merges=False), special,
        normalizer={"type": "NFC"}, pre_tokenizer=_splitting(_LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")),
        post_processor=_byte_level(use_regex=False),
    )  # fmt: skip


def sentencepiece() -> dict[str, Any]:
    """What Llama 2's and Mistral's look like: spaces become a character of their own, and bytes are spelled out."""
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    escape = {"type": "Sequence", "normalizers": steps}
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}
    model = _learned(as_pairs=False, byte_fallback=True, unk_token="<unk>") | {"vocab": vocab, "merges": ["▁ a"]}
    return _document(model, [], normalizer=escape, pre_tokenizer=None)


DOCUMENTS = {"gpt2": gpt2, "llama3": llama3, "qwen": qwen}
