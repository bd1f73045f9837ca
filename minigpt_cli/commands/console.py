"""What the commands show: progress, tables, text that is safe for a terminal; and the one error boundary.

Results go to stdout; progress, notes and errors go to stderr. Rich is imported when something is drawn, not before.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt_cli.core.errors import MinigptError, UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_debug = False


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = _debug or value
    return value


Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.", callback=_set_debug)]

# C0 and C1 controls (tab, newline and Windows line ends stay), DEL, and the Unicode marks that reorder or hide text.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]|\r(?!\n)")


def safe(text: object) -> str:
    """`text` with every control character spelled out (ESC becomes \\x1b), so that no file can drive a terminal."""
    return _UNSAFE.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), str(text))


def command(*words: object) -> str:
    """A minigpt command to paste into a shell, in characters that this terminal can show."""
    from minigpt_cli.core.shell import command_line

    return command_line(["minigpt", *words], sys.stdout.encoding or "utf-8")


def text_writer(raw: bool = False) -> Callable[[str], None]:
    """What writes a model's text to stdout, piece by piece, flushed.

    To a file or a pipe go its bytes in UTF-8, whatever the locale. A terminal gets what it can print, with control
    characters spelled out unless `raw`.
    """
    stream = sys.stdout
    binary = None if stream.isatty() else getattr(stream, "buffer", None)

    def write(text: str) -> None:
        if binary is None:
            stream.write(text if raw else safe(text))
        else:
            stream.flush()  # what is written in another way comes before
            binary.write(text.encode("utf-8", "surrogateescape"))  # a prompt from the command line may hold other bytes
        stream.flush()

    return write


def stdout() -> Console:
    """A Rich console for results. Tables are drawn 100 columns wide where there is no terminal to ask."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def stderr() -> Console:
    """A Rich console for progress and notes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """One plain line on stderr, for people. Where nobody reads it any more, nothing stops. Of many ranks one talks."""
    if _rank():
        return
    _say(message)


def _rank() -> str:
    """The number of this process among those that torchrun started; empty for the one that talks, and without any."""
    return os.environ.get("RANK", "").removeprefix("0")


def _say(message: str) -> None:
    with suppress(OSError, ValueError):
        print(safe(message), file=sys.stderr, flush=True)


def print_table(title: str, rows: Sequence[tuple[object, ...]], headers: Sequence[str] | None = None) -> None:
    """A small table on stdout: label columns to the left, the last column to the right. Values are made safe here."""
    if _rank():
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(safe(title)), title_justify="left", show_header=headers is not None)
    width = len(headers) if headers else len(rows[0])
    for i in range(width):
        table.add_column(safe(headers[i]) if headers else "", justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(safe(cell)) for cell in row))
    stdout().print(table)


def duration(seconds: float) -> str:
    """`1 h 20 min`, `3 min 20 s` below an hour, `20 s` below a minute."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{int(seconds)} s"


def size(n_bytes: float) -> str:
    """`4.4 kB`, `338 MB`, `2.1 GB`."""
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if n_bytes >= s), ("kB", 1e3))
    value = n_bytes / scale
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


@contextmanager
def progress_bar(description: str, total: float | None, unit: str = "") -> Iterator[Progress]:
    """A Rich progress bar with an ETA on stderr, gone when done; nothing at all where stderr is no terminal.

    Yields the `Progress`; its only task is `progress.task_ids[0]`. `unit="bytes"` shows sizes and MB/s.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
    columns += [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    columns += [TextColumn("ETA"), TimeRemainingColumn()]
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(safe(description), total=total)
        yield progress


def make_streams_robust() -> None:
    """Let an ASCII locale spell out what it cannot print (\\u00e9), and closed streams swallow what is written.

    A stream that was closed (`>&-`) is replaced by the null device under its own number: else the next file that is
    opened, a checkpoint perhaps, would get that number and whatever is printed there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 # open to the end
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# What writing raises where the reader, or the terminal, is gone. On Windows a closed pipe is an invalid argument.
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO} | ({errno.EINVAL} if os.name == "nt" else set())


def tell(*lines: object) -> None:
    """Lines on stdout about work that is done and kept. That nobody reads them any more is no failure."""
    try:
        for line in lines:
            print(safe(line))
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _GONE:
            raise
        abandon_broken_streams()


def abandon_broken_streams() -> None:
    """Where stdout or stderr take no more (a closed pipe, a terminal that is gone, a full disk), let what is left, and
    the interpreter's own last flush, go nowhere: it would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def error_boundary() -> Iterator[None]:
    """Turn whatever a command raises into a message of one or two lines and an exit code (DESIGN, section 5)."""
    try:
        yield
        sys.stdout.flush()  # here, where a full disk can still be reported
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except MinigptError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("out of memory", 1)
    except OSError as error:
        if not error.filename and (error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL)):
            abandon_broken_streams()  # `minigpt sample | head -1`: the reader has had enough, and that is no failure
            raise typer.Exit(0) from None
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
        where = f": {error.filename}" if error.filename else ""
        abandon_broken_streams()
        _fail(f"{what}{where}", 1)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer's: an argument that does not exist, is missing or cannot be read
            command = getattr(getattr(error, "ctx", None), "command_path", "minigpt")
            _fail(f"{error.format_message()}\nTry: {command} --help", 2)
        what = (str(error).strip().splitlines() or ["no message"])[0]
        _fail(f"internal error: {type(error).__name__}: {what} (run again with --debug for the traceback)", 1)


def _fail(message: str, code: int) -> None:
    if _debug:
        traceback.print_exc()
    if message:
        where = f" on rank {_rank()}" if _rank() else ""
        _say(message if code in (130, 143) else f"minigpt: error{where}: {message}")
    raise typer.Exit(code) from None


def read_prompt(name: str) -> str:
    """The text of a prompt file; - is stdin. Raises UserError where it cannot be read or is not UTF-8."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` is or, as the folder of a run, holds: its best, else its last; which is said."""
    if not os.path.isdir(path):
        return path
    from minigpt_cli.core.run import checkpoint_in

    found = checkpoint_in(path)
    if found != path:
        note(f"{path}: using {found.name}")
    return found


def check_new_file(path: Path, force: bool, source: Path) -> None:
    """Before any work: may `path` be written, which is made from `source`? Raises UserError."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder; name the file to make")
        if path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"{path}: that is what is read; name another file")
        if path.exists() and not force:
            raise UserError(f"{path} exists; --force replaces it, or name another file")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
