"""Text in -> token files and meta.json out, in bounded memory. Owns the order of things, and what is kept.

Text files are one text, all inputs joined in order, which is split by characters as the seed does; documents are split
one by one, and each is ended by a token of its own. It knows nothing of terminals, batches or models.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minigpt_cli import __version__
from minigpt_cli.core import bpe
from minigpt_cli.core.background import Sha256, Worker
from minigpt_cli.core.dataset import DatasetMeta, InputMeta, SplitMeta, split_files
from minigpt_cli.core.documents import Documents, Unit
from minigpt_cli.core.encoder import Encoded, MakeEncoder
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import names_in
from minigpt_cli.core.folders import clear_leftovers, locked
from minigpt_cli.core.processes import in_order, processors
from minigpt_cli.core.textfiles import BLOCK, TextFile, find
from minigpt_cli.core.textstream import Piece, Progress, TextStream
from minigpt_cli.core.tokenizer import (
    DEFAULT_BPE_VOCAB,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    from_json,
    read_tokenizer_file,
    train_bpe,
    with_end_of_text,
)
from minigpt_cli.core.unfinished import SplitWriter, Unfinished, unfinished

SHARD_TOKENS = 1 << 30  # in a token file, unless it is said otherwise: 2 GiB of uint16
PER_WORKER = 8 << 20  # bytes of input for which it pays to start a process
MAX_INPUTS = 10_000  # files that meta.json lists one by one
_FILES = re.compile(r"meta\.json|(train|val)(-\d{5,})?\.bin")


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
    tokenizer: str | Tokenizer = "char", vocab_size: int | None = None, val_fraction: float = 0.1,
    text_field: str = "text", documents: bool = False, shard_tokens: int | None = None, workers: int | None = None,
    source: str | None = None, force: bool = False, progress: Progress = lambda stage, done, total: None,
    kept: Callable[[Path], object] = lambda folder: None,
) -> Report:  # fmt: skip
    """Make the dataset folder `out` from files, folders and globs. `tokenizer`: char, byte, bpe, a file's path, or
    that of a model, to which nothing can be added.

    .jsonl and .parquet files hold documents; `documents` says that each text file is one, too. The folder appears whole
    or not at all, and an old one is replaced (`force`) only by a whole new one. What an earlier call with the same
    inputs and options had done for certain before it was killed is not done again. `workers` processes (by default as
    many as there are processors and the input is worth) change nothing but the time. UserError for input, options or an
    `out` that will not do; MinigptError where a file changes meanwhile or `out` is in use. Where any error leaves
    something to go on from, `kept` is told the folder that holds it.
    """
    started = time.perf_counter()
    choice = _TokenizerChoice(tokenizer, vocab_size)
    shard_tokens = SHARD_TOKENS if shard_tokens is None else shard_tokens
    _check_numbers(val_fraction, shard_tokens, workers)
    out = Path(os.path.realpath(out))
    check_out(out, force)
    files, notes = find(inputs)
    documents = documents or any(file.holds != "text" for file in files)
    key = {
        "version": __version__, "tokenizer": choice.key(), "val_fraction": val_fraction, "text_field": text_field,
        "documents": documents, "shard_tokens": shard_tokens,
        "files": [[os.path.realpath(file.path), file.name, file.size, file.modified] for file in files],
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out, "another minigpt prepare is writing it"):
        clear_leftovers(out)
        check_out(out, force)  # another prepare may have been first
        with unfinished(out, key, kept) as work:
            corpus: _Corpus
            if documents:
                corpus = Documents(files, text_field, val_fraction, progress)
            else:
                corpus = TextStream(files, val_fraction, progress)
            if work.tokenizer is None:
                work.tokenizer = choice.make(corpus, documents, progress, notes).to_json()
            tok = from_json(work.tokenizer)
            if work.done:
                notes.append(
                    f"{work.tokens:,} of the tokens were made before, by a prepare that did not come to its end"
                )
            if workers is None:
                size = sum(file.size for file in files)
                workers = min(processors(), size // PER_WORKER) if documents or tok.kind == "bpe" else 1
            units = islice(corpus.units(tok.last_cut), work.done, None)
            with closing(in_order(MakeEncoder(work.tokenizer, val_fraction), units, workers)) as results:
                train, val, fingerprint = _write(work, results, tok, shard_tokens, documents)
            _require_both(train, val, documents)
            if not documents:  # of a text only what validates was counted: the rest takes as long as decoding it
                n_bytes = sum(file.text_bytes for file in files) - val.bytes
                train = train.model_copy(update={"bytes": n_bytes, "documents": None})
                val = val.model_copy(update={"documents": None})
            meta = DatasetMeta(
                format_version=2 if documents or train.shards or val.shards else 1,
                dtype="uint16" if tok.dtype == np.uint16 else "uint32", tokenizer=work.tokenizer, train=train, val=val,
                inputs=_inputs(files), source=source, fingerprint=fingerprint,
            )  # fmt: skip
            _write_meta(work.folder, meta)
            work.publish()
    texts = [file for file in files if file.holds == "text"]
    notes += [f"{file.name}: its byte order mark (BOM) was stripped" for file in files if file.has_bom]
    notes += [f"{file.name}: its Windows line ends (CRLF) are kept as they are" for file in texts if file.has_crlf]
    return Report(out, meta, tok.vocab_size, time.perf_counter() - started, notes)


def _check_numbers(val_fraction: float, shard_tokens: int, workers: int | None) -> None:
    if not 0 < val_fraction < 1:  # NaN fails too
        raise UserError(
            f"--val-fraction must lie between 0 and 1, not {val_fraction}; 0.1 keeps a tenth for validation"
        )
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens {shard_tokens}: a token file holds at least one token")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1")


def check_out(out: Path, force: bool) -> None:
    """UserError where `out` may not become a dataset folder."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UserError(f"{out}: exists and is no folder; choose another folder with --out")
    names = names_in(out)
    if not names:
        return
    if not all(map(_FILES.fullmatch, names)) or "meta.json" not in names or len(names) == 1:
        raise UserError(f"{out}: this folder holds other files and is never replaced; choose another with --out")
    if not force:
        raise UserError(f"{out}: already holds a dataset; replace it with --force, or choose another folder with --out")


