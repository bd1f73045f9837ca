"""Files that are whole or not there at all, and JSON from elsewhere that cannot fill memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp-"  # how the name of a file begins that a killed process may leave behind

# What file managers, and NFS, leave in any folder: it is nobody's work.
_CLUTTER = re.compile(
    r"\.DS_Store|\._.*|\.localized|Icon\r|\.directory|\.nfs[0-9a-f]+|(?i:(eh)?thumbs\.db|desktop\.ini)", re.DOTALL
)

MAX_JSON_BYTES = 32_000_000
WINDOWS = os.name == "nt"
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between two tries to replace a file

MAX_JSON_PARTS = 1_000_000  # objects, lists and their entries: an empty object takes 2 bytes of JSON and 64 of memory


def bounded_json(data: bytes, max_bytes: int = MAX_JSON_BYTES, max_parts: int = MAX_JSON_PARTS) -> Any:
    """json.loads for bytes from elsewhere. ValueError if it is no JSON, or so much of it that it would fill memory."""
    if (reason := too_much_json(data, max_bytes, max_parts)) is not None:
        raise ValueError(reason)
    return json.loads(data)


def too_much_json(data: bytes, max_bytes: int = MAX_JSON_BYTES, max_parts: int = MAX_JSON_PARTS) -> str | None:
    """Why `bounded_json` would refuse this much, or None."""
    if len(data) > max_bytes:
        return f"{len(data):,} bytes of JSON, at most {max_bytes:,} are read"
    parts = data.count(b",") + data.count(b"{") + data.count(b"[")
    return f"JSON of {parts:,} parts, at most {max_parts:,} are read" if parts > max_parts else None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only when the block ends well, and is on the disk by then."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace(source: Path, target: Path) -> None:
    """os.replace; on Windows with patience, where a virus scanner or a reader may have the target open for a moment."""
    for pause in PAUSES if WINDOWS else ():
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(pause)
    os.replace(source, target)


def fsync_file(path: Path) -> None:
    """What others wrote to this file is on the disk when this returns. On Windows that takes leave to write to it."""
    try:
        with open(path, "rb+" if WINDOWS else "rb") as file:
            os.fsync(file.fileno())
    except PermissionError:  # nobody may write to it, and so nobody has just done so
        if not WINDOWS:
            raise


def is_clutter(name: str) -> bool:
    """Whether a file of this name was made by no program of ours and no person: .DS_Store, Thumbs.db and the like."""
    return _CLUTTER.fullmatch(name) is not None


def names_in(folder: Path) -> set[str]:
    """What a folder holds, less the files that are clutter."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_dir() or not is_clutter(entry.name)}


def fsync_folder(folder: Path) -> None:
    """Make renames in the folder last. Does nothing where a folder cannot be opened, and renames are journalled."""
    if WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
