"""Byte-level BPE documents (tokenizer.json): which of them give every text back exactly, and what a token stands for.

Owns all that is asked of the `tokenizers` library. Only what is understood here is handed on to it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Any

from minigpt_cli.core.errors import UserError

MAX_VOCAB = 1_000_000
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>")  # the names in use; the first is ours

# A letter or digit before white space. No pre-tokenizer in use (GPT-2's, GPT-4's, Llama 3's, Qwen's) lets a token reach
# over that border or looks back across it, so that text may be cut there without changing a single token.
BORDER = re.compile(r"(?<=[^\W_])[ \t\r\n]")
# Unicode's canonical composition (Qwen's tokenizers have it): an accent joins the letter before it, and what is read is
# the same text. White space joins nothing, so that text may be cut at a border here too.
NFC = {"type": "NFC"}
MAX_SAMPLE = 1 << 25  # characters to learn from
MAX_SAMPLE_WORDS = 300_000  # distinct words among them
_WORD = re.compile(r"\w+")
_PIECE = 2**14  # characters; many small pieces keep every core busy, and suit the caches


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte value: itself where it can be shown, else the next free from U+0100."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


ALPHABET = _byte_alphabet()


def checked_document(document: object) -> dict[str, Any]:
    """`document` reduced to the parts that matter, each checked; UserError with the reason where it is unfit."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise UserError("not a tokenizer.json: it has no model")
    normalizer = document.get("normalizer")
    if normalizer is not None and normalizer != NFC:
        raise UserError(
            "this tokenizer normalizes text (its normalizer is neither null nor NFC), so it cannot give it back exactly"
        )
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError("only byte-level BPE tokenizers are supported; this one's model is of another type")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError("this BPE tokenizer uses dropout or marks on word parts, so it cannot give text back exactly")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < MAX_VOCAB for i in vocab.values()):
        raise UserError(f"the BPE vocabulary must map each token to an id below {MAX_VOCAB}")
    if len(set(vocab.values())) != len(vocab):
        raise UserError("the BPE vocabulary gives one id to two tokens")
    if not ALPHABET.keys() <= vocab.keys():
        raise UserError("the BPE vocabulary lacks some of the 256 bytes, so some text would be lost")
    pairs = [_merge_pair(m) for m in merges] if isinstance(merges, list) else [None]
    if None in pairs:
        raise UserError("the BPE merges must be a list of pairs of tokens")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _checked_added(document.get("added_tokens") or []),
        "normalizer": normalizer,
        "pre_tokenizer": _checked_pre_tokenizer(document.get("pre_tokenizer")),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(model.get("ignore_merges", False)),
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in pairs if pair],
        },
    }


def _merge_pair(merge: object) -> tuple[str, str] | None:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(p, str) and p for p in parts):
        return parts[0], parts[1]
    return None


def _checked_pre_tokenizer(document: object) -> dict[str, Any]:
    """ByteLevel, alone or at the end of a sequence of splitters that drop nothing."""
    whole = document if isinstance(document, dict) else {}
    steps = whole.get("pretokenizers") if whole.get("type") == "Sequence" else [whole]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        steps = []
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise UserError(
            "only byte-level BPE tokenizers are supported; this one's pre-tokenizer does not end in ByteLevel"
        )
    if steps[-1].get("add_prefix_space", True):
        raise UserError(
            "this tokenizer puts a space before the text (add_prefix_space), so it cannot give it back exactly"
        )
    for step in steps[:-1]:
        if step.get("type") not in ("Split", "Digits", "Punctuation") or step.get("behavior") == "Removed":
            raise UserError(
                "this tokenizer's pre-tokenizer may change the text: only steps that split it are supported"
            )
    return {"type": "Sequence", "pretokenizers": steps}


def _checked_added(tokens: object) -> list[dict[str, Any]]:
    if not isinstance(tokens, list) or not all(isinstance(t, dict) for t in tokens):
        raise UserError("the tokenizer's added_tokens must be a list of objects")
    for token in tokens:
        content, number = token.get("content"), token.get("id")
        if not isinstance(content, str) or not content or type(number) is not int or not 0 <= number < MAX_VOCAB:
            raise UserError("each of the tokenizer's added_tokens needs a content and an id")
        if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
            raise UserError("the tokenizer has an added token that swallows white space, so it cannot give text back")
        if not token.get("special") and re.search(r"[^\W_]\s", content):
            raise UserError("the tokenizer has an added token of several words; long texts are cut between words here")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return [{"id": t["id"], "content": t["content"]} | {f: bool(t.get(f)) for f in flags} for t in tokens]