class _Corpus(Protocol):
    """What `TextStream` and `Documents` have in common."""

    def code_points(self) -> set[int]: ...

    def train_texts(self) -> tuple[Iterator[str], int]:
        """Text to learn from: one part in so many of the training text."""
        ...

    def units(self, last_cut: Callable[[str], int]) -> Iterator[Piece | Unit]:
        """What is to be tokenized, in units that are the same every time; a text may be cut at its `last_cut`."""
        ...


# Tokenizers


class _TokenizerChoice:
    """What makes the tokenizer once the input is known. UserError for a wrong choice, before any work is done."""

    def __init__(self, choice: str | Tokenizer, vocab_size: int | None) -> None:
        self.name = name = choice if isinstance(choice, str) else "a model's"
        self.vocab_size = vocab_size
        self.existing = choice if isinstance(choice, Tokenizer) else None
        if vocab_size is not None and name != "bpe":
            raise UserError(
                "--vocab-size goes with --tokenizer bpe only; the other tokenizers have a size of their own"
            )
        if vocab_size is not None and not 257 <= vocab_size <= bpe.MAX_VOCAB:
            raise UserError(
                f"--vocab-size must lie between 257 (the 256 bytes and one pair) and {bpe.MAX_VOCAB:,}, "
                f"not {vocab_size}"
            )
        if self.existing or name in ("char", "byte", "bpe"):
            return
        if not name.endswith(".json") and not os.path.exists(name):
            raise UserError(f"--tokenizer {name}: choose char, byte, bpe, or the path of a tokenizer.json")
        self.existing = read_tokenizer_file(Path(name))

    def key(self) -> list[Any]:
        """All that the tokenizer depends on, but the input."""
        return [self.name, self.vocab_size, self.existing and self.existing.to_json()]

    def make(self, corpus: _Corpus, documents: bool, progress: Progress, notes: list[str]) -> Tokenizer:
        """The tokenizer for `corpus`; with an end of text where that is made of `documents`."""
        tok = self.existing
        if self.name == "char":
            tok = CharTokenizer("".join(map(chr, sorted(corpus.code_points()))))
        elif self.name == "byte":
            tok = ByteTokenizer()
        elif self.name == "bpe":
            tok = self._learned(corpus, documents, progress, notes)
        assert tok is not None
        ended = with_end_of_text(tok) if documents else tok
        if self.name == "a model's" and ended.vocab_size > tok.vocab_size:
            raise UserError(
                "the model's tokenizer has no token that ends a document, and a model cannot get one afterwards; give "
                "it the text as plain text files"
            )
        return ended

    def _learned(self, corpus: _Corpus, documents: bool, progress: Progress, notes: list[str]) -> Tokenizer:
        vocab_size = max(257, (self.vocab_size or DEFAULT_BPE_VOCAB) - documents)  # the end of text is one of them
        texts, every = corpus.train_texts()
        sample, step = bpe.sample(texts)
        if every * step > 1:
            notes.append(f"BPE was learned from one part in {every * step} of the training text, spread evenly over it")
        progress("learning BPE", 0, 1)
        tok = train_bpe(sample, vocab_size)
        if tok.vocab_size < vocab_size:
            notes.append(f"BPE found {tok.vocab_size} tokens, not {vocab_size}: no other pair occurs twice in the text")
        return tok


