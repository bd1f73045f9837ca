"""Text files in -> train.bin, val.bin and meta.json out, in bounded memory. Owns the split and the writing.

The whole text, all inputs joined in order, is split by characters as the seed does; each part is tokenized on its own,
so that every tokenizer sees the same text in each. It knows nothing of terminals, batches or models.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minigpt_cli.core import bpe
from minigpt_cli.core.background import Sha256, Worker
from minigpt_cli.core.dataset import DatasetMeta, InputMeta, SplitMeta
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.folders import clear_leftovers, locked, published
from minigpt_cli.core.textfiles import find
from minigpt_cli.core.textstream import Progress, TextStream, recut
from minigpt_cli.core.tokenizer import (
    DEFAULT_BPE_VOCAB,
    ByteTokenizer,
    CharTokenizer,
    Ids,
    Tokenizer,
    read_tokenizer_file,
    train_bpe,
)

FLUSH = 32 << 20  # bytes written between two calls to set the disk to work
_FILES = ("train.bin", "val.bin", "meta.json")


@dataclass(frozen=True)
class Report:
    """What `prepare` made. `notes` are remarks for the user, one line each."""

    out: Path
    meta: DatasetMeta
    vocab_size: int
    seconds: float
    notes: list[str]

    @property
    def characters(self) -> int:
        return self.meta.train.characters + self.meta.val.characters

    @property
    def bytes(self) -> int:
        return self.meta.train.bytes + self.meta.val.bytes

    @property
    def tokens(self) -> int:
        return self.meta.train.tokens + self.meta.val.tokens


def prepare(
    inputs: Sequence[Path], out: Path, *,
    tokenizer: str = "char", vocab_size: int | None = None, val_fraction: float = 0.1, text_field: str = "text",
    source: str | None = None, force: bool = False, progress: Progress = lambda stage, done, total: None,
) -> Report:  # fmt: skip
    """Make the dataset folder `out` from text files, folders and globs. `tokenizer`: char, byte, bpe or a file's path.

    The folder appears whole or not at all, and an old one is replaced (`force`) only by a whole new one. UserError for
    input, options or an `out` that will not do; MinigptError where a file changes meanwhile or `out` is in use.
    """
    started = time.perf_counter()
    build = _tokenizer_builder(tokenizer, vocab_size)
    if not 0 < val_fraction < 1:  # NaN fails too
        raise UserError(
            f"--val-fraction must lie between 0 and 1, not {val_fraction}; 0.1 keeps a tenth for validation"
        )
    out = Path(os.path.realpath(out))
    check_out(out, force)
    files, notes = find(inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out, "another minigpt prepare is writing it"):
        clear_leftovers(out)
        check_out(out, force)  # another prepare may have been first
        stream = TextStream(files, text_field, progress)
        characters = stream.scan()
        notes += [f"{f.name}: its byte order mark (BOM) was stripped" for f in files if f.has_bom]
        notes += [f"{f.name}: its Windows line ends (CRLF) are kept as they are" for f in files if f.has_crlf]
        n_train = _train_characters(characters, val_fraction)
        tok = build(stream, n_train, notes)
        with published(out) as folder:
            meta = _write(folder, stream, tok, n_train, source)
    return Report(out, meta, tok.vocab_size, time.perf_counter() - started, notes)


def check_out(out: Path, force: bool) -> None:
    """UserError where `out` may not become a dataset folder."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UserError(f"{out}: exists and is no folder; choose another folder with --out")
    names = set(os.listdir(out))
    if not names:
        return
    if names - set(_FILES) or not {"train.bin", "meta.json"} <= names:
        raise UserError(f"{out}: this folder holds other files and is never replaced; choose another with --out")
    if not force:
        raise UserError(f"{out}: already holds a dataset; replace it with --force, or choose another folder with --out")


def _train_characters(characters: int, val_fraction: float) -> int:
    if not characters:
        raise UserError("the input is empty: there is no text to learn from")
    n_train = int((1 - val_fraction) * characters)
    if min(n_train, characters - n_train) < 2:
        raise UserError(
            f"the text is too short: {characters} character{'s' * (characters > 1)}, {n_train} of them to train on and "
            f"{characters - n_train} to validate on; each part needs at least 2. Use a longer text"
        )
    return n_train


# Tokenizers

_Builder = Callable[[TextStream, int, list[str]], Tokenizer]


