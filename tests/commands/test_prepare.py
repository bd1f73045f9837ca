"""`minigpt prepare` as a user meets it: exit codes, messages, the table, and nothing raw on a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clock import PATIENCE, compute, wait_for
from minigpt_cli.commands.prepare import default_out

REPOSITORY = Path(__file__).parents[2]
PROSE = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 30
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run("input.txt", "--force", **environment)` in a folder that holds input.txt."""
    (tmp_path / "input.txt").write_text(PROSE)

    def go(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "minigpt_cli", "prepare", *arguments],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE,
        )  # fmt: skip

    return go


def test_a_text_becomes_a_dataset(run: Run, tmp_path: Path) -> None:
    done = run("input.txt")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("characters", "bytes", "tokens", "vocabulary", "training split", "validation split", "MB/s", "2,430"):
        assert word in done.stdout
    assert done.stdout.splitlines()[-1] == "Next: minigpt train --config cpu"
    meta = json.loads((tmp_path / "data/input/meta.json").read_text())
    assert meta["source"] is None
    assert meta["train"]["tokens"] == 2187
    again = run("input.txt")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        "minigpt: error: data/input: already holds a dataset; replace it with --force, or choose another folder with "
        "--out\n"
    )
    assert run("input.txt", "--force", "--tokenizer", "byte").returncode == 0


def test_the_next_command_names_the_folder(run: Run, tmp_path: Path) -> None:
    done = run("input.txt", "--out", "my data/Käse", "--tokenizer", "bpe", "--vocab-size", "4000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Next: minigpt train --config cpu --data 'my data/Käse'"
    assert "BPE found" in done.stderr


@pytest.mark.parametrize(
    ("path", "out"),
    [
        ("data/input.txt", "data/input"), ("a.jsonl.gz", "data/a"), ("b.TXT.GZ", "data/b"), ("c.jsonl.zst", "data/c"),
        ("plain", "data/plain"),
        ("books/*.txt", "data/corpus"), ("v1.5.txt", "data/v1.5"), (".txt", "data/txt"),
    ],
)  # fmt: skip
def test_the_folder_is_named_after_the_first_input(path: str, out: str) -> None:
    assert default_out(Path(path)) == Path(out)


def test_a_folder_gives_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.books").mkdir()
    assert default_out(tmp_path / "my.books") == Path("data/my.books")
    monkeypatch.chdir(tmp_path / "my.books")
    assert default_out(Path(".")) == Path("data/my.books")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the input is empty"),
        (
            b"x",
            "the text is too short: 1 character, 0 of them to train on and 1 to validate on; each part needs at least",
        ),
        (b"abc\xffdef" * 9, "bad.txt: not UTF-8 text: byte 3 is 0xff"),
        (b"abc\0def" * 9, "bad.txt: a NUL byte at byte 3"),
    ],
)
def test_bad_text(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    done = run("bad.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("minigpt: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") <= 2
    assert not (tmp_path / "data/bad").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "missing.txt: no such file or folder"),
        (["pipe"], "pipe: not a regular file"),
        (["hollow"], "hollow: no text files in this folder"),
        (["input.txt", "--tokenizer", "word"], "--tokenizer word: choose char, byte, bpe"),
        (["input.txt", "--vocab-size", "300"], "--vocab-size goes with --tokenizer bpe"),
        (["input.txt", "--tokenizer", "bpe", "--vocab-size", "3"], "--vocab-size must lie between 257"),
        (["input.txt", "--val-fraction", "nan"], "--val-fraction must lie between 0 and 1, not nan"),
        (["input.txt", "--val-fraction", "1"], "--val-fraction must lie between 0 and 1"),
        (["input.txt", "--out", "input.txt"], "input.txt: exists and is no folder"),
        (["input.txt", "--out", "full", "--force"], "full: this folder holds other files and is never replaced"),
        (["bad.jsonl"], "bad.jsonl: line 2: not JSON"),
        (["bad.jsonl", "--text-field", "body"], 'bad.jsonl: line 1: no field "body" (it has "text")'),
        (["input.txt", "--workers", "0"], "--workers 0: at least 1"),
        (["input.txt", "--shard-tokens", "0"], "--shard-tokens 0: a token file holds at least one token"),
        (["input.txt", "--documents"], "none of 1 document(s) fell to the training split"),
        (["bad.gz"], "bad.gz: a damaged or incomplete gzip file"),
        ([], "Missing argument"),
        (["input.txt", "--vocab-size", "many"], "Invalid value"),
    ],
)
def test_bad_arguments(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.md").write_text("years of work")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text"\n')
    (tmp_path / "bad.gz").write_bytes(b"\x1f\x8b\x08")
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "full/thesis.md").read_text() == "years of work"
    assert not (tmp_path / "data").exists() or os.listdir(tmp_path / "data") == []


