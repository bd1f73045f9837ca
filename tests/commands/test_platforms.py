"""What a machine other than this one lacks, taken away from minigpt: the commands still do their work."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from commands.conftest import TINY, environment, sets
from minigpt_cli.commands import console
from minigpt_cli.core import files, processes, signals, textfiles
from minigpt_cli.core.checkpoint import load, read_header
from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.folders import publish

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the pretence is Linux's")


def windows(*arguments: object) -> str:
    """stdout of a command on a pretended Windows, which must succeed."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "windows.py"), *map(str, arguments)], env=environment(),
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@linux_only
def test_the_four_commands_on_a_pretended_windows(here: Path) -> None:
    (here / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}: my lord"}) + "\n" for i in range(300)))
    bpe = ("--tokenizer", "bpe", "--vocab-size", 280, "--out", "data/a", "--shard-tokens", 500)
    windows("prepare", "a.jsonl", *bpe, "--workers", 2)
    assert '--data "data/set #2"' in windows("prepare", "input.txt", "--out", "data/set #2")
    windows("prepare", "input.txt", "--force")
    (here / "data/input/Thumbs.db").write_bytes(b"\0")
    windows("prepare", "input.txt", "--force")
    more = ("--config", "gpt", *TINY, *sets(train__keep=1), "--out", "run")
    windows("train", *more)
    windows("train", *more, "--overwrite")
    windows("train", "--resume", "--out", "run", *sets(train__max_iters=25))
    assert load("run/last.safetensors").header.step == 25
    assert len(windows("sample", "--ckpt", "run", "--tokens", 30)) == 30
    assert json.loads(windows("eval", "--ckpt", "run", "--json"))["tokens"] > 0
    windows("info", "run")


SHARDED = """
from pathlib import Path
from minigpt_cli.core import checkpoint, shards
from minigpt_cli.core.world import ALONE
saved = checkpoint.load("checkpoints/best.safetensors")
Path("run").mkdir()
header = saved.header.model_dump(exclude={"versions", "checksums"})
shards.save(Path("run/best-00000020.sharded"), saved.tensors, header, ALONE)
"""


@linux_only
@pytest.mark.slow
def test_the_other_commands_on_a_pretended_windows(here: Path) -> None:
    pretended = "import sys; sys.path.insert(0, sys.argv[1]); import windows; windows.pretend();" + SHARDED
    subprocess.run([sys.executable, "-c", pretended, Path(__file__).parents[1]], env=environment(), check=True)
    windows("export", "--ckpt", "run", "--to", "file", "whole.safetensors")
    assert read_header(here / "whole.safetensors").step == 20
    windows("train", "--config", "gpt", *TINY, *sets(model__n_embd=32), "--out", "wide")
    for _ in range(2):
        windows("export", "--ckpt", "wide", "--to", "hf", "exported", "--force")
    windows("import", "exported", "--out", "imported.safetensors")
    windows("inspect", "--ckpt", "imported.safetensors", "--data", "data/input", "--out", "page.html")
    windows("train", "--config", "finetune", "--init-from", "checkpoints", "--out", "tuned", *sets(train__max_iters=2))
    windows("bench", "--config", "gpt", *TINY, "--steps", 2, "--tokens", 5, "--seconds", 1, "--json")


# --- files ---


def test_a_file_that_somebody_reads_for_a_moment_is_replaced_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = os.replace, []

    def busy(source: Path, target: Path) -> None:
        tries.append(target)
        if len(tries) < 3:
            raise PermissionError(13, "The process cannot access the file", str(target))
        real(source, target)

    monkeypatch.setattr(files.os, "replace", busy)
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0, 0.0))
    with pytest.raises(PermissionError), files.atomic_write(tmp_path / "a") as file:  # elsewhere that is no moment
        file.write(b"text")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files, "WINDOWS", True)
    tries.clear()
    with files.atomic_write(tmp_path / "a") as file:
        file.write(b"text")
    assert ((tmp_path / "a").read_bytes(), len(tries)) == (b"text", 3)


def test_a_dataset_that_a_program_has_open_stays_and_is_said_to_be_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/meta.json").write_text("{}")

    def refused(source: Path, target: Path) -> None:
        raise PermissionError(13, "Access is denied", str(source))

    monkeypatch.setattr("os.rename", refused)
    with pytest.raises(MinigptError, match=r"old: cannot be replaced \(Access is denied\); is a program"):
        publish(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/meta.json").exists()


def test_an_old_dataset_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    real = os.rename

    def refused(source: Path, target: Path) -> None:
        if source == tmp_path / "new":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr("os.rename", refused)
    with pytest.raises(OSError, match="No space"):
        publish(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/old").exists()


def test_a_pattern_is_a_pattern_where_it_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has an error of its own for a name with an asterisk."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    real = Path.stat

    def stat(self: Path, **more: Any) -> os.stat_result:
        if "*" in self.name or ":" in self.name:
            raise OSError(22, "The filename, directory name, or volume label syntax is incorrect")
        return real(self, **more)

    monkeypatch.setattr(Path, "stat", stat)
    found, _ = textfiles.find([tmp_path / "*.txt"])
    assert [file.name for file in found] == ["a.txt", "b.txt"]
    with pytest.raises(MinigptError, match="no such file or folder"):
        textfiles.find([tmp_path / "a: b"])


# --- streams ---


@pytest.mark.parametrize("newline", ["\r\n", None])
def test_text_in_a_pipe_is_utf8_and_no_newline_becomes_two_characters(
    monkeypatch: pytest.MonkeyPatch, newline: str | None
) -> None:
    """A stdout as Windows makes it: cp1252, and a newline that is written as two characters."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="cp1252", newline=newline))
    write = console.text_writer()
    for piece in ("שלום\n", "a\rb\r\nc\x0c\u200f", "😀"):
        write(piece)
    assert out.getvalue() == "שלום\na\rb\r\nc\x0c\u200f😀".encode()


# --- signals and processes ---


def test_signals_are_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signals, "STOP_SIGNALS", ["SIGINT", "SIGTERM"])  # of Windows, less SIGBREAK, which is its own
    with signals.StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert (stop(), stop.exit_code) == (signal.SIGINT, 130)
    assert signal.getsignal(signal.SIGINT) is before


def double(n: int) -> int:
    return 2 * n


def make_double() -> Any:
    return double


def test_workers_need_no_masks_of_signals_and_are_no_more_than_windows_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    class Pool(processes.ProcessPoolExecutor):
        def __init__(self, workers: int, *more: Any) -> None:
            asked.append(workers)
            super().__init__(min(workers, 2), *more)

    lacking = ModuleType("signal")
    lacking.__dict__.update({k: v for k, v in vars(signal).items() if k != "pthread_sigmask"})
    monkeypatch.setattr(processes, "signal", lacking)
    monkeypatch.setattr(processes, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(processes, "WINDOWS", True)
    assert list(processes.in_order(make_double, range(5), 100)) == [0, 2, 4, 6, 8]
    assert asked == [processes.MOST_ON_WINDOWS]
    assert threading.active_count() < 20
