"""`decode.c`, compiled for this machine when it is first asked for, and kept. Knows nothing of what it computes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.files import atomic_write

SOURCE = Path(__file__).with_name("decode.c")
DEFINES = {"fp32": (), "bf16": ("-DBF16",)}  # by the precision of weights and cache
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
THREADS = ("-fopenmp",)  # left out where the compiler has no OpenMP
PATIENCE = 60  # seconds


@functools.cache
def decode_library(precision: str) -> ctypes.CDLL:
    """The library for weights of `precision`, a key of `DEFINES`, made by `$CC` or `cc`.

    It is kept in the user's cache folder, under a name that tells source, compiler and processor apart; where that
    folder cannot be written, every process compiles its own. Raises MinigptError, a line, where it cannot be had.
    """
    if sys.platform != "linux":
        raise MinigptError("decode.c has been tried on Linux only")
    code, command = SOURCE.read_bytes(), [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS, *DEFINES[precision]]
    key = hashlib.blake2b(repr((code, command, _processor())).encode(), digest_size=12).hexdigest()
    path = _cache_folder() / f"decode-{key}.so"
    with contextlib.suppress(OSError):  # not there, or damaged
        if path.stat().st_uid == os.getuid():
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="minigpt-") as folder:
        made = Path(folder, path.name)
        _compile(command, made)
        try:
            library = ctypes.CDLL(str(made))
        except OSError as error:
            raise MinigptError(f"what {command[0]} made cannot be loaded: {error}") from None
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(made.read_bytes())
        return library


def _compile(command: list[str], made: Path) -> None:
    failed = ""
    for more in (THREADS, ()):
        try:
            done = subprocess.run(
                [*command, *more, str(SOURCE), "-o", str(made), "-lm"],
                capture_output=True, text=True, errors="replace", timeout=PATIENCE,
            )  # fmt: skip
        except FileNotFoundError:
            raise MinigptError(f"no C compiler ({command[0]}) is installed") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MinigptError(f"{command[0]} could not compile decode.c: {error}") from None
        if done.returncode == 0:
            return
        failed = failed or next(iter(done.stderr.strip().splitlines()), f"exit {done.returncode}")
    raise MinigptError(f"{command[0]} could not compile decode.c: {failed}")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minigpt"


def _processor() -> str:
    """What instructions there are: the same home may serve machines of several kinds."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())
    return platform.machine()
