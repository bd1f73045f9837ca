"""`python tests/windows.py ARGUMENTS...`: minigpt as it would find itself on Windows, as far as Linux can pretend.

What minigpt's own modules get from `os`, `signal` and `sys` lacks what Windows lacks, and modules of Unix are not
there. Files behave as there for the whole process: nothing is renamed onto what exists, no file that is open is moved,
replaced or removed, nothing is flushed through a handle that may only read, and folders cannot be opened.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import os
import signal
import stat
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

NOT_THERE = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline"}
NOT_IN_OS = ("fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "setsid", "killpg", "sched_getaffinity",
             "uname", "O_DIRECTORY", "O_CLOEXEC", "O_NOFOLLOW", "mkfifo", "statvfs", "posix_fadvise")  # fmt: skip
NOT_IN_SIGNAL = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "SIGPIPE", "pthread_sigmask", "sigwait", "alarm")


def copy_without(module: ModuleType, names: tuple[str, ...], **changes: object) -> ModuleType:
    copy = ModuleType(module.__name__)
    copy.__dict__.update({k: v for k, v in vars(module).items() if k not in names} | changes)
    return copy


class _Sys(ModuleType):
    """`sys`, streams and all, of another platform."""

    platform = "win32"

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(sys, name, value)


def pretend() -> None:
    """From here on, for this process."""
    _files_as_on_windows()
    instead = {
        "os": copy_without(os, NOT_IN_OS, name="nt"),
        "signal": copy_without(signal, NOT_IN_SIGNAL),
        "sys": _Sys("sys"),
    }
    real = builtins.__import__

    def imported(name: str, globals: Any = None, *more: Any, **named: Any) -> Any:
        if str((globals or {}).get("__name__", "")).startswith("minigpt_cli"):
            if name.partition(".")[0] in NOT_THERE:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in instead:
                return instead[name]
        return real(name, globals, *more, **named)

    builtins.__import__ = imported


def _open_files() -> set[str]:
    """Whatever this process has open or mapped."""
    found = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    with open("/proc/self/maps") as maps:
        return found | {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count("/")}


def _files_as_on_windows() -> None:
    real = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "rmdir", "fsync", "open")}

    def refused(number: int, path: object) -> OSError:
        return OSError(number, os.strerror(number), str(path))

    def check_closed(path: Any) -> None:
        whole = os.path.realpath(os.fsdecode(path))
        if any(name == whole or name.startswith(whole + "/") for name in _open_files()):
            raise refused(errno.EACCES, path)

    def moving(name: str) -> Callable[..., None]:
        def move(source: Any, target: Any, **more: Any) -> None:
            check_closed(source)
            if os.path.lexists(target):
                if name == "rename" or os.path.isdir(target):
                    raise refused(errno.EEXIST if name == "rename" else errno.EACCES, target)
                check_closed(target)
            real[name](source, target, **more)

        return move

    def unlink(path: Any, **more: Any) -> None:
        if not more:  # by shutil.rmtree, relative to an open folder, which Windows does not have
            check_closed(path)
        real["unlink"](path, **more)

    def fsync(number: int) -> None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise refused(errno.EBADF, f"handle {number}")
        real["fsync"](number)

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        number: int = real["open"](path, flags, *more, **named)
        if (
            stat.S_ISDIR(os.fstat(number).st_mode)
            and "dir_fd" not in named
            and sys._getframe(1).f_code.co_name != "rmtree"
        ):
            os.close(number)
            raise refused(errno.EACCES, path)
        return number

    os.rename, os.replace, os.unlink, os.remove, os.fsync, os.open = (  # type: ignore[assignment]
        moving("rename"), moving("replace"), unlink, unlink, fsync, opened,
    )  # fmt: skip


if __name__ == "__main__":
    pretend()
    from minigpt_cli.commands import main

    main()
