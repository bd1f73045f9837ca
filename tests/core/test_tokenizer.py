"""Every tokenizer gives back exactly the text it was given, and nothing hostile gets one built."""

from __future__ import annotations

import copy
import itertools
import json
import signal
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt_cli.core import bpe
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    from_json,
    read_tokenizer_file,
    train_bpe,
    with_end_of_text,
)

PROSE = (
    "the cat sat on the mat, and the cat's hat sat there; it's 12 o'clock\n\tSo it is.\r\n  Naïve café 東京 😀 עברית\n"
    * 40
)

# All of Unicode that is text (no surrogates), and often what is likely to go wrong.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
TRICKY = st.text(st.sampled_from("aA1 \t\r\n'sé\u0301\u200f\u202eש東😀\U0010ffff\0\x1b<|>.,"), max_size=200)


@pytest.fixture(scope="module")
def trained() -> BpeTokenizer:
    return train_bpe([PROSE], 400)


def gpt2_document() -> dict[str, Any]:
    """A tokenizer.json in the exact shape of GPT-2's: no type in the model, merges as strings, one special token."""
    learned = bpe.learn([PROSE], 300)["model"]
    vocab = learned["vocab"] | {"<|endoftext|>": len(learned["vocab"])}
    special = {"id": len(vocab) - 1, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special | {"normalized": True, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": vocab,
            "merges": [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]],
        },
    }


def assert_round_trip(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert ids.ndim == 1
    assert ids.dtype == (np.uint16 if tok.vocab_size <= 65536 else np.uint32)
    assert tok.decode(ids) == text
    assert tok.decode(ids.tolist()) == text
    table = tok.token_bytes()
    assert len(table) == tok.vocab_size
    assert b"".join(table[i] for i in ids) == text.encode("utf-8")


@given(ANY_TEXT | TRICKY)
@example("")
@example("\r")
@example("<|endoftext|>")
def test_char_and_byte_round_trip(text: str) -> None:
    assert_round_trip(ByteTokenizer(), text)
    if text:
        assert_round_trip(CharTokenizer("".join(sorted(set(text)))), text)


@given(ANY_TEXT | TRICKY)
@example("")
@example("one <|endoftext|> two")
def test_bpe_round_trip(trained: BpeTokenizer, text: str) -> None:
    assert_round_trip(trained, text)
    assert_round_trip(_gpt2_like(), text)


_cached: list[BpeTokenizer] = []


def _gpt2_like() -> BpeTokenizer:
    if not _cached:
        _cached.append(BpeTokenizer(gpt2_document()))
    return _cached[0]


@given(ANY_TEXT | TRICKY)
def test_json_round_trip_gives_the_same_ids(trained: BpeTokenizer, text: str) -> None:
    chars = CharTokenizer("".join(sorted(set(text + "x"))))
    for tok in (trained, ByteTokenizer(), chars):
        again = from_json(json.loads(json.dumps(tok.to_json())))
        assert again.to_json() == tok.to_json()
        assert (again.kind, again.vocab_size) == (tok.kind, tok.vocab_size)
        np.testing.assert_array_equal(again.encode(text), tok.encode(text))


def test_char_ids_are_the_seed_scripts_ids() -> None:
    text = "hello, wörld"
    chars = sorted(set(text))
    assert CharTokenizer("".join(chars)).encode(text).tolist() == [chars.index(c) for c in text]


@pytest.mark.parametrize("size", [65535, 65536, 65537])
def test_char_vocabulary_at_the_edge_of_uint16(size: int) -> None:
    chars = "".join(chr(c) for c in range(1, size + 2049) if not 0xD800 <= c < 0xE000)[:size]
    assert len(chars) == size
    tok = CharTokenizer(chars)
    assert_round_trip(tok, chars)
    assert tok.encode(chars).tolist() == list(range(size))
    with pytest.raises(UserError, match=r"U\+10FFFF"):
        tok.encode("a\U0010ffff")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab é", "this character is not in the vocabulary of 3 characters: 'é' (U+00E9)"),
        ("a\x1b", "this character is not in the vocabulary of 3 characters: U+001B"),
        ("aZ", "this character is not in the vocabulary of 3 characters: 'Z' (U+005A)"),
        ("\udcff", "this character is not in the vocabulary of 3 characters: U+DCFF"),
    ],
)
def test_unknown_characters_are_named_safely(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        CharTokenizer(" ab").encode(text)
    assert str(error.value) == message


def test_many_unknown_characters_are_counted_and_ten_named() -> None:
    with pytest.raises(UserError) as error:
        CharTokenizer("a").encode("bcdefghijklmnop")
    assert "these 15 characters" in str(error.value)
    assert str(error.value).count("U+") == 10


@pytest.mark.parametrize("tok", [ByteTokenizer(), train_bpe(["a"], 257)])
def test_half_a_surrogate_pair_is_refused(tok: Tokenizer) -> None:
    with pytest.raises(UserError, match="U\\+DCFF"):
        tok.encode("abc\udcff")


def test_decoding_bytes_that_are_no_text_and_ids_that_do_not_exist() -> None:
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    for ids in ([256], [-1]):
        with pytest.raises(ValueError, match=r"0\.\.255"):
            ByteTokenizer().decode(ids)


# The library given the whole text at once is the reference for our pieces.


def whole(tok: BpeTokenizer, text: str) -> list[int]:
    return tok._rust.encode(text, add_special_tokens=False).ids


@given(
    st.lists(TRICKY | st.sampled_from(["word ", "\r\n", "\n\n  x", " \n", "don't", "...\n"]), max_size=30),
    st.integers(1, 9),
)
def test_pieces_give_the_ids_of_the_whole(trained: BpeTokenizer, parts: list[str], size: int) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "_PIECE", size)
        assert "".join(bpe.pieces(text)) == text
        assert trained.encode(text).tolist() == whole(trained, text)
        cut = trained.last_cut(text)
        assert whole(trained, text[:cut]) + whole(trained, text[cut:]) == whole(trained, text)


GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@given(st.lists(TRICKY | st.sampled_from(["word ", "\r\n", "\n\n  x", " \n", "don't", "...\n"]), max_size=30))
def test_pieces_give_the_ids_of_the_whole_with_gpt4s_splitting(parts: list[str]) -> None:
    text = "".join(parts)
    document = gpt2_document()
    split = {"type": "Split", "pattern": {"Regex": GPT4_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    tok = BpeTokenizer(document)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "_PIECE", 3)
        assert tok.encode(text).tolist() == whole(tok, text)
        assert_round_trip(tok, text)


@pytest.mark.parametrize(
    "text", ["x" * 50_000, " " * 50_000, "\n" * 50_000, "\r\n" * 30_000, "no newline at all " * 3000]
)
def test_long_texts_in_which_cuts_are_rare(trained: BpeTokenizer, text: str) -> None:
    assert trained.encode(text).tolist() == whole(trained, text)


def test_a_long_text_is_shared_out_to_every_core(trained: BpeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[str]] = []

    class Watched:
        def encode_batch_fast(self, pieces: list[str], **options: Any) -> Any:
            batches.append(pieces)
            return rust.encode_batch_fast(pieces, **options)

    rust, text = trained._rust, PROSE * 100
    monkeypatch.setattr(trained, "_rust", Watched())
    assert trained.encode(text).tolist() == rust.encode(text, add_special_tokens=False).ids
    [pieces] = batches  # one call, in which the library may use all cores
    assert len(pieces) >= len(text) // 20_000
    assert max(map(len, pieces)) < 20_000


def test_the_last_border_may_lie_far_back() -> None:
    assert bpe.last_border("one two\n" + "x" * 40_000) == 7
    assert bpe.last_border(" \n" * 40_000) == 0


def test_ctrl_c_is_heard_while_learning() -> None:
    timer = threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        train_bpe(itertools.repeat(PROSE), 300)
    timer.join()


def test_learning_is_deterministic_and_says_when_the_text_is_too_small() -> None:
    assert train_bpe([PROSE], 400).to_json() == train_bpe([PROSE], 400).to_json()
    assert train_bpe(["ab"], 400).vocab_size == 256
    for size in (256, 10**7):
        with pytest.raises(UserError, match="257"):
            train_bpe([PROSE], size)


def test_gpt2s_file_works_and_its_special_token_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(gpt2_document()))
    tok = read_tokenizer_file(path)
    special = tok.vocab_size - 1
    assert tok.token_bytes()[special] == b""
    assert special not in tok.encode("a<|endoftext|>b")
    assert_round_trip(tok, "a<|endoftext|>b")


