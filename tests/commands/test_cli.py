"""`minigpt` as a whole: instant help, one way to fail, and any terminal or none."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clock import PATIENCE, cpu_seconds_of
from commands.conftest import TINY, call, command, environment, on_a_terminal, run, sets, wait_for
from minigpt_cli import __version__
from minigpt_cli.commands import console, options
from minigpt_cli.core import checkpoint, session

COMMANDS = ["prepare", "train", "sample", "eval", "bench", "inspect", "info", "serve", "export", "import"]
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
    assert cpu_seconds_of(command(*arguments), environment()) < 0.5  # twice what it takes


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
        (
            ["train", "--confg", "gpt"],
            "No such option: --confg (Possible options: --config, --json, --log)",
            "minigpt train",
        ),
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("minigpt ", COMMANDS),
        ("minigpt train --re", ["--resume"]),
        ("minigpt train --config c", ["cpu", "conf/mine.yaml", "conf/yours.yml"]),
        ("minigpt train --config conf/m", ["conf/mine.yaml"]),
        ("minigpt bench --config = g", ["gpt"]),
        ("minigpt train --set train.max_m", ["train.max_minutes=null"]),
        ("minigpt train --set train.ema", ["train.ema=null"]),
        ("minigpt train --set runtime.com", ["runtime.compile=auto", "runtime.compile=true", "runtime.compile=false"]),
        ("minigpt train --set data.", ["data.path=", "data.sampling="]),
        ("minigpt train --set model.norm =", ["layernorm", "rmsnorm", "none"]),
        ("minigpt train --set model.mlp = g", ["gelu"]),
        ("minigpt train --set nonsense = ", []),
        ("minigpt train --device cu", ["cuda", "cuda:0"]),
        ("minigpt train --log ", ["tensorboard", "wandb"]),
        ("minigpt sample --precision f", ["fp32"]),
        ("minigpt eval --split ", ["val", "train"]),
        ("minigpt export --to ", ["hf", "gguf", "file"]),
        ("minigpt prepare x --tokenizer b", ["byte", "bpe"]),
        ("minigpt sample --ckpt ", []),  # the shell's own: files
    ],
)
def test_what_a_shell_is_offered(
    words: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").mkdir()
    for name in ("conf/mine.yaml", "conf/yours.yml", "conf/notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "_key", "")
    split = words.split(" ")  # as bash splits it; the cursor is at the end
    for name, value in (("_MINIGPT_COMPLETE", "complete_bash"), ("COMP_WORDS", "\n".join(split))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", str(len(split) - 1))
    done = call()
    assert (done.code, done.err) == (0, "")
    assert set(expected) <= set(found := done.out.split())
    if words.endswith(("--set model.norm =", "--config c")) or expected in (COMMANDS, []):
        assert found == expected


def test_completing_imports_no_torch() -> None:
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "minigpt_cli"], capture_output=True, text=True, check=True,
        env=environment(_MINIGPT_COMPLETE="complete_bash", COMP_WORDS="minigpt train --set tr", COMP_CWORD="3"),
    )  # fmt: skip
    assert "train.max_iters=" in traced.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in traced.stderr.splitlines()}
    assert "pydantic" in imported
    assert not imported & {"torch", "numpy", "rich", "matplotlib", "tokenizers"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_a_real_bash_completes_the_line(tmp_path: Path) -> None:
    """An interactive shell on a terminal of its own, with what --install-completion gave it, and a TAB."""
    (tmp_path / "minigpt").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m minigpt_cli "$@"\n')
    (tmp_path / "minigpt").chmod(0o755)
    at_home = environment(HOME=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}", TERM="dumb", PS1="$ ")
    install = ["bash", "-c", "minigpt --install-completion; exit $?"]
    done = subprocess.run(install, env=at_home, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    leader, follower = pty.openpty()
    typed = b"minigpt train --config mod\t--set model.norm=r\t --set train.max_mi\t --dry\t\x01echo \n exit\n"
    with subprocess.Popen(
        ["bash", "--rcfile", str(tmp_path / ".bashrc"), "-i"], env=at_home, cwd=tmp_path,
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    ) as shell:  # fmt: skip
        os.write(leader, typed)
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):
            while piece := os.read(leader, 4096):
                shown += piece
        shell.wait(timeout=PATIENCE)
    os.close(leader)
    answer = shown.replace(b"\r", b"").decode()
    assert "\nminigpt train --config modern --set model.norm=rmsnorm --set train.max_minutes=null --dry-run" in answer


def test_as_a_module_it_has_the_same_name_and_exit_codes() -> None:
    done = run("sample")
    assert (done.code, done.err.splitlines()[1]) == (2, "Try: minigpt sample --help")


def test_an_internal_error_is_one_line_and_a_traceback_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("first line\n\x1b[2Jsecond line")

    monkeypatch.setattr(session, "load_config", broken)
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

    monkeypatch.setattr(session, "load_config", broken)
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


def test_a_terminal_of_ascii_has_what_it_cannot_print_spelled_out(polyglot: Path) -> None:
    code, shown = on_a_terminal(
        "sample", "--ckpt", polyglot / "char/last.safetensors", "--tokens", "40", "--seed", "1",
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert (code, shown.isascii()) == (0, True)
    assert "\\u6771\\u4eac" in shown


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_tables_notes_and_json_come_whatever_the_locale_has(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "\u05e9\u05dc\u05d5\u05dd é"  # of which cp1252 has the last letter
    shutil.copytree(finished / "data/input", name)
    spelled = "\\u05e9\\u05dc\\u05d5\\u05dd " + ("é" if encoding == "cp1252" else "\\xe9")
    old = {"PYTHONUTF8": "1", "PYTHONIOENCODING": encoding}
    for arguments in (["info", name], ["info", name, "--json"], ["info", f"{name}/meta.json"], ["info", "no\u05e9"]):
        done = subprocess.run(command(*arguments), env=environment(**old), capture_output=True)
        out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
        assert "Traceback" not in err
        if arguments[-1] == name:
            assert (done.returncode, err) == (0, "")
            assert spelled in out
            assert "tokens" in out
        elif "--json" in arguments:
            assert json.loads(out)["tokenizer"]["kind"] == "char"
        else:
            assert done.returncode in (1, 2)
            assert "\\u05e9" in err
    older = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # where names are bytes, too
    done = subprocess.run(command("info", name), env=environment(**older), capture_output=True, check=True)
    assert done.stdout.isascii()
    assert done.stderr == b""


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


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_finished_run_whose_terminal_is_gone_ends_well(here: Path, term: str) -> None:
    """As in a session that was detached: no signal comes, and writing fails (EIO)."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        command("train", "--config", "gpt", *TINY, *sets(train__max_iters=200), "--out", "alone"),
        env=environment(TERM=term), stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    wait_for((here / "alone/best.safetensors").exists, "the first evaluation")
    os.close(leader)
    assert child.wait(timeout=60) == 0
    assert checkpoint.load(here / "alone/last.safetensors").header.step == 200


@pytest.mark.parametrize("streams", ["| true", "2>&1 | true", "2>&1 >/dev/null | true"])
def test_a_run_that_nobody_listens_to_ends_well(here: Path, streams: str) -> None:
    words = " ".join(command("train", "--config", "gpt", *TINY, "--out", "alone"))
    script = f"({words}; echo $? >code) {streams}"
    subprocess.run(["sh", "-c", script], env=environment(), capture_output=True, check=True)
    assert (here / "code").read_text() == "0\n"
    assert checkpoint.load(here / "alone/last.safetensors").header.step == 20


def test_a_full_disk_under_stdout_is_an_error_and_said_once(here: Path) -> None:
    words = " ".join(command("eval", "--ckpt", "checkpoints/best.safetensors", "--json"))
    done = subprocess.run(["sh", "-c", f"{words} >/dev/full"], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "minigpt: error: the disk is full\n")
