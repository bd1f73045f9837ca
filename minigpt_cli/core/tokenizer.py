"""Text <-> token ids: characters, bytes, or byte-level BPE. Owns the rules by which any of them is rebuilt from JSON.

Every tokenizer gives back exactly the text it was given, for any Unicode text it accepts (one with Unicode's NFC gives
it back composed), and knows the UTF-8 bytes of each of its tokens: text is decoded by joining those bytes. It knows
nothing of files of text, datasets or models.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt_cli.core import bpe
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import bounded_json

Ids = npt.NDArray[np.unsignedinteger[Any]]  # 1-D: uint16, or uint32 where the vocabulary needs it

MAX_TOKENIZER_FILE = 100 * 2**20  # bytes; the largest vocabularies published today take about 35 MB
MAX_TOKENIZER_PARTS = 4_000_000  # each merge of such a file may be a list of its own, which is three
DEFAULT_BPE_VOCAB = 4096
_AT_ONCE = 256  # pieces that the library encodes at a time: it keeps a hundred bytes and more for each token


class Tokenizer(ABC):
    """What `prepare` writes into meta.json and a checkpoint carries with it."""

    kind: str
    vocab_size: int
    end_of_text: int | None = None  # the id that ends a document: it stands for no text, and no text leads to it

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """`text` as a 1-D array of ids in [0, vocab_size). UserError for text outside the vocabulary."""

    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes of each id, in order; b"" for ids that stand for no text."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """A document from which `from_json` builds the same tokenizer."""

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of `ids`; bytes that are not whole UTF-8 become U+FFFD. ValueError for an id out of range."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not (array.min() >= 0 and array.max() < self.vocab_size):
            raise ValueError(f"token ids must lie in 0..{self.vocab_size - 1}")
        return b"".join(self._table()[array]).decode("utf-8", errors="replace")

    def last_cut(self, text: str) -> int:
        """The last position at which `text` may be cut in two without changing a token; 0 where there is none."""
        return len(text)

    def given_back(self, text: str) -> str:
        """What decoding the ids of `text` must give: the text itself, unless the tokenizer composes it."""
        return text

    def _json(self, **document: Any) -> dict[str, Any]:
        end = {} if self.end_of_text is None else {"end_of_text": self.end_of_text}
        return {"kind": self.kind} | document | end

    def _table(self) -> npt.NDArray[np.object_]:
        if not hasattr(self, "_cached_table"):
            self._cached_table = np.array(self.token_bytes(), dtype=object)
        return self._cached_table


class CharTokenizer(Tokenizer):
    """One id for each distinct character, in code point order, as the seed does. `chars` is sorted, without repeats.
    The end of a document, if it has one, comes after them."""

    kind = "char"

    def __init__(self, chars: str, *, end_of_text: bool = False) -> None:
        self.chars = chars
        self.end_of_text = len(chars) if end_of_text else None
        self.vocab_size = len(chars) + end_of_text
        self._lookup_dtype = np.uint16 if len(chars) < 2**16 else np.uint32
        self._unknown = np.iinfo(self._lookup_dtype).max
        # One entry for every code point there is, so that no lookup needs a bounds check.
        self._ids = np.full(0x110000, self._unknown, dtype=self._lookup_dtype)
        self._ids[_code_points(chars)] = np.arange(len(chars))
        # The same for ASCII text, which Python turns into ids at memory speed. Ids of ASCII characters come first,
        # since they are sorted: all are below 128, and 255 is free to mean "unknown".
        ascii_ids = np.full(256, 255, dtype=np.uint8)
        known = self._ids[:128] != self._unknown
        ascii_ids[:128][known] = self._ids[:128][known]
        self._ascii_ids = ascii_ids.tobytes()

    def encode(self, text: str) -> Ids:
        if text.isascii():
            narrow = text.encode("ascii").translate(self._ascii_ids)
            if b"\xff" in narrow:
                raise self._unknown_error(text)
            return np.frombuffer(narrow, dtype=np.uint8).astype(self.dtype)
        ids = np.take(self._ids, _code_points(text), mode="clip")
        if ids.max() == self._unknown:
            raise self._unknown_error(text)
        return ids.astype(self.dtype, copy=False)

    def _unknown_error(self, text: str) -> UserError:
        unknown = sorted(set(text) - set(self.chars))
        names = ", ".join(spell(c) for c in unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        what = "this character is" if len(unknown) == 1 else f"these {len(unknown)} characters are"
        return UserError(f"{what} not in the vocabulary of {self.vocab_size} characters: {names}")

    def token_bytes(self) -> list[bytes]:
        return [c.encode("utf-8") for c in self.chars] + [b""] * (self.end_of_text is not None)

    def to_json(self) -> dict[str, Any]:
        return self._json(chars=self.chars)


class ByteTokenizer(Tokenizer):
    """The 256 byte values of UTF-8, and perhaps the end of a document."""

    kind = "byte"

    def __init__(self, *, end_of_text: bool = False) -> None:
        self.end_of_text = 256 if end_of_text else None
        self.vocab_size = 256 + end_of_text

    def encode(self, text: str) -> Ids:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.uint16)

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)] + [b""] * (self.end_of_text is not None)

    def to_json(self) -> dict[str, Any]:
        return self._json()


class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, in GPT-2's form), computed by the `tokenizers` library.

    `document` is a tokenizer.json. UserError unless it gives back every text exactly: a BPE model over all 256 bytes,
    no normalizer (but Unicode's NFC, which gives it back composed), no prefix. Special tokens are never made from text:
    "<|endoftext|>" in a corpus is plain text.
    `end_of_text` is the id of the special token that ends a document, if there is one.
    """

    kind = "bpe"

    def __init__(self, document: dict[str, Any], end_of_text: object = None) -> None:
        self._document = bpe.checked_document(document)
        self._rust = bpe.rust_tokenizer(self._document)
        self._rust.encode_special_tokens = True  # that is: encode them as the plain text they are
        self._bytes = bpe.token_table(self._document)
        self.vocab_size = len(self._bytes)
        special = {t["id"] for t in self._document["added_tokens"] if t["special"]}
        if type(end_of_text) is int and end_of_text in special and not self._bytes[end_of_text]:
            self.end_of_text = end_of_text
        elif end_of_text is not None:
            raise UserError('the tokenizer\'s "end_of_text" must be the id of a special token of its own')

    def encode(self, text: str) -> Ids:
        _utf8(text)
        pieces, parts = list(bpe.pieces(text)), [np.zeros(0, dtype=self.dtype)]
        for start in range(0, len(pieces), _AT_ONCE):
            encodings = self._rust.encode_batch_fast(pieces[start : start + _AT_ONCE], add_special_tokens=False)
            parts += [np.array(e.ids, dtype=self.dtype) for e in encodings]
        return np.concatenate(parts)

    def last_cut(self, text: str) -> int:
        return bpe.last_border(text)

    def given_back(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._document["normalizer"] else text

    def token_bytes(self) -> list[bytes]:
        return list(self._bytes)

    def to_json(self) -> dict[str, Any]:
        return self._json(tokenizer=self._document)

    def with_end_of_text(self) -> BpeTokenizer:
        return BpeTokenizer(*bpe.with_end_of_text(self._document))


def from_json(document: object) -> Tokenizer:
    """The tokenizer that `to_json` described. The document may come from anywhere: UserError for whatever is wrong."""
    if not isinstance(document, dict):
        raise UserError("the tokenizer must be a JSON object")
    kind, keys, end = document.get("kind"), set(document) - {"end_of_text"}, document.get("end_of_text")
    tok: Tokenizer
    if kind == "byte" and keys == {"kind"}:
        tok = ByteTokenizer(end_of_text=end is not None)
    elif kind == "char" and keys == {"kind", "chars"}:
        tok = CharTokenizer(_checked_chars(document["chars"]), end_of_text=end is not None)
    elif kind == "bpe" and keys == {"kind", "tokenizer"}:
        tok = BpeTokenizer(document["tokenizer"], end)
    else:
        raise UserError(
            'the tokenizer is not one of {"kind": "char", "chars"}, {"kind": "byte"}, {"kind": "bpe", "tokenizer"}'
        )
    if type(end) is not type(tok.end_of_text) or end != tok.end_of_text:
        raise UserError(f'the tokenizer\'s "end_of_text" must be {tok.end_of_text}, the id after the last')
    return tok


def same_ids(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two tokenizers' JSON give the same ids to any text: perhaps only one marks its end of text as such."""
    if one.get("kind") == "bpe":
        one, other = ({k: v for k, v in document.items() if k != "end_of_text"} for document in (one, other))
    return one == other


def with_end_of_text(tok: Tokenizer) -> Tokenizer:
    """The same tokenizer with an id that ends a document; the one it has, where a BPE tokenizer has one."""
    if isinstance(tok, BpeTokenizer):
        return tok.with_end_of_text()
    return (
        CharTokenizer(tok.chars, end_of_text=True)
        if isinstance(tok, CharTokenizer)
        else ByteTokenizer(end_of_text=True)
    )


def train_bpe(texts: Iterable[str], vocab_size: int = DEFAULT_BPE_VOCAB) -> BpeTokenizer:
    """Learn byte-level BPE from `texts`. The vocabulary comes out smaller where no pair is left that occurs twice."""
    if not 257 <= vocab_size <= bpe.MAX_VOCAB:
        raise UserError(
            f"the vocabulary of a BPE tokenizer must lie between 257 (256 bytes and one pair) and {bpe.MAX_VOCAB}"
        )
    return BpeTokenizer(bpe.learn(texts, vocab_size))


def read_tokenizer_document(path: Path) -> Any:
    """A JSON document of the size that a tokenizer.json may have. UserError if it is larger, ValueError for no JSON."""
    if path.stat().st_size > MAX_TOKENIZER_FILE:
        raise UserError(f"{path}: larger than {MAX_TOKENIZER_FILE // 2**20} MiB, no tokenizer.json is")
    return bounded_json(path.read_bytes(), MAX_TOKENIZER_FILE, MAX_TOKENIZER_PARTS)


def read_tokenizer_file(path: Path) -> BpeTokenizer:
    """The byte-level BPE tokenizer in a `tokenizer.json`. UserError for a file that is not one."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such tokenizer file; --tokenizer takes char, byte, bpe or a tokenizer.json")
        return BpeTokenizer(read_tokenizer_document(path))
    except UserError as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a JSON document; --tokenizer takes a tokenizer.json") from None


def spell(char: str) -> str:
    """A character for a message: 'é' (U+00E9); only the number where it cannot be shown."""
    number = f"U+{ord(char):04X}"
    return f"{char!r} ({number})" if char.isprintable() else number


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds {spell(text[error.start])}, which is no character (half a surrogate pair)"
        ) from None


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _checked_chars(chars: object) -> str:
    if not isinstance(chars, str) or not chars:
        raise UserError('the tokenizer\'s "chars" must be a string of at least one character')
    codes = _code_points(chars)
    if np.any(codes[1:] <= codes[:-1]):
        raise UserError('the tokenizer\'s "chars" must be sorted by code point, each character once')
    _utf8(chars)
    return chars