@given(ANY_TEXT | TRICKY)
@example("e\u0301 " * 20_000)
def test_a_tokenizer_that_composes_accents_gives_the_librarys_ids_and_the_text_composed(text: str) -> None:
    """Qwen's normalizer. The library is given the whole text at once; ours cuts long ones."""
    tok = BpeTokenizer(gpt2_document() | {"normalizer": {"type": "NFC"}})
    assert tok.encode(text).tolist() == whole(tok, text)
    assert tok.decode(tok.encode(text)) == tok.given_back(text) == unicodedata.normalize("NFC", text)


def test_gpt2s_own_end_of_text_is_taken_and_one_is_appended_where_there_is_none() -> None:
    document = gpt2_document()
    own = with_end_of_text(BpeTokenizer(document))
    assert own.end_of_text == document["added_tokens"][0]["id"] == own.vocab_size - 1
    assert own.to_json()["tokenizer"] == BpeTokenizer(document).to_json()["tokenizer"]
    document["added_tokens"] = []  # as in a file made of GPT-2's vocab.json and merges.txt
    assert with_end_of_text(BpeTokenizer(document)).end_of_text == own.end_of_text
    del document["model"]["vocab"]["<|endoftext|>"]
    appended = with_end_of_text(BpeTokenizer(document))
    assert appended.end_of_text == BpeTokenizer(document).vocab_size == appended.vocab_size - 1
    for tok in (own, appended):
        assert with_end_of_text(tok).to_json() == tok.to_json()
        assert_round_trip(tok, "a<|endoftext|>b")
        assert tok.end_of_text not in tok.encode("a<|endoftext|>b")


@pytest.mark.parametrize("size", [3, 65535, 65536])
def test_the_end_of_text_of_characters_comes_after_them(size: int) -> None:
    chars = "".join(chr(c) for c in range(0x10000, 0x10000 + size))
    tok = with_end_of_text(CharTokenizer(chars))
    assert (tok.end_of_text, tok.vocab_size) == (size, size + 1)
    assert tok.dtype == (np.uint16 if size < 65536 else np.uint32)
    assert tok.encode(chars).tolist() == list(range(size))
    assert tok.decode([size, 1, size]) == chars[1]
    with pytest.raises(UserError, match="not in the vocabulary"):
        tok.encode(chr(0x10000 + size))


@pytest.mark.parametrize("end", [0, 257, -1, 256.0, True, "256", [], 10**30, {}])
def test_a_lie_about_the_end_of_text_is_refused(trained: BpeTokenizer, end: object) -> None:
    for document in (ByteTokenizer().to_json(), CharTokenizer("abc").to_json(), trained.to_json()):
        with pytest.raises(UserError, match="end_of_text"):
            from_json({**document, "end_of_text": end})


def test_special_tokens_that_plain_text_leads_to_stand_for_their_text() -> None:
    document = gpt2_document()
    document["added_tokens"] = [{"id": document["model"]["vocab"]["Ġthe"], "content": "Ġthe", "special": True}]
    assert_round_trip(BpeTokenizer(document), "on the mat")


def test_added_tokens_that_are_not_special_round_trip() -> None:
    document = gpt2_document()
    document["added_tokens"].append({"id": len(document["model"]["vocab"]), "content": "- é", "special": False})
    tok = BpeTokenizer(document)
    assert tok.vocab_size - 1 in tok.encode("a- éb")
    assert_round_trip(tok, "a- éb é - é  ")
    document["model"]["vocab"]["- é"] = tok.vocab_size - 1  # in both lists, spelled as text and not as bytes
    assert_round_trip(BpeTokenizer(document), "a- éb é - é  ")


# Documents from elsewhere


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to

    return change


def _steps(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [*steps, {"type": "ByteLevel", "add_prefix_space": False}]}


_deep: list[Any] = []
for _ in range(20_000):
    _deep = [_deep]

