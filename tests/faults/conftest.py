"""Real processes to break: a command that runs in a child of its own, and what must be true of its folder afterwards.

Children are forked from this process, which has imported everything already, so that a hundred of them cost seconds;
a few tests start a fresh interpreter instead, where memory or the streams of a real shell matter.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 - children share what is loaded before they are forked
import pytest
import torch.distributed.checkpoint  # noqa: F401 - likewise

from clock import PATIENCE
from minigpt_cli.core.checkpoint import SHARDED, load
from minigpt_cli.core.files import TEMPORARY
from minigpt_cli.core.run import RunFolder
from minigpt_cli.core.shards import open_sharded
from runs import write_dataset

TINY = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=8", "train.batch_size=2",
    "train.max_iters=1000000", "train.eval_interval=7", "train.checkpoint_interval=1", "train.log_interval=3",
    "runtime.precision=fp32",
]  # fmt: skip
SAVED = re.compile(r"saved \S+/last\S+ at step (?P<step>[\d,]+)")
FORMS = ("file", "sharded")  # of checkpoints
SETTINGS = tuple(f"runtime.checkpoints={form}" for form in FORMS)


def train_arguments(*settings: str, flags: tuple[str, ...] = ()) -> list[str]:
    """A run that saves after every step and ends only when it is ended."""
    pairs = [word for setting in (*TINY, "data.path=data", *settings) for word in ("--set", setting)]
    return ["train", "--config", "gpt", "--device", "cpu", "--out", "run", *pairs, *flags]


@dataclass
class Child:
    """A forked minigpt command. Its stdout and stderr go to files."""

    pid: int
    stdout: Path
    stderr: Path
    code: int | None = None

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> None:
        """Until stderr matches. Fails if the child ends first, or takes too long."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.stderr.read_text()):
            assert self.poll() is None, f"ended with {self.code}: {self.stderr.read_text()}"
            assert time.monotonic() < end, f"no {pattern!r} in {self.stderr.read_text()}"
            time.sleep(0.002)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = PATIENCE) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"hangs: {self.stderr.read_text()}")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL: nothing in the process can react."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.code = -9

    def announced(self) -> int:
        """The last step of which it said that `last` is saved; -1 if of none."""
        steps = [m["step"] for m in SAVED.finditer(self.stderr.read_text())]
        return int(steps[-1].replace(",", "")) if steps else -1


Launch = Callable[..., Child]


@pytest.fixture(params=SETTINGS, ids=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """The setting for each form of checkpoint."""
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path, verse: str) -> Path:
    """A working folder with a small dataset in `data` and a text in `input.txt`."""
    write_dataset(tmp_path / "data", verse)
    (tmp_path / "input.txt").write_text(verse * 40)
    return tmp_path


@pytest.fixture
def launch(place: Path) -> Launch:
    """`launch(arguments, before=None)`: a minigpt command in a child; `before()` runs in it first, to break things."""
    children: list[Child] = []

    def go(arguments: list[str], before: Callable[[], object] | None = None) -> Child:
        number = len(children)
        out, err = place / f"stdout-{number}", place / f"stderr-{number}"
        out.touch()
        err.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become(arguments, place, out, err, before)
        children.append(Child(pid, out, err))
        return children[-1]

    yield go  # type: ignore[misc] # a generator function, as pytest wants it
    for child in children:
        child.kill()


def _become(arguments: list[str], place: Path, out: Path, err: Path, before: Callable[[], object] | None) -> None:
    """In the child: be a minigpt process, and never return into pytest."""
    code = 70
    try:
        os.chdir(place)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            signal.signal(signal.Signals[name], signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["minigpt", *arguments]
        if before is not None:
            before()
        from minigpt_cli.commands import main

        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def verified_step(folder: Path, *, at_least: int) -> int:
    """Every checkpoint in the folder verifies, and `last` is no older than what was announced. Its step."""
    steps = {
        path: (open_sharded(path) if path.suffix == SHARDED else load(path)).header.step
        for pattern in ("*.safetensors", f"[!.]*{SHARDED}")
        for path in folder.glob(pattern)
    }
    last = RunFolder(folder).newest_of("last")
    if last is None:
        assert at_least == -1, f"step {at_least} was announced, and there is no checkpoint"
        return -1
    assert steps[last] >= at_least
    return steps[last]


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(TEMPORARY)]
