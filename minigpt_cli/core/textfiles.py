"""Text files in -> pieces of text out, in bounded memory. Owns what counts as text, and says why the rest does not.

Any UTF-8 file is text, whatever its ending; `.jsonl` holds one document a line, `.gz` either of the two, compressed.
It knows nothing of tokenizers or datasets.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from minigpt_cli.core.background import Sha256
from minigpt_cli.core.errors import MinigptError, UserError

BLOCK = 1 << 19  # bytes read at a time: what is made of them stays in the processor's cache
MAX_LINE = 64 << 20  # bytes in one line of a .jsonl
_SNIFF = 8192


class TextFile:
    """One input: `name` for messages and records, and after a first whole reading what was learned about it."""

    def __init__(self, path: Path, name: str) -> None:
        # A name may hold line breaks, or bytes that are no text: messages and meta.json spell them out.
        self.path, self.name = path, name.replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()
        lower = path.name.lower()
        self.is_gzip = lower.endswith(".gz")
        self.is_jsonl = lower.removesuffix(".gz").endswith(".jsonl")
        self.size = path.stat().st_size  # bytes on disk
        self.sha256 = ""  # of the bytes on disk
        self.text_bytes = 0  # of the text in UTF-8, as far as it was read
        self.has_bom = self.has_crlf = False
        self._identity: tuple[int, ...] | None = None

    def texts(self, text_field: str = "text", advance: Callable[[int], None] = lambda n: None) -> Iterator[str]:
        """The file's text, a few million characters at a time; `advance(n)` is told of each n bytes taken from disk.

        UserError where it is not text, with the place. MinigptError where it is not the file it was the last time.
        """
        self.text_bytes = 0
        with open(self.path, "rb") as raw, Sha256() as digest:
            self._check_unchanged(raw)
            reader = _Reader(raw, advance, None if self.sha256 else digest)
            decoded = self._decoded(gzip.GzipFile(fileobj=reader) if self.is_gzip else reader)  # type: ignore[call-overload]
            yield from self._documents(decoded, text_field) if self.is_jsonl else self._plain(decoded)
            self._check_unchanged(raw)
            if not self.sha256:
                self.sha256 = digest.hexdigest()

    def looks_like_text(self) -> bool:
        """Whether the first bytes are UTF-8 without NUL; how a folder's text is told from its pictures."""
        try:
            with open(self.path, "rb") as raw:
                head = gzip.GzipFile(fileobj=raw).read(_SNIFF) if self.is_gzip else raw.read(_SNIFF)
            codecs.utf_8_decode(head, "strict", False)
            return b"\0" not in head
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile):
            return False

    def _check_unchanged(self, raw: IO[bytes]) -> None:
        status = os.fstat(raw.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._identity not in (None, identity):
            raise MinigptError(f"{self.name}: the file changed while it was being read; run prepare again")
        self._identity = identity

    def _decoded(self, stream: Any) -> Iterator[bytes]:
        """Blocks of the (unpacked) bytes, without a BOM and checked for NUL."""
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
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{self.name}: a damaged or incomplete gzip file; fetch it or pack it again") from None

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
            unpacked = " of the unpacked text" if self.is_gzip else ""
            hint = _encoding_hint(b"" if self.text_bytes else data, data[error.start :])
            raise UserError(
                f"{self.name}: not UTF-8 text: byte {where:,}{unpacked} is 0x{data[error.start]:02x}{hint}"
            ) from None

    def _nul_message(self, block: bytes, offset: int, where: int) -> str:
        hint = _encoding_hint(block) if offset == 0 else ""
        return f"{self.name}: a NUL byte at byte {where:,}{hint or '; this is no plain text file'}"

    def _documents(self, blocks: Iterator[bytes], text_field: str) -> Iterator[str]:
        """The texts of a .jsonl, each ended by a newline, some millions of characters at a time."""
        texts: list[str] = []
        size = 0
        for number, line in enumerate(self._lines(blocks), start=1):
            text = self._document(line, number, text_field)
            texts.append(text)
            size += len(text)
            if size >= BLOCK:
                yield "".join(texts)
                texts, size = [], 0
        yield "".join(texts)

    def _lines(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        rest: list[bytes] = []  # the pieces of a line that has not ended yet
        for block in blocks:
            *whole, last = block.split(b"\n")
            for line in whole:
                yield b"".join([*rest, line])
                rest = []
            rest.append(last)
            if sum(map(len, rest)) > MAX_LINE:
                raise UserError(f"{self.name}: a line of more than {MAX_LINE >> 20} MiB; is this one document a line?")
        yield b"".join(rest)

    def _document(self, line: bytes, number: int, text_field: str) -> str:
        if not line.strip():
            return ""
        try:
            document = json.loads(line)
            text = document[text_field] if isinstance(document, dict) else None
            if isinstance(text, str) and "\0" not in text:
                text = text if text.endswith("\n") else text + "\n"
                self.text_bytes += len(text.encode("utf-8"))  # half a surrogate pair is legal JSON, and no text
                return text
            problem = f'"{text_field}" is not a text' if isinstance(document, dict) else "not a JSON object"
            problem = "a NUL character in the text" if isinstance(text, str) else problem
        except KeyError:
            names = ", ".join(f'"{name}"' for name in list(document)[:8])
            problem = f'no field "{text_field}" (it has {names or "none"}); name the text\'s field with --text-field'
        except UnicodeEncodeError:
            problem = "half a surrogate pair in the text"
        except UnicodeDecodeError:
            problem = "not UTF-8"
        except (ValueError, RecursionError):
            problem = "not JSON"
        raise UserError(f"{self.name}: line {number:,}: {problem}")


class _Reader:
    """A file being read from start to end: reports progress and, when asked, hashes all it gave."""

    def __init__(self, raw: IO[bytes], advance: Callable[[int], None], digest: Sha256 | None) -> None:
        self._raw, self._advance, self._digest = raw, advance, digest

    def read(self, size: int = -1) -> bytes:
        block = self._raw.read(size)
        if self._digest:
            self._digest.update(block)
        self._advance(len(block))
        return block


_UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _encoding_hint(start: bytes, bad: bytes = b"") -> str:
    """What the file seems to be instead of UTF-8, by its first bytes or by those that are wrong; and what to do."""
    if start[:2] == b"\x1f\x8b":
        return "\nIt looks gzip-compressed: give it a name that ends in .gz"
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
    except (FileNotFoundError, NotADirectoryError):
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
        if {"meta.json", "train.bin", "val.bin"} <= set(names):
            notes.append(f"{Path(where).relative_to(folder.parent)}: a prepared dataset, skipped")
            folders.clear()
            continue
        skipped += [
            Path(where, name).relative_to(folder).as_posix() for name in folders + names if name.startswith(".")
        ]
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(where, name) for name in names if not name.startswith(".")]
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
