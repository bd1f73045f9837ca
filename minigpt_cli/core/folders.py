"""Folders that are whole or not there at all, and the lock that keeps two writers apart. Knows not what is in them.

Beside a folder NAME may lie .NAME.lock, .NAME.tmp-... (being written) and .NAME.old-... (being replaced).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.files import fsync_folder


@contextmanager
def locked(path: Path, holder: str) -> Iterator[None]:
    """One process at a time for `path`, whose folder exists. MinigptError, naming the `holder`, if it is taken."""
    import filelock

    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        if not Path(lock.lock_file).exists():  # what filelock also says where no file can be made
            raise UserError(f"{path}: cannot be written; choose another folder with --out") from None
        raise MinigptError(f"{path}: {holder}; wait for that one to end") from None
    try:
        yield
    finally:
        with suppress(PermissionError):  # on Windows, where releasing it removes it
            Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: a new one then starts with a new file
        lock.release()


def clear_leftovers(out: Path) -> None:
    """Under the lock: what killed writers left beside `out` goes; a dataset they were just replacing comes back."""
    name = re.compile(re.escape(f".{out.name}.") + r"(tmp|old)-\w{8}")
    leftovers = [path for path in out.parent.iterdir() if name.fullmatch(path.name)]
    for path in leftovers:
        if path.name.startswith(f".{out.name}.old-") and not os.path.lexists(out) and any(path.iterdir()):
            os.rename(path, out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def publish(folder: Path, out: Path) -> None:
    """Put the whole `folder` in the place of `out`, on the same disk. An old `out` goes when that is done."""
    fsync_folder(folder)
    old = None
    if out.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        old.rmdir()  # only its name is wanted: Windows renames onto nothing
        try:
            os.rename(out, old)
        except PermissionError as error:  # Windows again, where files that are open are where they are
            raise MinigptError(f"{out}: cannot be replaced ({error.strerror}); is a program using it?") from None
    try:
        os.rename(folder, out)
    except OSError:
        if old:
            os.rename(old, out)
        raise
    fsync_folder(out.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends well, and vanishes when it does not."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes folders for the owner alone
        publish(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
