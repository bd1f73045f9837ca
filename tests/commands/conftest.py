"""How the tests of the commands run `minigpt`, and the small runs that most of them look at."""

from __future__ import annotations

import io
import os
import pty
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from clock import PATIENCE
from clock import wait_for as wait_for
from minigpt_cli.commands import console, display, main

REPOSITORY = Path(__file__).parents[2]
WORDS = "the king and queen of winter come to speak no more,\n my lord; what say you?\n"
# Many bytes a character, Windows line ends, and what would drive a terminal.
POLYGLOT = "Zeile eins über 東京 😀\r\nund zwei \x1b[31mrot\x1b[0m\tTab\x07\r\n"


def sets(**settings: object) -> list[str]:
    """`sets(train__max_iters=3)` -> ["--set", "train.max_iters=3"]."""
    return [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


TINY = sets(
    model__n_layer=1, model__n_head=2, model__n_embd=16, model__block_size=16, train__batch_size=4, train__max_iters=20,
    train__eval_interval=10, runtime__device="cpu", runtime__precision="fp32",
)  # fmt: skip
FOREVER = 10**9  # steps: until a signal comes


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process nothing is said of work that takes long because the machine is busy."""
    monkeypatch.setattr(display, "PATIENCE", 1e6)


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    """A test that fails halfway must not leave a training run behind."""
    before = psutil.Process().children()  # a server, or a browser, that other tests share
    yield
    for child in set(psutil.Process().children()) - set(before):
        if "minigpt_cli" in child.cmdline():
            child.kill()


@dataclass(frozen=True)
class Done:
    """What a command left behind. `out` and `err` are exact: no newline is translated."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a failure that kept the rules: one or two plain lines, nothing on stdout."""
        lines = self.err.splitlines()
        assert self.out == ""
        assert self.err.startswith("minigpt: error: "), self.err
        assert len(lines) <= 2, self.err
        assert "Traceback" not in self.err
        assert "\x1b" not in self.err
        return self.err


def environment(**changes: str) -> dict[str, str]:
    """Ours, with streams buffered as they are for a user."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""} | changes


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "minigpt_cli", *map(str, arguments)]


def run(*arguments: object, stdin: bytes = b"", **changes: str) -> Done:
    """The real command, in a process of its own, in the current folder; `changes` are to its environment."""
    done = subprocess.run(
        command(*arguments), env=environment(**changes), input=stdin, capture_output=True, timeout=PATIENCE
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def call(*arguments: object, stdin: bytes = b"") -> Done:
    """The same entry point in this process, which saves the two seconds in which torch is imported."""
    saved = sys.argv, sys.stdin, sys.stdout, sys.stderr, sys.excepthook
    out, err = io.BytesIO(), io.BytesIO()
    sys.argv = ["minigpt", *map(str, arguments)]
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    sys.stdout, sys.stderr = (io.TextIOWrapper(stream, encoding="utf-8", newline="") for stream in (out, err))
    try:
        main()
        code: Any = 0
    except SystemExit as exit:
        code = exit.code
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            stream.detach()
        sys.argv, sys.stdin, sys.stdout, sys.stderr, sys.excepthook = saved
        console._debug = False
    return Done(code or 0, out.getvalue().decode(), err.getvalue().decode())


def on_a_terminal(*arguments: object, **changes: str) -> tuple[int, str]:
    """Run with stdout and stderr on one terminal: (exit code, what it showed)."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        command(*arguments), env=environment(**{"TERM": "xterm", "COLUMNS": "100"} | changes),
        stdin=follower, stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    return child.wait(timeout=PATIENCE), shown.decode(changes.get("PYTHONIOENCODING", "utf-8"))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path under `folder` with its content; None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def _made(folder: Path, *commands: list[str]) -> Path:
    before = Path.cwd()
    os.chdir(folder)
    try:
        for arguments in commands:
            done = call(*arguments)
            assert done.code == 0, done.err
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """input.txt (14 kB of 26 characters), data/input, a finished run of 20 steps in checkpoints/. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    drawn = random.Random(7)
    (folder / "input.txt").write_text(" ".join(drawn.choice(WORDS.split(" ")) for _ in range(3000)))
    return _made(folder, ["prepare", "input.txt"], ["train", "--config", "gpt", *TINY])


@pytest.fixture(scope="session")
def polyglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The polyglot text learned by heart with each tokenizer: data/char and char/last.safetensors, byte, bpe."""
    folder = tmp_path_factory.mktemp("polyglot")
    (folder / "input.txt").write_bytes((POLYGLOT * 60).encode())
    more = sets(train__batch_size=16, train__max_iters=150, train__eval_interval=150, train__learning_rate="1e-2")
    for kind in ("char", "byte", "bpe"):
        _made(
            folder,
            ["prepare", "input.txt", "--tokenizer", kind, "--out", f"data/{kind}"],
            [
                "train",
                "--config",
                "gpt",
                *TINY,
                *more,
                *sets(data__path=f"data/{kind}", model__n_embd=32),
                "--out",
                kind,
            ],
        )
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished` of its own for each test, and the current folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