def token_table(document: dict[str, Any]) -> list[bytes]:
    """The bytes of text that each id of a checked document stands for; b"" for special tokens and unused ids."""
    model, added = document["model"], document["added_tokens"]
    special = {t["content"] for t in added if t["special"]}
    # A special token that plain text can lead to, by merges, stands for its text all the same.
    merged = {merge.replace(" ", "") for merge in model["merges"]}
    from_text = set(model["vocab"]) if model["ignore_merges"] else merged | ALPHABET.keys()
    plain = {t["content"]: t["id"] for t in added if not t["special"]}
    table = [b""] * (1 + max([*model["vocab"].values(), *(t["id"] for t in added)]))
    for token, i in model["vocab"].items():
        if token in plain or (token in special and token not in from_text):
            continue
        if not ALPHABET.keys() >= set(token):
            raise UserError("the BPE vocabulary holds a token that is not made of GPT-2's byte characters")
        table[i] = bytes(ALPHABET[c] for c in token)
    for content, i in plain.items():
        table[i] = content.encode("utf-8", "replace")
    return table


def with_end_of_text(document: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A checked document that has a special token for the end of a document, and its id: one of its own, or a new one
    after all others, as GPT-2 has it."""
    table, special = token_table(document), {t["content"]: t["id"] for t in document["added_tokens"] if t["special"]}
    for name in END_OF_TEXT:
        if name in special and not table[special[name]]:
            return document, special[name]
    number = document["model"]["vocab"].get(END_OF_TEXT[0], len(table))  # GPT-2's vocab.json has it among the others
    if number >= MAX_VOCAB:
        raise UserError(f"the tokenizer has no end-of-text token, and with {len(table):,} tokens no room for one")
    return document | {"added_tokens": [*document["added_tokens"], end_of_text_token(number)]}, number


def end_of_text_token(number: int) -> dict[str, Any]:
    """What a document's added_tokens say of it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": END_OF_TEXT[0]} | flags


def rust_tokenizer(document: dict[str, Any]) -> Any:
    """The library's tokenizer for a checked document. UserError where the library finds something else wrong."""
    import tokenizers

    try:
        rust = tokenizers.Tokenizer.from_str(json.dumps(document))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library is no Exception
        raise UserError(
            f"the tokenizers library refuses this tokenizer: {' '.join(str(error)[:200].split())}"
        ) from None
    for token in document["added_tokens"]:
        if rust.token_to_id(token["content"]) != token["id"]:
            raise UserError("the ids of the tokenizer's added tokens do not follow its vocabulary")
    return rust


def sample(texts: Iterable[str]) -> tuple[list[str], int]:
    """Pieces that stand for all of `texts`: every n-th one, and n. n is the smallest power of two that fits in memory.

    Learning takes nearly a kilobyte for each distinct word, so that both characters and words are counted.
    """
    kept: list[str] = []
    words: set[str] = set()
    size, step = 0, 1
    for i, piece in enumerate(piece for text in texts for piece in pieces(text)):
        if i % step:
            continue
        kept.append(piece)
        size += len(piece)
        words.update(_WORD.findall(piece))
        while len(kept) > 1 and (size > MAX_SAMPLE or len(words) > MAX_SAMPLE_WORDS):
            kept, step = kept[::2], step * 2
            size = sum(map(len, kept))
            words = {word for piece in kept for word in _WORD.findall(piece)}
    return kept, step


def learn(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """The document of a tokenizer learned from `texts`: all 256 bytes, then the most frequent pairs, as GPT-2 does."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    # The library asks for texts in threads of its own, where Ctrl-C is not heard. It is heard here, and ends the texts.
    stopped = threading.Event()
    texts = takewhile(lambda piece: not stopped.is_set(), (piece for text in texts for piece in pieces(text)))
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(rust.train_from_iterator, texts, trainer).result()
        finally:
            stopped.set()
    return json.loads(rust.to_str())


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces that can be tokenized each on its own; one piece where it has no border."""
    start = 0
    while start < len(text):
        border = BORDER.search(text, start + _PIECE)
        end = border.start() if border else len(text)
        yield text[start:end]
        start = end


def last_border(text: str) -> int:
    """The last position at which `text` may be cut; 0 where there is none."""
    for start in (max(0, len(text) - _PIECE), 0):  # nearly always found near the end
        position = 0
        for border in BORDER.finditer(text, start):
            position = border.start()
        if position:
            return position
    return 0
