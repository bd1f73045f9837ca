"""Our tokenizers as tokenizer.json documents that need no code of ours, and the way back.

Ids, and the text of ids, are the same on both sides: special tokens in a text stay plain text (`split_special_tokens`),
nothing is put before or behind it, and no space is cleaned up.
"""

from __future__ import annotations

from typing import Any

from minigpt_cli.core import bpe
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer

_EVERY_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


def document_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json. A character that a character tokenizer does not know is an error there too, not a guess."""
    if isinstance(tokenizer, BpeTokenizer):
        return tokenizer.to_json()["tokenizer"]
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    added = [] if tokenizer.end_of_text is None else [bpe.end_of_text_token(tokenizer.end_of_text)]
    document: dict[str, Any] = {"version": "1.0", "added_tokens": added} | nothing
    if isinstance(tokenizer, CharTokenizer):
        vocab = {character: i for i, character in enumerate(tokenizer.chars)}
        words = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}  # of five characters: never in `vocab`
        return document | {"pre_tokenizer": _EVERY_CHARACTER, "decoder": {"type": "Fuse"}, "model": words}
    assert isinstance(tokenizer, ByteTokenizer)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return document | {"pre_tokenizer": level, "decoder": level,
                       "model": {"type": "BPE", "vocab": bpe.ALPHABET, "merges": []}}  # fmt: skip


def settings_of(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """The tokenizer_config.json."""
    added = document_of(tokenizer)["added_tokens"]
    end = next((token["content"] for token in added if token["id"] == tokenizer.end_of_text), None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size, "split_special_tokens": True,
        "clean_up_tokenization_spaces": False, "add_prefix_space": False,
        "bos_token": end, "eos_token": end, "unk_token": None, "pad_token": None,
    }  # fmt: skip


def tokenizer_of(document: Any, end: object = None) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of a tokenizer.json, and what to tell of it. UserError for one whose ids or text would differ.

    `end` is the model's `eos_token_id`, which ends a text where it is one special token.
    """
    model = document.get("model") if isinstance(document, dict) else None
    if isinstance(model, dict) and model.get("type") == "WordLevel":
        return _characters(document, model.get("vocab")), []
    if isinstance(model, dict) and model.get("vocab") == bpe.ALPHABET:
        for tokenizer in (ByteTokenizer(), ByteTokenizer(end_of_text=True)):
            if document.get("added_tokens") == document_of(tokenizer)["added_tokens"]:
                return tokenizer, []
    notes = []
    if surrounding := _special_tokens_around(document.get("post_processor") if isinstance(document, dict) else None):
        names = " and ".join(surrounding)
        notes.append(f"its tokenizer puts {names} around every text; minigpt does not, so predictions may differ")
    try:
        return BpeTokenizer(document, end), notes
    except UserError:  # Llama 3 has several ends, and some models one that stands for text
        return BpeTokenizer(document), notes


def _characters(document: dict[str, Any], vocab: Any) -> CharTokenizer:
    """A character tokenizer that `document_of` described."""
    known = isinstance(vocab, dict) and vocab and all(isinstance(c, str) and len(c) == 1 for c in vocab)
    tokenizer = CharTokenizer("".join(sorted(vocab)) if known else "?", end_of_text=bool(document.get("added_tokens")))
    expected = document_of(tokenizer)
    if any(document.get(key) != expected[key] for key in ("normalizer", "pre_tokenizer", "added_tokens")) or (
        vocab != expected["model"]["vocab"]
    ):
        raise UserError(
            "of tokenizers of whole words (WordLevel) only those that minigpt writes can be read: single characters, "
            "their ids in the order of their code points"
        )
    return tokenizer


def _special_tokens_around(processor: Any) -> list[str]:
    """The special tokens that a post-processor adds to one text."""
    if not isinstance(processor, dict):
        return []
    steps = processor.get("processors") if processor.get("type") == "Sequence" else [processor]
    pieces = [p for s in steps or [] if isinstance(s, dict) for p in s.get("single") or [] if isinstance(p, dict)]
    return [str(p["SpecialToken"].get("id"))[:40] for p in pieces if isinstance(p.get("SpecialToken"), dict)]