def _tokenizer_builder(name: str, vocab_size: int | None) -> _Builder:
    """What makes the tokenizer once the text was scanned. UserError for a wrong choice, before any work is done."""
    if vocab_size is not None and name != "bpe":
        raise UserError("--vocab-size goes with --tokenizer bpe only; the other tokenizers have a size of their own")
    if vocab_size is not None and not 257 <= vocab_size <= bpe.MAX_VOCAB:
        raise UserError(
            f"--vocab-size must lie between 257 (the 256 bytes and one pair) and {bpe.MAX_VOCAB:,}, not {vocab_size}"
        )
    if name == "char":
        return lambda stream, n_train, notes: CharTokenizer("".join(map(chr, sorted(stream.chars))))
    if name == "byte":
        return lambda stream, n_train, notes: ByteTokenizer()
    if name == "bpe":
        return lambda stream, n_train, notes: _learned_bpe(stream, n_train, vocab_size or DEFAULT_BPE_VOCAB, notes)
    if not name.endswith(".json") and not os.path.exists(name):
        raise UserError(f"--tokenizer {name}: choose char, byte, bpe, or the path of a tokenizer.json")
    existing = read_tokenizer_file(Path(name))
    return lambda stream, n_train, notes: existing


def _learned_bpe(stream: TextStream, n_train: int, vocab_size: int, notes: list[str]) -> Tokenizer:
    texts = recut(stream.train_texts("sampling", n_train), bpe.last_border)
    sample, step = bpe.sample(texts)
    if step > 1:
        notes.append(f"BPE was learned from one part in {step} of the training text, spread evenly over it")
    stream.progress("learning BPE", 0, 1)
    tok = train_bpe(sample, vocab_size)
    if tok.vocab_size < vocab_size:
        notes.append(f"BPE found {tok.vocab_size} tokens, not {vocab_size}: no other pair occurs twice in the text")
    return tok


# Writing


def _write(folder: Path, stream: TextStream, tok: Tokenizer, n_train: int, source: str | None) -> DatasetMeta:
    with (
        open(folder / "train.bin", "xb") as train_file,
        open(folder / "val.bin", "xb") as val_file,
        Sha256() as digest,
        Worker() as checking,
        Worker() as flushing,
    ):
        val_bytes = 0
        train, val = _SplitWriter(train_file, flushing), _SplitWriter(val_file, flushing)
        # Encoding and writing stay in this thread: in another, the ids' memory cost up to as much as all the rest.
        for is_train, text in stream.both_splits("tokenizing", n_train, tok.last_cut):
            ids = tok.encode(text).astype(tok.dtype.newbyteorder("<"), copy=False)
            if tok.kind == "bpe":
                checking.start(_check_round_trip, tok, text, ids)
            (train if is_train else val).write(text, ids)
            if not is_train:  # the rest is the training text's: to count it too would take as long as decoding it
                val_bytes += len(text.encode("utf-8"))
            digest.update(ids.data)
        checking.wait()
        canonical = json.dumps(tok.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        counts = f"{train.tokens},{val.tokens}"  # else another split of the same text would look the same
        digest.update(f"{canonical}{counts}".encode("ascii"))
        flushing.wait()
        for file in (train_file, val_file):
            file.flush()
            os.fsync(file.fileno())
    if min(train.tokens, val.tokens) < 2:
        raise UserError(
            f"the text is too short for this tokenizer: {train.tokens} tokens to train on, {val.tokens} to validate "
            "on; each part needs at least 2. Use a longer text, or --tokenizer char"
        )
    text_bytes = sum(f.text_bytes for f in stream.files)
    meta = DatasetMeta(
        dtype="uint16" if tok.dtype == np.uint16 else "uint32",
        tokenizer=tok.to_json(),
        train=SplitMeta(tokens=train.tokens, characters=train.characters, bytes=text_bytes - val_bytes),
        val=SplitMeta(tokens=val.tokens, characters=val.characters, bytes=val_bytes),
        inputs=[InputMeta(name=f.name, bytes=f.size, sha256=f.sha256) for f in stream.files],
        source=source,
        fingerprint=digest.hexdigest(),
    )
    with open(folder / "meta.json", "x", encoding="ascii") as meta_file:
        json.dump(meta.model_dump(), meta_file, indent=1)
        meta_file.flush()
        os.fsync(meta_file.fileno())
    return meta


def _check_round_trip(tok: Tokenizer, text: str, ids: Ids) -> None:
    if tok.decode(ids) != tok.given_back(text):  # a tokenizer.json may come from anywhere
        raise UserError("this tokenizer does not give the text back exactly; choose another, or --tokenizer bpe")


class _SplitWriter:
    """One split's file and counts. The disk is set to work early, as it may take longer than all the rest."""

    def __init__(self, file: BinaryIO, flushing: Worker) -> None:
        self._file, self._flushing = file, flushing
        self._unflushed = 0  # bytes
        self.tokens = self.characters = 0

    def write(self, text: str, ids: Ids) -> None:
        self._file.write(ids.data)
        self.tokens += len(ids)
        self.characters += len(text)
        self._unflushed += ids.nbytes
        if self._unflushed >= FLUSH and not self._flushing.busy:
            self._unflushed = 0
            self._flushing.start(os.fsync, self._file.fileno())
