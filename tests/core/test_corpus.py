"""Text files -> a dataset folder: the split, the streaming, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt_cli.core import bpe, textfiles, textstream, unfinished
from minigpt_cli.core.background import Worker
from minigpt_cli.core.corpus import Report, prepare
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.tokenizer import BpeTokenizer, from_json

PROSE = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 30
PACK = {"gz": gzip.compress, "zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}
MIXED = "Ein Käse, 東京 und ein 😀.\r\nZweite Zeile\tmit 'Zeichen'…\n" * 40


@pytest.fixture
def text_file(tmp_path: Path) -> Callable[..., Path]:
    """`text_file(content, name)`: a file of that text, or of those bytes."""

    def make(content: str | bytes, name: str = "input.txt") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    return make


def make(tmp_path: Path, *inputs: Path, **options: Any) -> Report:
    return prepare(inputs, tmp_path / "out", **options)


def texts(report: Report) -> tuple[str, str]:
    """What the two splits say, read back from the disk."""
    dataset = Dataset(report.out)
    tok = from_json(dataset.meta.tokenizer)
    return tok.decode(dataset.train), tok.decode(dataset.val)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
@pytest.mark.parametrize("text", [PROSE, MIXED])
def test_every_tokenizer_sees_the_seeds_split(
    tmp_path: Path, text_file: Callable[..., Path], tokenizer: str, text: str
) -> None:
    report = make(tmp_path, text_file(text), tokenizer=tokenizer)
    n = int(0.9 * len(text))
    train, val = texts(report)
    assert (train, val) == (text[:n], text[n:])
    for meta, part in ((report.meta.train, train), (report.meta.val, val)):
        assert (meta.characters, meta.bytes) == (len(part), len(part.encode()))
    assert report.tokens == report.meta.train.tokens + report.meta.val.tokens
    data = text.encode()
    [source] = report.meta.inputs
    assert (source.name, source.bytes, source.sha256) == ("input.txt", len(data), hashlib.sha256(data).hexdigest())


def test_char_ids_and_files_are_the_seeds(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    report = make(tmp_path, text_file(MIXED))
    stoi = {c: i for i, c in enumerate(sorted(set(MIXED)))}
    n = int(0.9 * len(MIXED))
    stored = (report.out / "train.bin").read_bytes()
    assert stored == np.array([stoi[c] for c in MIXED[:n]], dtype="<u2").tobytes()
    canonical = json.dumps(report.meta.tokenizer, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    counts = f"{n},{len(MIXED) - n}".encode()
    whole = stored + (report.out / "val.bin").read_bytes() + canonical + counts
    assert report.meta.fingerprint == hashlib.sha256(whole).hexdigest()
    assert sorted(os.listdir(report.out)) == ["meta.json", "train.bin", "val.bin"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@given(st.integers(20, 10**9))
def test_a_tenth_means_what_it_means_in_the_seed(n: int) -> None:
    assert textstream.train_characters(n, 0.1) == int(0.9 * n)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_tiny_chunks_change_nothing(
    tmp_path: Path, text_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    paths = [text_file("\ufeff" + MIXED, "a.txt"), text_file(PROSE, "b.txt")]
    options = {"tokenizer": tokenizer, "vocab_size": 300 if tokenizer == "bpe" else None}
    normal = prepare(paths, tmp_path / "normal", **options)
    for size in (3, 5, 50):  # a BOM is looked for in the first three bytes
        monkeypatch.setattr(textfiles, "BLOCK", size)
        monkeypatch.setattr(textstream, "CHUNK", size + 1)
        chunked = prepare(paths, tmp_path / f"chunked{size}", **options)
        assert chunked.meta == normal.meta


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["word", " ", "  ", "\n", "\r\n", "\t", "don't", ".", "é", "東", "1"]), min_size=40))
def test_bpe_over_chunks_is_bpe_over_the_whole(tmp_path: Path, pieces: list[str]) -> None:
    text = "".join(pieces) + " é 1." * (1 + len(pieces) // 4)  # so that the tail is more than one token
    path = tmp_path / "input.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textstream, "CHUNK", 7)
        report = prepare([path], tmp_path / "out", tokenizer="bpe", vocab_size=300, force=True)
    tok = from_json(report.meta.tokenizer)
    assert isinstance(tok, BpeTokenizer)
    n = int(0.9 * len(text))
    for part, stored in ((text[:n], Dataset(report.out).train), (text[n:], Dataset(report.out).val)):
        assert stored.tolist() == tok._rust.encode(part, add_special_tokens=False).ids


def test_a_text_without_borders_is_cut_all_the_same(
    tmp_path: Path, text_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textstream, "CHUNK", 100)
    monkeypatch.setattr(textstream, "MAX_UNCUT", 1000)
    assert "".join(texts(make(tmp_path, text_file("   \n" * 5000), tokenizer="bpe"))) == "   \n" * 5000
    pieces = list(textstream.recut([" " * 100] * 50, lambda text: 0))
    assert "".join(pieces) == " " * 5000
    assert max(map(len, pieces)) == 1100


def test_bpe_learns_from_the_training_split_only(
    tmp_path: Path, text_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "abcd " * 900 + "wxyz " * 100
    tokens = from_json(make(tmp_path, text_file(text), tokenizer="bpe").meta.tokenizer).token_bytes()
    assert b"abcd" in tokens
    assert b"wxyz" not in tokens
    monkeypatch.setattr(bpe, "_PIECE", 50)
    monkeypatch.setattr(bpe, "MAX_SAMPLE", 1000)
    report = make(tmp_path, text_file(text), tokenizer="bpe", force=True)
    assert any("one part in 8" in note for note in report.notes)
    assert "".join(texts(report)) == text


@pytest.mark.parametrize("limits", [(3000, 10**9), (10**9, 300)])
def test_bpe_learns_from_a_sample_that_is_spread_and_bounded(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int]
) -> None:
    monkeypatch.setattr(bpe, "_PIECE", 20)
    monkeypatch.setattr(bpe, "MAX_SAMPLE", limits[0])
    monkeypatch.setattr(bpe, "MAX_SAMPLE_WORDS", limits[1])
    text = "".join(f"word{i} \n" for i in range(5000))
    sample, step = bpe.sample([text[:9999], text[9999:]])
    numbers = [int(word[4:]) for piece in sample for word in piece.split() if len(word) > 4]
    assert sum(map(len, sample)) <= limits[0]
    assert len(set(numbers)) <= limits[1]
    assert len(set(numbers)) > 100
    assert max(np.diff(numbers)) <= 3 * step + 3
    assert bpe.sample([text[:100]]) == (list(bpe.pieces(text[:100])), 1)


def test_uint32_where_the_vocabulary_needs_it(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    text = "".join(chr(c) for c in range(0x10000, 0x10000 + 70_000))
    report = make(tmp_path, text_file(text))
    assert report.meta.dtype == "uint32"
    assert (report.out / "train.bin").stat().st_size == 4 * 63_000
    assert "".join(texts(report)) == text


# Inputs


def test_several_files_a_folder_and_a_glob(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    first, second = text_file(PROSE, "d/b.txt"), text_file("more\n" * 9, "d/c/a.md")
    text_file("hidden " * 9, "d/.hidden.txt")
    text_file("hidden " * 9, "d/.git/x.txt")
    text_file(b"\x89PNG\0\xff", "d/z.png")
    text_file(gzip.compress(b"\0\0binary"), "d/y.tar.gz")
    text_file("", "d/empty.txt")
    os.mkfifo(tmp_path / "d/pipe")
    expected = PROSE + "more\n" * 9
    assert "".join(texts(prepare([first, second], tmp_path / "1"))) == expected
    report = prepare([tmp_path / "d"], tmp_path / "2")
    assert "".join(texts(report)) == expected
    assert [i.name for i in report.meta.inputs] == ["b.txt", "c/a.md", "empty.txt"]
    [note] = [note for note in report.notes if "skipped" in note]
    assert "z.png" in note
    assert "pipe" in note
    assert ".git" in note
    assert "".join(texts(prepare([tmp_path / "d" / "*.txt", tmp_path / "d/**/*.md"], tmp_path / "3"))) == expected
    report = prepare([first, tmp_path / "d/../d/b.txt"], tmp_path / "4")
    assert "".join(texts(report)) == PROSE
    assert report.notes == ["b.txt: named twice, used once"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.parquet"])
def test_a_packed_file_that_is_none_is_no_text_of_its_folder(
    tmp_path: Path, text_file: Callable[..., Path], name: str
) -> None:
    text_file(PROSE, "d/b.txt")
    text_file(b"not what it is called", f"d/{name}")
    assert make(tmp_path, tmp_path / "d").notes == [f"d: skipped, hidden or no text: {name}"]


def test_a_prepared_dataset_inside_a_folder_is_not_text(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    path = text_file(PROSE, "d/a.txt")
    prepare([path], tmp_path / "d" / "old")
    report = prepare([tmp_path / "d"], tmp_path / "out")
    assert [i.name for i in report.meta.inputs] == ["a.txt"]
    assert any("prepared dataset, skipped" in note for note in report.notes)


@pytest.mark.parametrize("name", ["a.txt.gz", "TWO.TXT.GZ", "a.txt.zst", "two.md.zst"])
def test_packed_text(tmp_path: Path, text_file: Callable[..., Path], name: str) -> None:
    half, pack = len(MIXED) // 2, PACK[name.lower().rpartition(".")[2]]
    parts = [MIXED[:half], MIXED[half:]] if "two" in name.lower() else [MIXED]
    content = b"".join(pack(part.encode()) for part in parts)
    report = make(tmp_path, text_file(content, name))
    assert "".join(texts(report)) == MIXED
    assert report.meta.inputs[0].sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("val_fraction", [0.1, 0.6])
def test_the_bytes_of_each_split_are_those_of_its_text(
    tmp_path: Path, text_file: Callable[..., Path], name: str, val_fraction: float
) -> None:
    content = "\ufeff" + MIXED
    file = text_file(gzip.compress(content.encode()) if name.endswith("gz") else content, name)
    report = make(tmp_path, file, text_file(MIXED, "b.txt"), val_fraction=val_fraction)
    train, val = texts(report)
    assert train + val == MIXED * 2
    assert (report.meta.train.bytes, report.meta.val.bytes) == (len(train.encode()), len(val.encode()))


def test_bom_crlf_and_lone_cr_are_said_or_kept(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    report = make(tmp_path, text_file(b"\xef\xbb\xbf" + b"line\r\n" * 30 + b"old\rmac\r"))
    assert "".join(texts(report)) == "line\r\n" * 30 + "old\rmac\r"
    assert len(report.notes) == 2
    assert "BOM" in report.notes[0]
    assert "CRLF" in report.notes[1]
    assert make(tmp_path, text_file("old\rmac\r" * 9), force=True).notes == []


def test_crlf_is_noticed_across_blocks(
    tmp_path: Path, text_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfiles, "BLOCK", 31)
    assert len(make(tmp_path, text_file("x" * 30 + "\r\n" + "y" * 30)).notes) == 1


BAD_INPUT = {
    "the input is empty": b"",
    "the input is empty ": b"\xef\xbb\xbf",
    "too short: 1 character, 0 of them to train on and 1 to validate on": b"x",
    "too short: 10 characters, 9 of them to train on and 1 to validate on": b"x" * 10,
    "byte 1,003 is 0xff": b"abc" + b"d" * 1000 + b"\xff and so on",
    "byte 10 is 0xe9\nIt looks like Latin-1": b"l'ann\xc3\xa9e d\xe9but " * 9,
    "a NUL byte at byte 3\nIt looks like UTF-16": "hello".encode("utf-16"),
    "a NUL byte at byte 1\nIt looks like UTF-16": "hello world".encode("utf-16-le"),
    "byte 0 is 0xff\nIt looks like UTF-16": "\u6771\u4eac".encode("utf-16"),
    "byte 1 is 0x8b\nIt looks gzip": b"\x1f\x8b\x08" + b"x" * 99,
    "a NUL byte at byte 3\nIt looks gzip": gzip.compress(b"hello"),
    "byte 8 is 0xe2": b"cut off \xe2\x82",
    "byte 6 is 0xff": b"\xef\xbb\xbfabc\xff",
    "byte 3 is 0xed": b"abc\xed\xa0\x80 surrogates",
    "a NUL byte at byte 5; this is no plain text file": b"hello\0world" + b"." * 99,
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_text(
    tmp_path: Path, text_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    path = text_file(BAD_INPUT[message])
    for block in (textfiles.BLOCK, 4):
        if block == 4 and "looks like" in message:
            continue  # the hint comes from the first block
        monkeypatch.setattr(textfiles, "BLOCK", block)
        with pytest.raises(UserError) as error:
            make(tmp_path, path)
        assert message.strip() in str(error.value)
        assert str(error.value).count("\n") <= 1
        assert os.listdir(tmp_path) == ["input.txt"]


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "garbage", "plain"])
def test_bad_packing(tmp_path: Path, text_file: Callable[..., Path], damage: str, packing: str) -> None:
    good = PACK[packing](os.urandom(3000).hex().encode())
    bad = {
        "truncated": good[:-9],
        "corrupt": good[:12] + b"\0\xff\0" + good[15:],
        "garbage": good + b"garbage",
        "plain": b"just text",
    }
    with pytest.raises(UserError, match=f"a damaged or incomplete {'gzip' if packing == 'gz' else 'zstd'} file"):
        make(tmp_path, text_file(bad[damage], f"a.txt.{packing}"))


def test_paths_that_will_not_do(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "socket"))
    for name, message in (
        ("missing.txt", "no such file or folder"),
        ("*.nothing", "no such file or folder"),
        ("dangling", "no such file or folder"),
        ("nul\0byte", "no such file or folder"),
        ("pipe", "not a regular file"),
        ("socket", "not a regular file"),
        ("hollow", "no text files in this folder"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path, tmp_path / name)
    server.close()
    with pytest.raises(UserError, match="not a regular file"):
        make(tmp_path, Path(os.devnull))


def test_a_name_that_is_no_text_is_spelled_out(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/bad\xff\nname\x1b.txt"
    Path(os.fsdecode(path)).write_text(PROSE)
    report = make(tmp_path, Path(os.fsdecode(path)))
    assert report.meta.inputs[0].name == "bad\\udcff\\nname\x1b.txt"  # the terminal's own dangers are console's to mend


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_fractions_that_are_none(tmp_path: Path, text_file: Callable[..., Path], fraction: float) -> None:
    with pytest.raises(UserError, match="--val-fraction"):
        make(tmp_path, text_file(PROSE), val_fraction=fraction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "word"}, "choose char, byte, bpe"),
        ({"tokenizer": "missing.json"}, "no such tokenizer file"),
        ({"tokenizer": "char", "vocab_size": 300}, "--vocab-size goes with --tokenizer bpe"),
        ({"tokenizer": "byte", "vocab_size": 300}, "--vocab-size goes with --tokenizer bpe"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "--vocab-size must lie between 257"),
        ({"tokenizer": "bpe", "vocab_size": 10**8}, "--vocab-size must lie between 257"),
    ],
)
def test_options_that_will_not_do(
    tmp_path: Path, text_file: Callable[..., Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path, text_file(PROSE), **options)


def test_too_few_tokens(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="1 to validate on"):
        make(tmp_path, text_file("ab" * 10 + "abababababababababab"), tokenizer="bpe", val_fraction=0.2)


# An existing tokenizer.json


def test_an_existing_tokenizer(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    learned = make(tmp_path, text_file(PROSE), tokenizer="bpe", vocab_size=300).meta.tokenizer
    file = text_file(json.dumps(learned["tokenizer"]), "tokenizer.json")
    other = text_file(MIXED + "<|endoftext|>", "other.txt")
    report = prepare([other], tmp_path / "again", tokenizer=str(file))
    assert report.meta.tokenizer == learned
    assert "".join(texts(report)) == MIXED + "<|endoftext|>"
    learned["tokenizer"]["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(learned["tokenizer"]))
    with pytest.raises(UserError, match=r"tokenizer\.json: this tokenizer normalizes"):
        prepare([other], tmp_path / "again", tokenizer=str(file), force=True)


def test_a_tokenizer_that_loses_text_is_found_out(
    tmp_path: Path, text_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = bpe.token_table
    monkeypatch.setattr(bpe, "token_table", lambda document: [text.lower() for text in table(document)])
    for text in (PROSE, PROSE.lower() + "The end"):  # found out in the first piece, or in the last
        with pytest.raises(UserError, match="does not give the text back exactly"):
            make(tmp_path, text_file(text), tokenizer="bpe")
        assert os.listdir(tmp_path) == ["input.txt"]


# The folder


def test_what_may_be_replaced(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    path = text_file(PROSE)
    out = tmp_path / "out"
    out.mkdir()
    first = make(tmp_path, path)  # an empty folder is taken
    with pytest.raises(UserError, match="already holds a dataset"):
        make(tmp_path, path)
    second = make(tmp_path, path, tokenizer="byte", force=True)
    assert Dataset(out).meta == second.meta != first.meta
    (out / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="holds other files and is never replaced"):
        make(tmp_path, path, force=True)
    assert (out / "notes.md").read_text() == "mine"
    (tmp_path / "web").mkdir()
    (tmp_path / "web/meta.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files and is never replaced"):
        prepare([path], tmp_path / "web", force=True)
    with pytest.raises(UserError, match="exists and is no folder"):
        prepare([path], path, force=True)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="is no folder"):
        prepare([path], tmp_path / "loop", force=True)


CLUTTER = [".DS_Store", "._train.bin", "Thumbs.db", "desktop.ini", "Desktop.ini", ".directory", "Icon\r", ".nfs00a2"]


@pytest.mark.parametrize("name", CLUTTER)
def test_what_file_managers_leave_stops_nobody_and_is_no_text(
    tmp_path: Path, text_file: Callable[..., Path], name: str
) -> None:
    path = text_file(PROSE, "d/a.txt")
    text_file("[.ShellClassInfo]", f"d/{name}")
    text_file("", f"out/{name}")
    assert "".join(texts(make(tmp_path, path))) == PROSE  # as if the folder were empty
    text_file("", f"out/{name}")
    second = make(tmp_path, tmp_path / "d", tokenizer="byte", force=True)
    assert [file.name for file in second.meta.inputs] == ["a.txt"]
    assert name not in os.listdir(second.out)
    (second.out / name).mkdir()  # that is somebody's
    with pytest.raises(UserError, match="holds other files and is never replaced"):
        make(tmp_path, path, force=True)


def test_the_folder_is_as_open_as_any_other(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    (tmp_path / "other").mkdir()
    assert make(tmp_path, text_file(PROSE)).out.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_to_a_dataset_stays_a_link(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    path = text_file(PROSE)
    real = prepare([path], tmp_path / "real").out
    (tmp_path / "out").symlink_to("real")
    assert make(tmp_path, path, force=True, tokenizer="byte").meta == Dataset(real).meta
    assert (tmp_path / "out").is_symlink()


def test_a_failed_replacement_leaves_the_old_dataset(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    report = make(tmp_path, text_file(PROSE))
    for bad in ("", "x", b"abc\xff" * 99):
        with pytest.raises(UserError):
            make(tmp_path, text_file(bad, "bad.txt"), force=True)
        assert Dataset(report.out).meta == report.meta
    assert sorted(os.listdir(tmp_path)) == ["bad.txt", "input.txt", "out"]


@pytest.mark.parametrize("stage", ["reading", "sampling", "learning BPE", "tokenizing"])
def test_an_interrupt_leaves_nothing(tmp_path: Path, text_file: Callable[..., Path], stage: str) -> None:
    def interrupt(now: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, text_file(PROSE), tokenizer="bpe", progress=interrupt)
    assert os.listdir(tmp_path) == ["input.txt"]


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_is_no_internal_error(
    tmp_path: Path, text_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if where == "write":
        monkeypatch.setattr(unfinished.SplitWriter, "write", full)
    else:  # in the thread that sets the disk to work; the fsync of the end still works
        monkeypatch.setattr(unfinished, "FLUSH", 1)
        monkeypatch.setattr(unfinished.os, "fsync", lambda file, real=os.fsync: full() if in_a_thread() else real(file))
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path, text_file(PROSE))
    assert os.listdir(tmp_path) == ["input.txt"]


def in_a_thread() -> bool:
    return threading.current_thread() is not threading.main_thread()


def test_the_disk_is_set_to_work_early_and_all_is_on_it_in_the_end(
    tmp_path: Path, text_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = text_file(PROSE * 20), os.fsync
    expected = prepare([path], tmp_path / "expected").meta
    early: list[bool] = []
    sizes: list[int] = []

    def fsync(file: int) -> None:
        early.append(in_a_thread())
        sizes.append(os.fstat(file).st_size)
        real(file)

    monkeypatch.setattr(textfiles, "BLOCK", 1000)
    monkeypatch.setattr(unfinished, "FLUSH", 10_000)
    monkeypatch.setattr(unfinished.os, "fsync", fsync)
    monkeypatch.setattr(Worker, "busy", False)  # else how often depends on how fast the disk is
    assert make(tmp_path, path).meta == expected
    assert early.count(True) == 2 * expected.train.tokens // 10_000
    assert {2 * expected.train.tokens, 2 * expected.val.tokens} <= {
        size for size, was in zip(sizes, early, strict=True) if not was
    }


def test_a_file_that_changes_between_the_passes(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    path = text_file(PROSE)
    status = path.stat()

    def change(now: str, done: int, total: int) -> None:
        if now == "reading" and not done < total:
            path.write_text("Z" + PROSE[1:])
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))

    with pytest.raises(MinigptError, match="changed while it was being read") as error:
        make(tmp_path, path, progress=change)
    assert error.value.exit_code == 1
    assert os.listdir(tmp_path) == ["input.txt"]


PREPARE = """
import sys
from pathlib import Path
from minigpt_cli.core.corpus import prepare
def progress(stage, done, total):
    if stage == "tokenizing":
        print("here", flush=True)
        sys.stdin.read()
