"""Commands that minigpt prints, pasted into a real shell: whatever the paths are called, they do what they say."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from commands.conftest import FOREVER, TINY, call, command, environment, run, sets, wait_for
from minigpt_cli.core import checkpoint, shell

PATHS = [
    "data/set #2",
    "no",
    "2024",
    "1e3",
    "null",
    "~",
    "a: b",
    " x ",
    "it's",
    'say "so"',
    "$HOME",
    "`id`",
    "-x",
]
ODD = [
    "two\nlines",
    "käse\u200f",
    "\x1b[31mred",
    "back\\slash\t",
]  # spelled out, as bash and zsh read it


def pasted(line: str, program: str = "bash") -> list[str]:
    """The arguments of `minigpt` when `line` is typed into a shell."""
    done = subprocess.run(
        [program, "-c", f'minigpt() {{ printf "%s\\0" "$@"; }}\n{line}'], capture_output=True, check=True
    )
    assert done.stderr == b""
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


def last_line(text: str) -> str:
    return text.split("\n")[-2].partition(": ")[2]


@pytest.mark.parametrize("name", [*PATHS, *ODD])
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_every_command_that_is_printed_goes_on_with_the_same_files(here: Path, name: str) -> None:
    (here / "here").mkdir()
    os.chdir(here / "here")
    prepared = call("prepare", "../input.txt", "--out", name, "--val-fraction", 0.2)
    assert prepared.code == 0, prepared.err
    words = pasted(last_line(prepared.out))
    small = [*TINY, *sets(model__n_embd=24, train__max_iters=2, train__eval_interval=2)]
    trained = call(*words, *small, "--out", f"{name}-run")
    assert trained.code == 0, trained.err
    saved = checkpoint.load(f"{name}-run/best.safetensors")
    assert saved.config.data.path == name
    assert saved.header.dataset_fingerprint in Path(name, "meta.json").read_text()
    sampled = call(*pasted(last_line(trained.out)), "--tokens", 5)
    assert (sampled.code, len(sampled.out)) == (0, 5), sampled.err
    shown = call("info", f"./{name}-run")
    assert call(*pasted(last_line(shown.out))).code == 0
    if name in PATHS and shutil.which("sh"):
        assert pasted(last_line(trained.out), "sh") == pasted(last_line(trained.out))


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_the_command_that_resumes_works_in_a_shell(here: Path) -> None:
    shutil.copytree("data/input", "data/set #2: it's")
    child = subprocess.Popen(
        command("train", "--config", "gpt", *TINY, *sets(train__max_iters=FOREVER), "--out", "run #2: it's",
                "--set", "data.path=data/set #2: it's"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for((here / "run #2: it's/best.safetensors").exists, "the first evaluation")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    words = pasted(err.splitlines()[-1])
    step = checkpoint.read_header(here / "run #2: it's/last.safetensors").step
    again = call(*words, *sets(train__max_iters=step + 1))
    assert again.code == 0, again.err
    assert f"at step {step + 1:,}" in again.err


def test_data_is_a_path_as_it_is_and_beats_set(here: Path) -> None:
    shutil.copytree("data/input", "no")
    done = call("train", "--config", "gpt", *TINY, *sets(data__path="nowhere"), "--data", "no", "--out", "run")
    assert done.code == 0, done.err
    assert checkpoint.load("run/last.safetensors").config.data.path == "no"


def test_a_locale_without_the_letter_gets_a_command_that_works(here: Path) -> None:
    done = run("prepare", "input.txt", "--out", "käse", PYTHONIOENCODING="ascii")
    assert (done.code, done.out.isascii()) == (0, True)
    assert done.out.splitlines()[-1] == "Next: minigpt train --config cpu --data $'k\\303\\244se'"
    if shutil.which("bash"):
        assert pasted(last_line(done.out))[-1] == "käse"


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("data/input", "data/input"), (r"C:\Users\me\data", r"C:\Users\me\data"), (r"C:\my data", r'"C:\my data"'),
        ("C:\\my data\\", '"C:\\my data\\\\"'), ("set #2", '"set #2"'), ("it's", '"it\'s"'), ("", '""'),
        ("train.max_iters=3", "train.max_iters=3"), ("a&b", '"a&b"'), ('a"b\\', '"a\\"b\\\\"'), ("käse", "käse"),
    ],
)  # fmt: skip
def test_on_windows_a_word_is_quoted_as_both_shells_read_it(
    monkeypatch: pytest.MonkeyPatch, word: str, quoted: str
) -> None:
    """The words come back by the rules of Microsoft's C runtime, which Python's own quoting is written for."""
    monkeypatch.setattr(shell.os, "name", "nt")
    line = shell.command_line(["minigpt", "sample", "--ckpt", word])
    assert line == f"minigpt sample --ckpt {quoted}"
    if quoted.startswith('"'):
        assert subprocess.list2cmdline([f" {word}"]).replace('" ', '"', 1) == quoted
