"""Files of documents -> a dataset folder: formats, ends of text, the split, what is refused, and how work is shared."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from minigpt_cli.core import corpus, documents, textfiles
from minigpt_cli.core.corpus import Report, prepare
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.documents import validates
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.tokenizer import from_json, train_bpe

TEXTS = [f"Document {i}: Käse, 東京, 😀.\nSpeak, speak{'!' * (i % 7)}\n" for i in range(60)]
TEXTS += ["no line end", "It spells <|endoftext|> itself.", "\r\n windows \r\n", "x"]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def as_jsonl(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def as_parquet(path: Path, texts: Sequence[str | None], kind: pyarrow.DataType | None = None, rows: int = 7) -> Path:
    column = pyarrow.array(texts, pyarrow.string()).cast(kind or pyarrow.string())
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": column}), path, row_group_size=rows)
    return path


def as_folder(folder: Path, texts: Sequence[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:05d}.txt").write_bytes(text.encode())
    return folder


def split_documents(report: Report) -> tuple[list[str], list[str]]:
    """The documents of each split, as they lie on the disk."""
    dataset, tok = Dataset(report.out), from_json(report.meta.tokenizer)
    found = []
    for tokens, meta in ((dataset.train[:], dataset.meta.train), (dataset.val[:], dataset.meta.val)):
        ends = np.flatnonzero(tokens == tok.end_of_text)
        assert ends[-1] == len(tokens) - 1, "every document is ended"
        texts = [tok.decode(tokens[start:end]) for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True)]
        assert meta.documents == len(texts)
        assert (meta.characters, meta.bytes) == (len("".join(texts)), len("".join(texts).encode()))
        found.append(texts)
    return found[0], found[1]


def expected_documents(texts: Sequence[str], fraction: float = 0.1) -> tuple[list[str], list[str]]:
    return [t for t in texts if not validates(t, fraction)], [t for t in texts if validates(t, fraction)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "a.jsonl": lambda p: written(p, as_jsonl(TEXTS)),
    "windows.jsonl": lambda p: written(p, b"\xef\xbb\xbf" + as_jsonl(TEXTS).replace(b"\n", b"\r\n\r\n")),
    "no-last-newline.jsonl": lambda p: written(p, as_jsonl(TEXTS).strip()),
    "A.JSONL.GZ": lambda p: written(p, gzip.compress(as_jsonl(TEXTS[:9])) + gzip.compress(as_jsonl(TEXTS[9:]))),
    "a.jsonl.zst": lambda p: written(p, zstd(as_jsonl(TEXTS[:9])) + zstd(as_jsonl(TEXTS[9:]))),
    "a.parquet": lambda p: as_parquet(p, TEXTS),
    "large.parquet": lambda p: as_parquet(p, TEXTS, pyarrow.large_string(), rows=1000),
    "dictionary.parquet": lambda p: as_parquet(p, TEXTS, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    "folder": lambda p: as_folder(p, TEXTS),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("unit", [300, documents.UNIT])
def test_every_format_gives_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, unit: int
) -> None:
    monkeypatch.setattr(documents, "UNIT", unit)
    report = prepare([FORMATS[name](tmp_path / name)], tmp_path / "out", documents=name == "folder")
    assert split_documents(report) == expected_documents(TEXTS)
    assert json.loads((report.out / "meta.json").read_bytes())["format_version"] == 2
    if name != "folder":
        data = (tmp_path / name).read_bytes()
        [source] = report.meta.inputs
        assert (source.bytes, source.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_formats_mix_in_the_order_given_and_empty_documents_are_none(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(["", *TEXTS[:20], ""]))
    as_folder(tmp_path / "c", ["", *TEXTS[40:50]])
    inputs = [tmp_path / "b.jsonl", as_parquet(tmp_path / "a.parquet", ["", *TEXTS[20:40]]), tmp_path / "c"]
    assert split_documents(prepare(inputs, tmp_path / "out")) == expected_documents(TEXTS[:50])


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe", "file", "own"])
def test_the_end_of_text_is_a_token_that_no_text_leads_to(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(TEXTS))
    if tokenizer in ("file", "own"):  # of these, one knows an end of text; a text that it was not made for
        learned = train_bpe(["some other text " * 20], 260).to_json()["tokenizer"]
        if tokenizer == "own":
            special = {"id": 260, "content": "<|end_of_text|>", "special": True}
            learned["added_tokens"] = [{"id": 259, "content": "<pad>", "special": True}, special]
            del (
                learned["model"]["merges"][-1],
                learned["model"]["vocab"][max(learned["model"]["vocab"], key=learned["model"]["vocab"].get)],
            )
        (tmp_path / "tokenizer.json").write_text(json.dumps(learned))
    choice = str(tmp_path / "tokenizer.json") if tokenizer in ("file", "own") else tokenizer
    report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=choice)
    tok = from_json(report.meta.tokenizer)
    assert split_documents(report) == expected_documents(TEXTS)
    sizes = {"char": len(set("".join(TEXTS))), "byte": 256, "file": 260, "own": 260}
    assert tok.end_of_text == report.meta.tokenizer["end_of_text"] == sizes.get(tokenizer, tok.vocab_size - 1)
    assert tok.vocab_size == tok.end_of_text + 1
    assert tok.token_bytes()[tok.end_of_text] == b""
    assert tok.end_of_text not in tok.encode("a<|endoftext|>b<|end_of_text|>" if tokenizer != "char" else TEXTS[61])
    assert tok.decode([tok.end_of_text]) == ""


def test_a_tokenizer_that_composes_accents_does_so_in_each_document(tmp_path: Path) -> None:
    learned = train_bpe(["some text " * 20], 260).to_json()["tokenizer"] | {"normalizer": {"type": "NFC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(learned))
    texts = [f"e\u0301 {i} e" if i % 2 else f"\u0301 begins {i}" for i in range(60)]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(texts))
    report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
    tok, tokens = from_json(report.meta.tokenizer), Dataset(report.out).train[:]
    composed = [tok.given_back(text) for text in expected_documents(texts)[0]]
    assert tok.decode(tokens) == "".join(composed)
    assert composed[0] != expected_documents(texts)[0][0] or composed[1] != expected_documents(texts)[0][1]


def test_the_vocabulary_size_counts_the_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(TEXTS))
    report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer="bpe", vocab_size=290)
    assert (report.vocab_size, report.meta.tokenizer["end_of_text"]) == (290, 289)


# The split


def test_a_document_validates_by_what_it_says_not_by_where_it_stands(tmp_path: Path) -> None:
    texts = [f"Text number {i}" for i in range(2000)]
    for name, order in (("a", texts), ("b", texts[::-1] + texts[:500])):
        (tmp_path / f"{name}.jsonl").write_bytes(as_jsonl(order))
    train, val = split_documents(prepare([tmp_path / "a.jsonl"], tmp_path / "1", tokenizer="byte"))
    again, val_again = split_documents(prepare([tmp_path / "b.jsonl"], tmp_path / "2", tokenizer="byte"))
    assert not set(train) & set(val)
    assert abs(len(val) / 2000 - 0.1) < 0.025  # 3.7 standard deviations
    assert (set(again), set(val_again)) == (set(train), set(val))
    assert len(again) + len(val_again) == 2500
    half = split_documents(prepare([tmp_path / "a.jsonl"], tmp_path / "3", tokenizer="byte", val_fraction=0.5))[1]
    assert set(val) < set(half)
    assert abs(len(half) / 2000 - 0.5) < 0.05


@pytest.mark.parametrize(
    ("texts", "fraction", "message"),
    [
        ([], 0.1, "the input is empty"),
        (["", ""], 0.1, "the input is empty"),
        (TEXTS[:2], 1e-9, r"none of 2 document\(s\) fell to the validation split.* larger --val-fraction"),
        (TEXTS[:1], 1 - 1e-9, r"none of 1 document\(s\) fell to the training split.* smaller --val-fraction"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_each_split_needs_a_document(
    tmp_path: Path, texts: list[str], fraction: float, message: str, tokenizer: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(texts))
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer, val_fraction=fraction)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# Input that will not do


def as_bad_utf8(path: Path) -> Path:
    offsets = pyarrow.py_buffer(np.array([0, 2, 4, 6], np.int32).tobytes())
    column = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"okok\xff\xfe"))
    parquet.write_table(pyarrow.table({"text": column}), path)
    return path


def damaged(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


BAD_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "line 2: not JSON": ("a.jsonl", lambda p: p.write_bytes(b'{"text": "a"}\n{"text": \n')),
    "line 1: not a JSON object": ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(b"[1]\n"))),
    'line 1: no field "text" (it has "body", "id"); name the text\'s field with --text-field': (
        "a.jsonl", lambda p: p.write_bytes(b'{"body": "a", "id": 1}')),
    'line 1: no field "text" (it has none)': ("a.jsonl", lambda p: p.write_bytes(b"{}")),
    'line 1: "text" is not a text': ("a.jsonl", lambda p: p.write_bytes(b'{"text": 3}')),
    'line 3: "text" is not a text': ("a.jsonl", lambda p: p.write_bytes(b'{"text": "a"}\n\n{"text": null}')),
    "line 1: half a surrogate pair": ("a.jsonl", lambda p: p.write_bytes(b'{"text": "\\ud800"}')),
    "line 1: a NUL character": ("a.jsonl", lambda p: p.write_bytes(b'{"text": "a\\u0000"}')),
    "line 3: not JSON": ("a.jsonl", lambda p: p.write_bytes(b"\n\n" + b"[" * 50_000)),
    "line 1: not UTF-8": ("a.jsonl.zst", lambda p: p.write_bytes(zstd(b'{"text": "\xff"}'))),
    "line 2: not JSON ": ("a.jsonl", lambda p: p.write_bytes(b'{"text": "a"}\n' + b"1" * 9999 + b"x")),
    "line 2: a document of more than 0 MiB; is it one a line?": (
        "a.jsonl", lambda p: p.write_bytes(b'{"text": "a"}\n' + b" " * 3_000_000)),
    "a document of more than 0 MiB; a text of any size": (
        "a.txt.gz", lambda p: p.write_bytes(gzip.compress(b" " * 3_000_000))),
    "row 3: a document of more than 0 MiB": ("a.parquet", lambda p: as_parquet(p, ["a", "b", "c" * 200_000])),
    "a damaged or incomplete gzip file": ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(as_jsonl(TEXTS))[:-9])),
    "a damaged or incomplete zstd file": ("a.jsonl.zst", lambda p: p.write_bytes(zstd(as_jsonl(TEXTS))[:-9])),
    'no column "text" (it has "id", "texte"); name the text\'s column with --text-field': (
        "a.parquet", lambda p: parquet.write_table(pyarrow.table({"id": [1], "texte": ["a"]}), p)),
    'column "text" holds int64, not text': (
        "a.parquet", lambda p: parquet.write_table(pyarrow.table({"text": [1]}), p)),
    'column "text" holds list<': ("a.parquet", lambda p: parquet.write_table(pyarrow.table({"text": [["a"]]}), p)),
    "row 9: null, where a text should be": ("a.parquet", lambda p: as_parquet(p, [*TEXTS[:8], None, "a"])),
    "row 3: not UTF-8": ("a.parquet", as_bad_utf8),
    "row 2: a NUL character": ("a.parquet", lambda p: as_parquet(p, ["a", "\0"])),
    "damaged: ": ("a.parquet", lambda p: damaged(as_parquet(p, TEXTS), lambda data: data[:-9])),
    "damaged:": (
        "a.parquet", lambda p: damaged(as_parquet(p, 9 * TEXTS, rows=9), lambda d: d[:5000] + b"\xff" * 99 + d[5099:])),
    "damaged": ("a.parquet", lambda p: p.write_bytes(b"PAR1 and no more")),
    "unpack this one first": ("a.parquet.gz", lambda p: p.write_bytes(gzip.compress(b"PAR1"))),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    name, write = BAD_FILES[message]
    monkeypatch.setattr(documents, "MAX_DOCUMENT", 100_000 if " 0 MiB" in message else documents.MAX_DOCUMENT)
    write(tmp_path / name)
    with pytest.raises(UserError) as error:
        prepare([tmp_path / name], tmp_path / "out", tokenizer="byte", documents=True)
    assert str(error.value).startswith(f"{name}: ")
    assert message.strip() in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst", "folder"])
def test_without_pyarrow_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / name if name == "folder" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "a.txt.zst").write_bytes(zstd(b"text"))
    as_parquet(folder / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"reading this needs pyarrow; pip install 'minigpt\[data\]'"):
        prepare([tmp_path / name], tmp_path / "out")


def test_another_column_or_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(TEXTS).replace(b'"text"', b'"body"'))
    parquet.write_table(pyarrow.table({"n": [1] * len(TEXTS), "body": TEXTS}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        report = prepare([tmp_path / name], tmp_path / "out", text_field="body", force=True)
        assert split_documents(report) == expected_documents(TEXTS)


def test_many_inputs_are_recorded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_INPUTS", 9)
    report = prepare([as_folder(tmp_path / "a", TEXTS)], tmp_path / "out", documents=True)
    [together] = report.meta.inputs
    assert (together.name, together.bytes) == (f"{len(TEXTS)} files", sum(len(text.encode()) for text in TEXTS))


# Processes and shards


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 MB of documents, of many lengths."""
    rng = np.random.default_rng(1)
    words = "".join(map(chr, rng.integers(97, 123, 4000)))
    pieces = [words[i : i + n] for i, n in zip(rng.integers(0, 3900, 5000), rng.integers(2, 9, 5000), strict=True)]
    texts = [" ".join(pieces[i] for i in rng.integers(0, 5000, rng.integers(1, 400))) for _ in range(2000)]
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    path.write_bytes(as_jsonl(texts))
    return path