def test_debug_shows_a_traceback(run: Run) -> None:
    done = run("missing.txt", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_bom_and_crlf_are_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + b"line\r\n" * 30)
    done = run("windows.txt")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "windows.txt: its byte order mark (BOM) was stripped",
        "windows.txt: its Windows line ends (CRLF) are kept as they are",
    ]


def test_nothing_reaches_the_terminal_raw(run: Run, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\u202e\nx\x1b[2J.txt"
    (tmp_path / evil).write_bytes(b"\xef\xbb\xbf" + b"\x1b[31m red" * 30)
    (tmp_path / f"d{evil}").mkdir()
    (tmp_path / f"d{evil}" / evil).write_bytes(b"\xff\0")
    for arguments in (
        [evil], [evil], [evil, "--force"], [f"d{evil}"], [f"missing{evil}"],
        ["input.txt", "--out", evil], ["input.txt", "--out", f"o{evil}"], ["input.txt", "--tokenizer", evil],
        ["input.txt", "--text-field", evil, "--out", "x"],
    ):  # fmt: skip
        done = run(*arguments)
        assert not {"\x1b", "\x07", "\u202e"} & set(done.stdout + done.stderr), arguments
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_plain_terminals(run: Run, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "käse.txt").write_text("Käse 東京 " * 30, encoding="utf-8")
    done = run("käse.txt", "--force", **environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout


def test_an_unreachable_corpus(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = {"kind": "url", "title": "a closed door", "url": "http://127.0.0.1:1/", "size": 9, "sha256": "0" * 64}
    (tmp_path / "data/sources.yaml").write_text(json.dumps({"input.txt": [source]}))
    done = run("data/input.txt", no_proxy="*")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "data/input.txt is not there; fetching a closed door",
        "minigpt: error: data/input.txt is not there and could not be fetched. "
        "Tried: a closed door: Connection refused",
        "Any text file will do instead: minigpt prepare FILE",
    ]
    assert os.listdir(tmp_path / "data") == ["sources.yaml"]


def test_a_folder_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = run("input.txt", "--out", "file/out")
    assert done.returncode in (1, 2)
    assert "file" in done.stderr
    assert "internal error" not in done.stderr


def test_ctrl_c_leaves_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text(PROSE * 20_000)
    command = [sys.executable, "-m", "minigpt_cli", "prepare", "big.txt", "--tokenizer", "bpe"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as child:
        wait_for((tmp_path / "data/.big.lock").exists, "it to begin")
        compute(child.pid, 0.3)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        assert "interrupted" in child.stderr.read()
    assert child.returncode == 130
    assert os.listdir(tmp_path / "data") == []


def test_a_progress_bar_on_a_terminal_only(run: Run, tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text(PROSE * 4000)
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "minigpt_cli", "prepare", "big.txt"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = os.read(leader, 1 << 20).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "reading" in shown or "tokenizing" in shown
    assert b"\x1b" not in done.stdout
    assert run("big.txt", "--force").stderr == ""


def test_documents_are_counted_and_shards_too(run: Run, tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for i in range(40):
        (tmp_path / "books" / f"{i}.txt").write_text(f"Book {i}. " + PROSE[: 9 * i])
    done = run("books", "--documents", "--tokenizer", "byte", "--shard-tokens", "3000")
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "data/books/meta.json").read_text())
    train, val = meta["train"], meta["val"]
    assert train["documents"] + val["documents"] == 40
    assert train["tokens"] == train["bytes"] + train["documents"]
    assert f"{train['tokens']:,} tokens, {train['documents']} documents, {len(train['shards'])} files" in done.stdout
    assert f"{val['tokens']:,} tokens, {val['documents']} documents" in done.stdout


def test_help_teaches(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in (
        "Example: minigpt prepare data/input.txt",
        "--text-field",
        "--val-fraction",
        "tokenizer.json",
        "4096",
        ".parquet",
    ):
        assert word in done.stdout
