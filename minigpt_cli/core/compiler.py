"""`decode.c`, compiled for this machine when it is first asked for, and kept. Knows nothing of what it computes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from minigpt_cli.core import processor
from minigpt_cli.core.errors import MinigptError

SOURCE = Path(__file__).with_name("decode.c")
DEFINES = {"fp32": (), "bf16": ("-DBF16",)}  # by the precision of weights and cache
FLAGS = ("-O3", "-shared", "-fPIC")
THREADS = ("-fopenmp",)  # left out where the compiler has no OpenMP
PATIENCE = 60  # seconds
DIGEST = 32  # bytes at the end of a kept library, of all before: half a library does not fail to load, it crashes

_one_at_a_time = threading.Lock()


@functools.cache
def decode_library(precision: str) -> ctypes.CDLL:
    """The library for weights of `precision`, a key of `DEFINES`, made by `$CC` or `cc`.

    It is kept in the user's cache folder, under a name that tells source, compiler and processor apart; where nothing
    can be kept safely, every process compiles its own. Raises MinigptError, a line, where it cannot be had.
    """
    if sys.platform != "linux":
        raise MinigptError("decode.c has been tried on Linux only")
    try:
        command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS, *processor.compiler_flags(), *DEFINES[precision]]
        key = repr((SOURCE.read_bytes(), command, processor.description())).encode()
        name, folder = f"decode-{hashlib.blake2b(key, digest_size=12).hexdigest()}.so", _cache_folder()
        with _one_at_a_time:
            if folder and _is_whole(folder / name):
                with contextlib.suppress(OSError):
                    return ctypes.CDLL(str(folder / name))
            try:
                return _made(command, name, folder)
            except OSError:
                if folder is None:
                    raise
                return _made(command, name, None)  # no room there, or nothing there may be run
    except (OSError, ValueError) as error:  # nowhere to write, a quote in $CC that is not closed
        raise MinigptError(f"decode.c could not be compiled or loaded: {error}") from None


def _made(command: list[str], name: str, folder: Path | None) -> ctypes.CDLL:
    """Compiled in `folder`, where it stays, or somewhere else for this process only."""
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as scratch:
        made = Path(scratch, name)
        with_threads = _compile(command, made)
        library = ctypes.CDLL(str(made))
        if folder and with_threads:  # the next one may have OpenMP
            content = made.read_bytes()
            kept = Path(scratch, "kept")
            kept.write_bytes(content + hashlib.blake2b(content, digest_size=DIGEST).digest())
            kept.chmod(0o600)
            kept.replace(folder / name)
        return library


def _compile(command: list[str], made: Path) -> bool:
    """Whether it is one that uses threads. Raises MinigptError where there is none at all."""
    failed = ""
    for more in (THREADS, ()):
        try:
            done = subprocess.run(
                [*command, *more, str(SOURCE), "-o", str(made), "-lm"], stdin=subprocess.DEVNULL,
                capture_output=True, text=True, errors="replace", timeout=PATIENCE,
            )  # fmt: skip
        except FileNotFoundError:
            raise MinigptError(f"no C compiler ({command[0]}) is installed") from None
        except subprocess.TimeoutExpired:
            raise MinigptError(f"{command[0]} took more than {PATIENCE} seconds for decode.c") from None
        except OSError as error:
            raise MinigptError(f"{command[0]} could not compile decode.c: {error.strerror}") from None
        if done.returncode == 0:
            return bool(more)
        failed = failed or next(iter(done.stderr.strip().splitlines()), f"exit {done.returncode}")
        if done.returncode < 0:  # it was killed: that says nothing of OpenMP
            break
    raise MinigptError(f"{command[0]} could not compile decode.c: {failed}")


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        return hashlib.blake2b(content[:-DIGEST], digest_size=DIGEST).digest() == content[-DIGEST:]
    return False


def _cache_folder() -> Path | None:
    """Where libraries are kept; None where that is no folder of ours alone: what lies there is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minigpt"
    if not folder.is_absolute():
        return None
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        return folder if ours else None
    return None
