"""Text files in -> train.bin, val.bin and meta.json out, in bounded memory. Owns the split and the writing.

The whole text, all inputs joined in order, is split by characters as the seed does; each part is tokenized on its own,
so that every tokenizer sees the same text in each. It knows nothing of terminals, batches or models.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minigpt_cli.core import bpe
from minigpt_cli.core.dataset import DatasetMeta, InputMeta, SplitMeta
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.folders import clear_leftovers, locked, published
from minigpt_cli.core.textfiles import TextFile, find
from minigpt_cli.core.tokenizer import (
    DEFAULT_BPE_VOCAB,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    read_tokenizer_file,
    train_bpe,
)

CHUNK = 1 << 20  # characters tokenized at a time
MAX_UNCUT = 8 << 20  # characters after which a text without a place to cut it is cut all the same
_FILES = ("train.bin", "val.bin", "meta.json")

Progress = Callable[[str, int, int], None]  # stage, bytes of input done, bytes of input in all


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
        corpus = _Corpus(files, text_field, progress)
        characters = corpus.scan()
        notes += [f"{f.name}: its byte order mark (BOM) was stripped" for f in files if f.has_bom]
        notes += [f"{f.name}: its Windows line ends (CRLF) are kept as they are" for f in files if f.has_crlf]
        n_train = _train_characters(characters, val_fraction)
        tok = build(corpus, n_train, notes)
        with published(out) as folder:
            meta = _write(folder, corpus, tok, n_train, source)
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


# Reading


@dataclass
class _Corpus:
    """The joined text of all inputs, which can be read as often as needed."""

    files: list[TextFile]
    text_field: str
    progress: Progress
    chars: set[int] = field(default_factory=set)  # code points seen by `scan`

    def texts(self, stage: str) -> Iterator[str]:
        """The whole text, in pieces of at most CHUNK characters."""
        total, done = sum(f.size for f in self.files), 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self.progress(stage, done, total)

        for file in self.files:
            for text in file.texts(self.text_field, advance):
                yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK)) if len(text) > CHUNK else (text,)

    def scan(self) -> int:
        """Read and check everything once; the number of characters. Leaves the distinct ones in `chars`."""
        count = 0
        seen = np.zeros(0x110000, dtype=bool)
        seen_ascii = b""
        for text in self.texts("reading"):
            count += len(text)
            if text.isascii():
                if new := text.encode("ascii").translate(None, delete=seen_ascii):
                    seen_ascii += bytes(set(new))
            else:
                seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
        self.chars = {int(c) for c in np.flatnonzero(seen)} | set(seen_ascii)
        return count

    def train_texts(self, stage: str, n_train: int) -> Iterator[str]:
        """The training split only."""
        for is_train, text in _split(self.texts(stage), n_train):
            if not is_train:
                return
            yield text


def _split(texts: Iterable[str], n_train: int) -> Iterator[tuple[bool, str]]:
    """Pieces of text, each with whether it lies in the training split (the first `n_train` characters)."""
    left = n_train
    for text in texts:
        if left and text[:left]:
            yield True, text[:left]
        if text[left:]:
            yield False, text[left:]
        left -= min(left, len(text))


def _recut(texts: Iterable[str], last_cut: Callable[[str], int]) -> Iterator[str]:
    """The same text, cut where `last_cut` finds that it does no harm."""
    waiting = ""
    for text in texts:
        waiting += text
        cut = len(waiting) if len(waiting) > MAX_UNCUT else last_cut(waiting)
        if cut:
            yield waiting[:cut]
            waiting = waiting[cut:]
    if waiting:
        yield waiting


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

_Builder = Callable[[_Corpus, int, list[str]], Tokenizer]


def _tokenizer_builder(name: str, vocab_size: int | None) -> _Builder:
    """What makes the tokenizer once the text was scanned. UserError for a wrong choice, before any work is done."""
    if vocab_size is not None and name != "bpe":
        raise UserError("--vocab-size goes with --tokenizer bpe only; the other tokenizers have a size of their own")
    if vocab_size is not None and not 257 <= vocab_size <= bpe.MAX_VOCAB:
        raise UserError(
            f"--vocab-size must lie between 257 (the 256 bytes and one pair) and {bpe.MAX_VOCAB:,}, not {vocab_size}"
        )
    if name == "char":
        return lambda corpus, n_train, notes: CharTokenizer("".join(map(chr, sorted(corpus.chars))))
    if name == "byte":
        return lambda corpus, n_train, notes: ByteTokenizer()
    if name == "bpe":
        return lambda corpus, n_train, notes: _learned_bpe(corpus, n_train, vocab_size or DEFAULT_BPE_VOCAB, notes)
    if not name.endswith(".json") and not os.path.exists(name):
        raise UserError(f"--tokenizer {name}: choose char, byte, bpe, or the path of a tokenizer.json")
    existing = read_tokenizer_file(Path(name))
    return lambda corpus, n_train, notes: existing


def _learned_bpe(corpus: _Corpus, n_train: int, vocab_size: int, notes: list[str]) -> Tokenizer:
    texts = _recut(corpus.train_texts("sampling", n_train), bpe.last_border)
    sample, step = bpe.sample(texts)
    if step > 1:
        notes.append(f"BPE was learned from one part in {step} of the training text, spread evenly over it")
    corpus.progress("learning BPE", 0, 1)
    tok = train_bpe(sample, vocab_size)
    if tok.vocab_size < vocab_size:
        notes.append(f"BPE found {tok.vocab_size} tokens, not {vocab_size}: no other pair occurs twice in the text")
    return tok


# Writing


def _write(folder: Path, corpus: _Corpus, tok: Tokenizer, n_train: int, source: str | None) -> DatasetMeta:
    with (
        open(folder / "train.bin", "xb") as train_file,
        open(folder / "val.bin", "xb") as val_file,
        _Background() as back,
    ):
        train, val = _SplitWriter(train_file, tok, back), _SplitWriter(val_file, tok, back)
        for is_train, group in groupby(_split(corpus.texts("tokenizing"), n_train), key=itemgetter(0)):
            for text in _recut((text for _, text in group), tok.last_cut):
                (train if is_train else val).write(text)
        canonical = json.dumps(tok.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        counts = f"{train.tokens},{val.tokens}"  # else another split of the same text would look the same
        fingerprint = back.hexdigest(f"{canonical}{counts}".encode("ascii"))
        for file in (train_file, val_file):
            file.flush()
            os.fsync(file.fileno())
    if min(train.tokens, val.tokens) < 2:
        raise UserError(
            f"the text is too short for this tokenizer: {train.tokens} tokens to train on, {val.tokens} to validate "
            "on; each part needs at least 2. Use a longer text, or --tokenizer char"
        )
    meta = DatasetMeta(
        dtype="uint16" if tok.dtype == np.uint16 else "uint32",
        tokenizer=tok.to_json(),
        train=SplitMeta(tokens=train.tokens, characters=train.characters, bytes=train.bytes),
        val=SplitMeta(tokens=val.tokens, characters=val.characters, bytes=val.bytes),
        inputs=[InputMeta(name=f.name, bytes=f.size, sha256=f.sha256) for f in corpus.files],
        source=source,
        fingerprint=fingerprint,
    )
    with open(folder / "meta.json", "x", encoding="ascii") as meta_file:
        json.dump(meta.model_dump(), meta_file, indent=1)
        meta_file.flush()
        os.fsync(meta_file.fileno())
    return meta


class _SplitWriter:
    """Tokenizes one split as its text comes in, and passes the ids on to be written."""

    def __init__(self, file: BinaryIO, tok: Tokenizer, background: _Background) -> None:
        self._file, self._tok, self._background = file, tok, background
        self._dtype = tok.dtype.newbyteorder("<")
        self.tokens = self.characters = self.bytes = 0

    def write(self, text: str) -> None:
        ids = self._tok.encode(text)
        if self._tok.kind == "bpe" and self._tok.decode(ids) != text:  # a tokenizer.json may come from anywhere
            raise UserError("this tokenizer does not give the text back exactly; choose another, or --tokenizer bpe")
        self._background.write(self._file, ids.astype(self._dtype, copy=False).tobytes())
        self.tokens += len(ids)
        self.characters += len(text)
        self.bytes += len(text) if text.isascii() else len(text.encode("utf-8"))


class _Background:
    """Writes and hashes blocks in a second thread, in order: that takes as long as reading and tokenizing them."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def write(self, file: BinaryIO, data: bytes) -> None:
        self.wait()  # one block on its way at a time keeps memory bounded
        self._last = self._pool.submit(self._write, file, data)

    def _write(self, file: BinaryIO, data: bytes) -> None:
        file.write(data)
        self._digest.update(data)

    def wait(self) -> None:
        if self._last:
            self._last.result()

    def hexdigest(self, last: bytes) -> str:
        """The sha256 of all that was written, followed by `last`."""
        self.wait()
        self._digest.update(last)
        return self._digest.hexdigest()

    def __enter__(self) -> _Background:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()