def test_neither_processes_nor_units_nor_shards_change_the_tokens(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 400}
    one = prepare([many], tmp_path / "1", workers=1, **options)
    two = prepare([many], tmp_path / "2", workers=2, **options)
    assert contents(one.out) == contents(two.out)
    assert set(contents(one.out)) == {"train.bin", "val.bin", "meta.json"}
    monkeypatch.setattr(documents, "UNIT", 10_000)
    monkeypatch.setattr(textfiles, "BLOCK", 10_000)
    limit = one.meta.train.tokens // 3
    three = prepare([many], tmp_path / "3", workers=3, shard_tokens=limit, **options)
    files = contents(three.out)
    assert set(files) == {*(f"train-{i:05d}.bin" for i in range(4)), "val.bin", "meta.json"}
    assert three.meta.train.shards == [limit, limit, limit, one.meta.train.tokens - 3 * limit]
    whole = contents(one.out)
    assert b"".join(files[f"train-{i:05d}.bin"] for i in range(4)) == whole["train.bin"]
    assert files["val.bin"] == whole["val.bin"]
    assert three.meta.fingerprint == one.meta.fingerprint
    dataset = Dataset(three.out)
    assert dataset.meta == three.meta
    assert np.array_equal(dataset.train[:], Dataset(one.out).train)


def test_an_error_in_a_process_is_that_of_the_first_bad_line(tmp_path: Path, many: Path) -> None:
    lines = many.read_bytes().split(b"\n")
    lines[1500] = b"bad"
    lines[1990] = b"worse"
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"bad\.jsonl: line 1,501: not JSON"):
        prepare([tmp_path / "bad.jsonl"], tmp_path / "out", tokenizer="byte", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_vocabulary_beyond_16_bits(tmp_path: Path) -> None:
    """70,000 tokens: all bytes, all pairs of them, and triples of an x and a pair."""
    learned = train_bpe(["ab ab"], 257).to_json()["tokenizer"]
    letters = list(learned["model"]["vocab"])[:256]
    pairs = [(a, b) for a in letters for b in letters] + [("x", a + b) for a in letters for b in letters][:4207]
    learned["model"] |= {
        "vocab": {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs)])},
        "merges": [list(pair) for pair in pairs],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(learned))
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(TEXTS))
    report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
    assert (report.vocab_size, report.meta.dtype) == (70_000, "uint32")
    assert split_documents(report) == expected_documents(TEXTS)
    assert int(Dataset(report.out).train[:].max()) == 69_999