BAD_BPE = {
    "normalizes text": _set("normalizer", to={"type": "Lowercase"}),
    "another type": _set("model", "type", to="WordPiece"),
    "uses dropout": _set("model", "dropout", to=0.1),
    "marks on word parts": _set("model", "end_of_word_suffix", to="</w>"),
    "must map each token": _set("model", "vocab", "x", to=2**40),
    "must map each token ": _set("model", "vocab", "x", to=True),
    "must map each token  ": _set("model", "vocab", to=["a"]),
    "one id to two": _set("model", "vocab", "zz", to=3),
    "lacks some of the 256": lambda d: d["model"]["vocab"].pop("a"),
    "list of pairs": _set("model", "merges", to=["a b c"]),
    "list of pairs ": _set("model", "merges", to=[["a", 1]]),
    "not made of GPT-2's byte": _set("model", "vocab", "東", to=900),
    "refuses this tokenizer: Token `zq`": lambda d: d["model"]["merges"].append("zq zq"),
    "does not end in ByteLevel": _set("pre_tokenizer", to={"type": "Whitespace"}),
    "does not end in ByteLevel ": _set("pre_tokenizer", to=None),
    "does not end in ByteLevel  ": _set("pre_tokenizer", to={"type": "Sequence", "pretokenizers": [1]}),
    "puts a space": _set("pre_tokenizer", "add_prefix_space", to=True),
    "only steps that split": _set("pre_tokenizer", to=_steps({"type": "Metaspace"})),
    "only steps that split ": _set(
        "pre_tokenizer", to=_steps({"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"})
    ),
    "refuses this tokenizer: Onig": _set(
        "pre_tokenizer",
        to=_steps({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    ),
    "refuses this tokenizer": _set("pre_tokenizer", to=_steps({"type": "Split", "pattern": _deep})),
    "list of objects": _set("added_tokens", to=[1]),
    "content and an id": _set("added_tokens", to=[{"content": "", "id": 1}]),
    "swallows white space": _set("added_tokens", to=[{"content": "x", "id": 301, "rstrip": True}]),
    "several words": _set("added_tokens", to=[{"content": "a b", "id": 301}]),
    "do not follow": _set("added_tokens", to=[{"content": "<s>", "id": 999, "special": True}]),
}


@pytest.mark.parametrize("reason", BAD_BPE)
def test_bpe_documents_that_will_not_do(reason: str) -> None:
    document = gpt2_document()
    BpeTokenizer(copy.deepcopy(document))
    BAD_BPE[reason](document)
    with pytest.raises(UserError) as error:
        from_json({"kind": "bpe", "tokenizer": document})
    assert reason.strip() in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "document",
    [
        None, [], "char", {}, {"kind": "word"}, {"kind": ["char"]}, {"kind": "byte", "more": 1}, {"kind": "char"},
        {"kind": "char", "chars": ""}, {"kind": "char", "chars": ["a"]}, {"kind": "char", "chars": "aa"},
        {"kind": "char", "chars": "ba"}, {"kind": "char", "chars": "a\ud800"}, {"kind": "bpe"},
        {"kind": "bpe", "tokenizer": None}, {"kind": "bpe", "tokenizer": {}},
        {"kind": "bpe", "tokenizer": {"model": []}},
    ],
)  # fmt: skip
def test_documents_that_are_no_tokenizer(document: object) -> None:
    with pytest.raises(UserError) as error:
        from_json(document)
    assert "\n" not in str(error.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PATHS = [
    (), ("added_tokens",), ("normalizer",), ("pre_tokenizer",), ("pre_tokenizer", "type"),
    ("pre_tokenizer", "use_regex"), ("pre_tokenizer", "pretokenizers"), ("model",), ("model", "vocab"),
    ("model", "merges"), ("model", "ignore_merges"), ("model", "type"), ("added_tokens", 0),
    ("added_tokens", 0, "content"), ("added_tokens", 0, "id"),
]  # fmt: skip


@given(st.sampled_from(PATHS), JSON_VALUES)
def test_any_damage_is_refused_or_harmless(path: tuple[Any, ...], value: object) -> None:
    document = {"tokenizer": gpt2_document()} | {"kind": "bpe"}
    _set("tokenizer", *path, to=value)(document)
    try:
        tok = from_json(document)
    except UserError as error:
        message = str(error)
    else:
        assert_round_trip(tok, "the cat <|endoftext|> é 東")
        message = ""
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[]", b"3"])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read_tokenizer_file(path)
    with pytest.raises(UserError, match="no such tokenizer file"):
        read_tokenizer_file(tmp_path / "missing.json")