# Writing


def _write(
    work: Unfinished, results: Iterator[list[Encoded]], tok: Tokenizer, shard_tokens: int, documents: bool
) -> tuple[SplitMeta, SplitMeta, str]:
    """Add to the token files what is not in them yet. What they hold then, and the sha256 of them and the tokenizer."""
    hashed = not documents and not work.done  # on the way, as all comes in the order of the files
    with Sha256() as digest, Worker() as flushing, ExitStack() as files:
        writers = {
            split: files.enter_context(SplitWriter(work.folder, split, shard_tokens, tok.dtype, flushing, counts))
            for split, counts in work.counts.items()
        }
        for done, encoded in enumerate(results, start=work.done + 1):
            for split, ids, counts in encoded:
                ids = ids.astype(tok.dtype.newbyteorder("<"), copy=False)
                writers[split].write(ids, counts)
                if hashed:
                    digest.update(ids.data)
            if work.due:
                work.record(done, writers)
        train, val = (SplitMeta(shards=writer.finish(), **writer.counts) for writer in writers.values())
        if not hashed:
            for path in split_files(work.folder, "train", train) + split_files(work.folder, "val", val):
                with open(path, "rb") as file:
                    while block := file.read(BLOCK):
                        digest.update(block)
        canonical = json.dumps(tok.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        both = f"{train.tokens},{val.tokens}"  # else another split of the same text would look the same
        digest.update(f"{canonical}{both}".encode("ascii"))
        return train, val, digest.hexdigest()


def _require_both(train: SplitMeta, val: SplitMeta, documents: bool) -> None:
    n_documents = (train.documents or 0) + (val.documents or 0)
    if documents and not n_documents:
        raise UserError("the input is empty: there is no text to learn from")
    if documents and not (train.documents and val.documents):
        missing, option = ("validation", "larger") if train.documents else ("training", "smaller")
        raise UserError(
            f"none of {n_documents:,} document(s) fell to the {missing} split: a hash of each says where it goes. "
            f"Use more documents, or a {option} --val-fraction"
        )
    if min(train.tokens, val.tokens) < 2:
        raise UserError(
            f"the text is too short for this tokenizer: {train.tokens} tokens to train on, {val.tokens} to validate "
            "on; each part needs at least 2. Use a longer text, or --tokenizer char"
        )


def _inputs(files: Sequence[TextFile]) -> list[InputMeta]:
    if len(files) <= MAX_INPUTS:
        return [InputMeta(name=file.name, bytes=file.size, sha256=file.sha256) for file in files]
    together = hashlib.sha256("".join(f"{file.sha256}  {file.name}\n" for file in files).encode()).hexdigest()
    return [InputMeta(name=f"{len(files):,} files", bytes=sum(file.size for file in files), sha256=together)]


def _write_meta(folder: Path, meta: DatasetMeta) -> None:
    with open(folder / "meta.json", "x", encoding="ascii") as file:
        json.dump(meta.document(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
