"""A unit of input -> its ids, by split. What the worker processes of `prepare` do; knows no files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minigpt_cli.core.documents import Unit, validates
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.textstream import Piece
from minigpt_cli.core.tokenizer import Ids, Tokenizer, from_json

Encoded = tuple[
    str, Ids, dict[str, int]
]  # the split, its ids, and how many characters, bytes, documents they stand for


@dataclass(frozen=True)
class MakeEncoder:
    """How a process gets its encoder: `tokenizer` is a tokenizer's JSON."""

    tokenizer: dict[str, Any]
    val_fraction: float

    def __call__(self) -> Callable[[Piece | Unit], list[Encoded]]:
        tok, fraction = from_json(self.tokenizer), self.val_fraction
        return lambda unit: [_piece(tok, unit)] if isinstance(unit, Piece) else _documents(tok, unit, fraction)


def _piece(tok: Tokenizer, piece: Piece) -> Encoded:
    ids = tok.encode(piece.text)
    _check_round_trip(tok, [piece.text], ids)
    # The rest is the training text's: to count that too would take as long as decoding it.
    n_bytes = len(piece.text.encode("utf-8")) if piece.split == "val" else 0
    return piece.split, ids, {"characters": len(piece.text), "bytes": n_bytes}


def _documents(tok: Tokenizer, unit: Unit, val_fraction: float) -> list[Encoded]:
    """Each document and its end of text, in order."""
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for text in unit.texts():
        splits["val" if validates(text, val_fraction) else "train"].append(text)
    return [_joined(tok, split, texts) for split, texts in splits.items() if texts]


def _joined(tok: Tokenizer, split: str, texts: list[str]) -> Encoded:
    end = np.array([tok.end_of_text], dtype=tok.dtype)
    ids = np.concatenate([part for text in texts for part in (tok.encode(text), end)])
    whole = "".join(texts)
    _check_round_trip(tok, texts, ids)
    counts = {"characters": len(whole), "bytes": len(whole.encode("utf-8")), "documents": len(texts)}
    return split, ids, counts


def _check_round_trip(tok: Tokenizer, texts: list[str], ids: Ids) -> None:
    if tok.kind == "bpe" and tok.decode(ids) != "".join(
        map(tok.given_back, texts)
    ):  # a tokenizer.json may come from anywhere
        raise UserError("this tokenizer does not give the text back exactly; choose another, or --tokenizer bpe")