prepare([Path(sys.argv[1])], Path(sys.argv[2]), force=True, progress=progress)
"""


def test_a_killed_prepare_and_a_live_one(tmp_path: Path, text_file: Callable[..., Path]) -> None:
    path, out = text_file(PROSE), tmp_path / "out"
    command = [sys.executable, "-c", PREPARE, str(path), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        with pytest.raises(MinigptError, match="another minigpt prepare is writing it") as error:
            prepare([path], out)
        assert error.value.exit_code == 1
        prepare([path], tmp_path / "ou")  # a neighbour leaves the live one's folder alone
        assert (tmp_path / ".out.part").is_dir()
        child.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert (tmp_path / ".out.part").is_dir()
    report = prepare([path], out)
    assert Dataset(out).meta == report.meta
    assert sorted(os.listdir(tmp_path)) == ["input.txt", "ou", "out"]


def test_killed_between_the_two_renames_the_old_dataset_comes_back(
    tmp_path: Path, text_file: Callable[..., Path]
) -> None:
    report = make(tmp_path, text_file(PROSE))
    (tmp_path / ".out.old-abcdefgh").mkdir()
    os.rename(report.out, tmp_path / ".out.old-abcdefgh")
    (tmp_path / ".out.part" / "dataset").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a dataset"):
        make(tmp_path, text_file(PROSE))
    assert Dataset(report.out).meta == report.meta
    assert make(tmp_path, text_file(PROSE), force=True).meta == report.meta
    assert sorted(os.listdir(tmp_path)) == ["input.txt", "out"]


# Memory and speed


def peak_memory(path: Path, out: Path, *options: str) -> float:
    """Peak resident MiB of `minigpt prepare` in a process of its own."""
    child = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    command = [sys.executable, "-m", "minigpt_cli", "prepare", str(path), "--out", str(out), *options]
    done = subprocess.run([sys.executable, "-c", child, *command], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _big(lines: Iterable[str], path: Path, size: int) -> Path:
    block = "".join(lines)
    zipped = path.suffix == ".gz"
    with gzip.open(path, "wt", 1, "utf-8") if zipped else open(path, "w", encoding="utf-8") as file:
        for _ in range(size // len(block) + 1):
            file.write(block)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokenizer", "size"),
    [("a.txt", "char", 300), ("a.jsonl.gz", "char", 100), ("unicode.txt", "byte", 300), ("a.txt", "bpe", 40)],
)
def test_memory_stays_bounded(tmp_path: Path, name: str, tokenizer: str, size: int) -> None:
    rng = np.random.default_rng(1)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))) for _ in range(20_000)]
    lines = [" ".join(words[i] for i in rng.integers(0, len(words), 12)) + "\n" for _ in range(2000)]
    if "jsonl" in name:
        lines = [json.dumps({"text": line}) + "\n" for line in lines]
    if name.startswith("unicode"):
        lines = [line.replace("e", "😀") for line in lines]
    small = peak_memory(_big(lines, tmp_path / f"s{name}", 8 << 20), tmp_path / "small", "--tokenizer", tokenizer)
    large = peak_memory(_big(lines, tmp_path / name, size << 20), tmp_path / "large", "--tokenizer", tokenizer)
    assert large < 600
    assert large < small + 150
