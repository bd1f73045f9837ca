"""Files that are whole or not there at all, and JSON from elsewhere that cannot fill memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp-"  # how the name of a file begins that a killed process may leave behind

MAX_JSON_BYTES = 32_000_000
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
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def fsync_folder(folder: Path) -> None:
    """Make renames in the folder last. Does nothing where a folder cannot be opened, and renames are journalled."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
