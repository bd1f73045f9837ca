"""Text files in -> pieces of text out, in bounded memory. Owns what counts as text, and says why the rest does not.

Any UTF-8 file is text, whatever its ending, and `.gz` and `.zst` are unpacked on the way. `.jsonl` and `.parquet` hold
documents, of which `documents.py` knows. It knows nothing of tokenizers or datasets.
"""

from __future__ import annotations

import codecs
import errno
import glob
import gzip
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minigpt_cli.core.background import Sha256
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.files import is_clutter

BLOCK = 1 << 19  # bytes read at a time: what is made of them stays in the processor's cache
_SNIFF = 8192
_DAMAGED = (EOFError, zlib.error, OSError)  # what unpacking raises: gzip.BadGzipFile and pyarrow's are OSErrors


class TextFile:
    """One input: `name` for messages and records, and after a first whole reading what was learned about it."""

    def __init__(self, path: Path, name: str) -> None:
        # A name may hold line breaks, or bytes that are no text: messages and meta.json spell them out.
        self.path, self.name = path, name.replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()
        lower = path.name.lower()
        self.packing = next((packing for packing in ("gz", "zst") if lower.endswith(f".{packing}")), "")
        inner = lower.removesuffix(f".{self.packing}")
        self.holds = next((kind for kind in ("jsonl", "parquet") if inner.endswith(f".{kind}")), "text")
        status = path.stat()
        self.size = status.st_size  # bytes on disk
        self.modified = status.st_mtime_ns
        self.sha256 = ""  # of the bytes on disk
        self.text_bytes = 0  # of a plain text in UTF-8, as far as it was read
        self.has_bom = self.has_crlf = False
        self._identity: tuple[int, ...] | None = None

    def texts(self, advance: Callable[[int], None] = lambda n: None) -> Iterator[str]:
        """A plain text, at most BLOCK characters at a time; `advance(n)` is told of each n bytes taken from disk.

        UserError where it is not text, with the place. MinigptError where it is not the file it was the last time.
        """
        self.text_bytes = 0
        yield from self._plain(self.blocks(advance))

    def blocks(self, advance: Callable[[int], None] = lambda n: None) -> Iterator[bytes]:
        """The unpacked bytes, without a BOM and checked for NUL. Raises as `texts` does."""
        with self.opened(advance) as reader:
            yield from self._decoded(self._unpacked(reader))

    @contextmanager
    def opened(self, advance: Callable[[int], None]) -> Iterator[_Reader]:
        """The file as it lies on the disk, which must be the same every time; hashed, if it is read to its end."""
        with open(self.path, "rb") as raw, Sha256() as digest:
            self._check_unchanged(raw)
            yield _Reader(raw, advance, None if self.sha256 else digest)
            self._check_unchanged(raw)
            if not self.sha256:
                self.sha256 = digest.hexdigest()

    def looks_like_text(self) -> bool:
        """Whether the first bytes are UTF-8 without NUL; how a folder's text is told from its pictures."""
        try:
            with open(self.path, "rb") as raw:
                if self.holds == "parquet":
                    return raw.read(4) == b"PAR1"
                head = self._unpacked(raw).read(_SNIFF)
            codecs.utf_8_decode(head, "strict", False)
            return b"\0" not in head
        except UserError:  # what would unpack it is not installed
            raise
        except (ValueError, *_DAMAGED):
            return False

    def _unpacked(self, raw: Any) -> Any:
        if self.packing == "gz":
            return gzip.GzipFile(fileobj=raw)
        if self.packing == "zst":  # pyarrow's reader notices a truncated file, zstandard's does not
            pyarrow = require_pyarrow(self.name)
            return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return raw

    def _check_unchanged(self, raw: IO[bytes]) -> None:
        status = os.fstat(raw.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._identity not in (None, identity):
            raise MinigptError(f"{self.name}: the file changed while it was being read; run prepare again")
        self._identity = identity

    def _decoded(self, stream: Any) -> Iterator[bytes]:
        try:
            offset, previous = 0, b""
            while block := stream.read(BLOCK):
                if (nul := block.find(b"\0")) >= 0:
                    raise UserError(self._nul_message(block, offset, offset + nul))
                if b"\r" in block or previous == b"\r":
                    self.has_crlf = self.has_crlf or b"\r\n" in previous + block
                previous = block[-1:]
                if offset == 0 and block.startswith(codecs.BOM_UTF8):
                    self.has_bom = True
                offset += len(block)
                yield block[3:] if self.has_bom and offset == len(block) else block
        except _DAMAGED as error:
            if not self.packing or (isinstance(error, OSError) and error.errno):  # the disk's own trouble
                raise
            names = {"gz": "gzip", "zst": "zstd"}
            raise UserError(
                f"{self.name}: a damaged or incomplete {names[self.packing]} file; fetch it or pack it again"
            ) from None

    def _plain(self, blocks: Iterator[bytes]) -> Iterator[str]:
        rest = b""
        for block in blocks:
            data = rest + block
            text, used = self._utf8(data, final=False)
            rest = data[used:]
            self.text_bytes += used
            yield text
        self._utf8(rest, final=True)

    def _utf8(self, data: bytes, *, final: bool) -> tuple[str, int]:
        try:
            return codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            where = self.text_bytes + error.start + (3 if self.has_bom else 0)
            unpacked = " of the unpacked text" if self.packing else ""
            hint = _encoding_hint(b"" if self.text_bytes else data, data[error.start :])
            raise UserError(
                f"{self.name}: not UTF-8 text: byte {where:,}{unpacked} is 0x{data[error.start]:02x}{hint}"
            ) from None

    def _nul_message(self, block: bytes, offset: int, where: int) -> str:
        hint = _encoding_hint(block) if offset == 0 else ""
        return f"{self.name}: a NUL byte at byte {where:,}{hint or '; this is no plain text file'}"


class _Reader:
    """A file being read from start to end: reports progress and, when asked, hashes all it gave."""

    closed = False  # pyarrow asks, and would close it

    def __init__(self, raw: IO[bytes], advance: Callable[[int], None], digest: Sha256 | None) -> None:
        self._raw, self._advance, self._digest = raw, advance, digest

    def read(self, size: int = -1) -> bytes:
        block = self._raw.read(size)
        if self._digest:
            self._digest.update(block)
        self._advance(len(block))
        return block

    def close(self) -> None:
        pass


def require_pyarrow(name: str) -> Any:
    """pyarrow, for the file `name`; UserError where it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{name}: reading this needs pyarrow; pip install 'minigpt[data]'") from None
    return pyarrow


_UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _encoding_hint(start: bytes, bad: bytes = b"") -> str:
    """What the file seems to be instead of UTF-8, by its first bytes or by those that are wrong; and what to do."""
    if start[:2] == b"\x1f\x8b":
        return "\nIt looks gzip-compressed: give it a name that ends in .gz"
    if start[:4] == b"\x28\xb5\x2f\xfd":
        return "\nIt looks zstd-compressed: give it a name that ends in .zst"
    if start[:4] == b"PAR1":
        return "\nIt looks like Parquet: give it a name that ends in .parquet"
    if start[:2] in _UTF16_BOMS or start[:64].count(b"\0") > len(start[:64]) // 3:
        return "\nIt looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"
    if bad[:1] >= b"\xa0" and all(b >= 0x20 or b in (9, 10, 13) for b in bad[:64]):
        return "\nIt looks like Latin-1 (or Windows-1252); convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
    return "\nConvert the file to UTF-8, for example with iconv, or remove the damaged part" if bad else ""


def find(arguments: Sequence[Path]) -> tuple[list[TextFile], list[str]]:
    """The text files that the arguments name (files, folders, quoted globs), in order, each once; and notes to show.

    UserError for a path that is missing, is no regular file, or leads to no text.
    """
    found: dict[Path, TextFile] = {}
    notes: list[str] = []
    for argument in arguments:
        for path in _expand(argument):
            if path.is_dir():
                files = _folder(path, notes)
            elif not stat.S_ISREG(path.stat().st_mode):
                raise UserError(
                    f"{path}: not a regular file (a pipe, socket or device?); save the text to a file first"
                )
            else:
                files = [TextFile(path, path.name)]
            for file in files:
                if found.setdefault(file.path.resolve(), file) is not file:
                    notes.append(f"{file.name}: named twice, used once")
    return list(found.values()), notes


def _expand(argument: Path) -> list[Path]:
    try:
        argument.stat()
        return [argument]
    except ValueError:  # a NUL byte in the name
        raise UserError(f"{argument!s}: no such file or folder") from None
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError) and error.errno != errno.EINVAL:
            raise  # the last is what Windows says of a name with * or ? in it
        matches = (
            [Path(m) for m in sorted(glob.glob(str(argument), recursive=True))] if glob.has_magic(str(argument)) else []
        )
        if not matches:
            raise UserError(f"{argument}: no such file or folder") from None
        return matches


def _raise(error: OSError) -> None:
    raise error


def _folder(folder: Path, notes: list[str]) -> list[TextFile]:
    """Every text file below `folder`, sorted by path; hidden files, prepared datasets and binary files are left out."""
    paths: list[Path] = []
    skipped: list[str] = []
    for where, folders, names in os.walk(folder, onerror=_raise):
        if "meta.json" in names and {"train.bin", "train-00000.bin"} & set(names):
            notes.append(f"{Path(where).relative_to(folder.parent)}: a prepared dataset, skipped")
            folders.clear()
            continue
        hidden = {name for name in folders + names if name.startswith(".") or is_clutter(name)}
        skipped += [Path(where, name).relative_to(folder).as_posix() for name in folders + names if name in hidden]
        folders[:] = [name for name in folders if name not in hidden]
        paths += [Path(where, name) for name in names if name not in hidden]
    files: list[TextFile] = []
    for path in sorted(paths, key=lambda p: p.relative_to(folder).parts):
        name = path.relative_to(folder).as_posix()
        file = TextFile(path, name) if path.is_file() else None
        if file and file.looks_like_text():
            files.append(file)
        else:
            skipped.append(name)
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        notes.append(f"{folder.name or folder}: skipped, hidden or no text: {', '.join(skipped[:5])}{more}")
    if not files:
        raise UserError(f"{folder}: no text files in this folder (hidden and binary files are skipped)")
    return files
