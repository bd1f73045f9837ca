"""`minigpt` as a whole: instant help, one way to fail, and any terminal or none."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands.conftest import TINY, call, command, environment, on_a_terminal, run
from minigpt_cli import __version__
from minigpt_cli.commands import console
from minigpt_cli.core import config

COMMANDS = ["prepare", "train", "sample", "eval", "bench", "inspect", "serve", "export", "import"]
HEAVY = {"torch", "numpy", "rich", "pydantic", "yaml", "matplotlib", "tokenizers", "safetensors"}


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_instant_and_imports_nothing_heavy(name: str) -> None:
    arguments = [*name.split(), "--help"]
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "minigpt_cli", *arguments],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert traced.returncode == 0
    assert traced.stdout.startswith(f"Usage: minigpt {name}".rstrip())
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in traced.stderr.splitlines()}
    assert "minigpt_cli" in imported
    assert not imported & HEAVY
    assert any(seconds_of(*arguments) < 0.25 for _ in range(20))  # the best: a busy machine is not our fault


def seconds_of(*arguments: str) -> float:
    begin = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begin


def test_help_names_every_command_and_the_first_steps() -> None:
    shown = run("--help")
    assert (shown.code, shown.err) == (0, "")
    for word in [*COMMANDS, "minigpt prepare data/input.txt", "--version", "--debug"]:
        assert word in shown.out
    assert run() == shown


def test_the_version() -> None:
    assert run("--version").out == f"minigpt {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message", "where"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?", "minigpt"),
        (["--frobnicate"], "No such option: --frobnicate", "minigpt"),
        (["train", "--confg", "gpt"], "No such option: --confg (Possible options: --config, --json)", "minigpt train"),
        (["sample"], "Missing option '--ckpt'.", "minigpt sample"),
        (["sample", "--ckpt", "x", "--tokens", "many"], "Invalid value for '--tokens'", "minigpt sample"),
        (["bench", "--config", "gpt", "--steps", "0"], "Invalid value for '--steps'", "minigpt bench"),
        (["eval", "--ckpt", "x", "\x1b[31m"], "unexpected extra argument(s) (\\x1b[31m)", "minigpt eval"),
    ],
)
def test_arguments_that_cannot_be_read(arguments: list[str], message: str, where: str) -> None:
    done = call(*arguments)
    assert done.code == 2
    assert message in done.error
    assert done.err.splitlines()[1:] == [f"Try: {where} --help"]


def test_shell_completion() -> None:
    script = run(_MINIGPT_COMPLETE="source_bash")
    assert script.code == 0
    assert "complete -o default -F _minigpt_completion minigpt" in script.out
    commands = run(_MINIGPT_COMPLETE="complete_bash", COMP_WORDS="minigpt ", COMP_CWORD="1")
    assert commands.out.split() == COMMANDS
    options = run(_MINIGPT_COMPLETE="complete_bash", COMP_WORDS="minigpt train --re", COMP_CWORD="2")
    assert options.out.split() == ["--resume"]


def test_an_internal_error_is_one_line_and_a_traceback_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("first line\n\x1b[2Jsecond line")

    monkeypatch.setattr(config, "load_config", broken)
    done = call("train", "--config", "gpt")
    assert done.code == 1
    assert done.error == (
        "minigpt: error: internal error: ZeroDivisionError: first line (run again with --debug for the traceback)\n"
    )
    for arguments in (["--debug", "train", "--config", "gpt"], ["train", "--config", "gpt", "--debug"]):
        shown = call(*arguments)
        assert shown.code == 1
        assert "Traceback (most recent call last)" in shown.err
    assert "Traceback" not in call("train", "--config", "gpt").err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 1, "minigpt: error: out of memory\n"),
        (OSError(28, "No space left on device", "a/file"), 1, "minigpt: error: the disk is full: a/file\n"),
        (PermissionError(13, "Permission denied", "\x1b]0;x\x07"), 1,
         "minigpt: error: Permission denied: \\x1b]0;x\\x07\n"),
    ],
)  # fmt: skip
def test_what_the_system_may_do_to_us(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(config, "load_config", broken)
    done = call("train", "--config", "gpt")
    assert (done.code, done.out, done.err) == (code, "", message)


def test_safe_text() -> None:
    assert console.safe("a\tb\nc\r\nd é 東 😀") == "a\tb\nc\r\nd é 東 😀"
    assert console.safe("\x1b[2J\r \x9b1m \x7f\b\x00 \u202e \ufeff") == (
        "\\x1b[2J\\r \\x9b1m \\x7f\\x08\\x00 \\u202e \\ufeff"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (4800, "1 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(("n", "text"), [(438, "0.4 kB"), (43_800, "44 kB"), (3.3e6, "3.3 MB"), (2.14e9, "2.1 GB")])
def test_sizes(n: float, text: str) -> None:
    assert console.size(n) == text


def test_an_ascii_locale_spells_out_what_it_cannot_print(polyglot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(polyglot)
    done = run(
        "sample", "--ckpt", "char/last.safetensors", "--tokens", "40", "--seed", "1",
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert done.out.isascii()
    assert "\\u6771\\u4eac" in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_plain_environment_gets_plain_tables(here: Path, changes: dict[str, str]) -> None:
    done = run("eval", "--ckpt", "checkpoints/best.safetensors", stdin=b"", **changes)
    assert (done.code, done.err) == (0, "")
    assert "perplexity" in done.out
    assert "\x1b" not in done.out
    if "LC_ALL" in changes:
        assert done.out.isascii()


@pytest.mark.slow
def test_a_dumb_terminal_gets_no_escape_sequence(here: Path) -> None:
    code, shown = on_a_terminal("train", "--config", "gpt", *TINY, "--out", "dumb", TERM="dumb")
    assert code == 0
    assert "\x1b" not in shown
    assert "step 10/20  loss" in shown  # a line of its own, not the live one


def test_a_terminal_shows_a_live_line_and_is_left_as_it_was(here: Path) -> None:
    code, shown = on_a_terminal("train", "--config", "gpt", *TINY, "--out", "live")
    assert code == 0
    assert "\x1b[?25l" in shown  # the cursor is hidden while the bar moves
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "step 20/20" in text
    assert "tok/s" in text
    assert "step 10: validation loss 3." in text
    assert "saved live/last.safetensors at step 20" in text
    assert text.rstrip().endswith("Sample from it: minigpt sample --ckpt live/best.safetensors --tokens 500")


@pytest.mark.parametrize(
    "closed",
    [">&- 2>&- <&-", pytest.param(">&-", marks=pytest.mark.slow), pytest.param("2>&-", marks=pytest.mark.slow),
     pytest.param("2>/dev/full >/dev/full", marks=pytest.mark.slow)],
)  # fmt: skip
def test_closed_streams_do_not_stop_a_run(here: Path, closed: str) -> None:
    words = " ".join(command("train", "--config", "gpt", *TINY, "--out", "deaf"))
    done = subprocess.run(["sh", "-c", f"{words} {closed}"], env=environment(), capture_output=True, text=True)
    if ">/dev/full" not in closed:
        assert done.returncode == 0
    checked = call("eval", "--ckpt", "deaf/last.safetensors", "--json")
    assert checked.code == 0, checked.err


def test_a_full_disk_under_stdout_is_an_error_and_said_once(here: Path) -> None:
    words = " ".join(command("eval", "--ckpt", "checkpoints/best.safetensors", "--json"))
    done = subprocess.run(["sh", "-c", f"{words} >/dev/full"], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "minigpt: error: the disk is full\n")
