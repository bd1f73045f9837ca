"""Files of documents -> units of work, about a megabyte each, in an order that depends on nothing but the input.

`.jsonl` holds a document a line, `.parquet` one a row, any other text file is one. A document goes to the validation
split by a hash of its text: not by its place, nor by who reads it; equal documents go together. It knows no tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.textfiles import BLOCK, TextFile, require_pyarrow
from minigpt_cli.core.textstream import Progress, advancing, distinct_characters

UNIT = 1 << 20  # bytes or characters of input in a unit, or a little more
READ_TO_LEARN = 1 << 28  # bytes on disk from which a tokenizer that is learned takes its sample
MAX_DOCUMENT = 64 << 20  # bytes of a line of .jsonl, or characters of another document


def validates(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split, as that `fraction` of all texts does."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


@dataclass(frozen=True)
class Lines:
    """Whole lines of a .jsonl, the first of them being line `first` of the file `name`. Not parsed yet."""

    name: str
    first: int
    data: bytes
    text_field: str

    def texts(self) -> list[str]:
        """The documents that are not empty. UserError, with the line, for what is none."""
        lines = enumerate(self.data.split(b"\n"), start=self.first)
        return [text for number, line in lines if line.strip() and (text := self._text(line, number))]

    def _text(self, line: bytes, number: int) -> str:
        try:
            document = json.loads(line)
            text = document[self.text_field] if isinstance(document, dict) else None
            if isinstance(text, str) and "\0" not in text:
                text.encode("utf-8")  # half a surrogate pair is legal JSON, and no text
                return text
            problem = f'"{self.text_field}" is not a text' if isinstance(document, dict) else "not a JSON object"
            problem = "a NUL character in the text" if isinstance(text, str) else problem
        except KeyError:
            problem = f'no field "{self.text_field}" ({_these(document)}); name the text\'s field with --text-field'
        except UnicodeEncodeError:
            problem = "half a surrogate pair in the text"
        except UnicodeDecodeError:
            problem = "not UTF-8"
        except (ValueError, RecursionError):
            problem = "not JSON"
        raise UserError(f"{self.name}: line {number:,}: {problem}")


@dataclass(frozen=True)
class Texts:
    """Documents that are text already; none is empty."""

    documents: list[str]

    def texts(self) -> list[str]:
        return self.documents


Unit = Lines | Texts


@dataclass(frozen=True)
class Documents:
    """All documents of `files`, in order. UserError for what cannot be read, with the file and the line or row."""

    files: Sequence[TextFile]
    text_field: str  # of a line, or the column of a row
    val_fraction: float
    progress: Progress

    def code_points(self) -> set[int]:
        return distinct_characters(text for unit in self._units("reading") for text in unit.texts())[1]

    def train_texts(self) -> tuple[Iterator[str], int]:
        """Training documents, and that they are one unit in so many."""
        every = 1 + sum(file.size for file in self.files) // READ_TO_LEARN
        texts = (text for unit in islice(self._units("sampling"), 0, None, every) for text in unit.texts())
        return (text for text in texts if not validates(text, self.val_fraction)), every

    def units(self, last_cut: Callable[[str], int]) -> Iterator[Unit]:
        """The same units every time; no document is cut."""
        return self._units("tokenizing")

    def _units(self, stage: str) -> Iterator[Unit]:
        advance = advancing(self.progress, stage, self.files)
        for by_line, group in groupby(self.files, key=lambda file: file.holds == "jsonl"):
            if by_line:
                for file in group:
                    yield from _lines(file, self.text_field, advance)
            else:
                yield from _gathered(text for file in group for text in self._texts(file, advance))

    def _texts(self, file: TextFile, advance: Callable[[int], None]) -> Iterator[str]:
        return _rows(file, self.text_field, advance) if file.holds == "parquet" else _whole(file, advance)


def _gathered(texts: Iterable[str]) -> Iterator[Texts]:
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= UNIT:
            yield Texts(waiting)
            waiting, size = [], 0
    if waiting:
        yield Texts(waiting)


def _whole(file: TextFile, advance: Callable[[int], None]) -> Iterator[str]:
    """A text file as one document."""
    parts: list[str] = []
    size = 0
    for text in file.texts(advance):
        parts.append(text)
        size += len(text)
        if size > MAX_DOCUMENT:
            raise UserError(
                f"{file.name}: {_too_large()}; a text of any size can be prepared by itself, as no document"
            )
    if size:
        yield "".join(parts)


def _lines(file: TextFile, text_field: str, advance: Callable[[int], None]) -> Iterator[Lines]:
    first, size = 1, 0
    parts: list[bytes] = []  # what waits for the end of its line, and for UNIT bytes
    for block in file.blocks(advance):
        end = block.rfind(b"\n") + 1 if size + len(block) >= UNIT else 0
        if not end:
            parts.append(block)
            size += len(block)
            if size > MAX_DOCUMENT:
                raise UserError(f"{file.name}: line {first + _newlines(parts):,}: {_too_large()}; is it one a line?")
            continue
        data = b"".join([*parts, block[:end]])
        yield Lines(file.name, first, data, text_field)
        first += data.count(b"\n")
        parts, size = [block[end:]], len(block) - end
    yield Lines(file.name, first, b"".join(parts), text_field)


def _rows(file: TextFile, text_field: str, advance: Callable[[int], None]) -> Iterator[str]:
    """The texts of a .parquet that are not empty, row group by row group, some thousand rows at a time."""
    if file.packing:
        raise UserError(f"{file.name}: Parquet files are compressed inside; unpack this one first")
    pyarrow = require_pyarrow(file.name)
    import pyarrow.parquet as parquet

    with file.opened(advance) as raw:
        while raw.read(BLOCK):
            pass  # hashed, if that is due; what follows reads here and there
    number = 1
    try:
        with parquet.ParquetFile(file.path, pre_buffer=False, memory_map=False) as table:
            index = _text_column(table, file.name, text_field)
            for group in range(table.num_row_groups):
                shape = table.metadata.row_group(group)
                per_row = max(1, shape.column(index).total_uncompressed_size) / max(1, shape.num_rows)
                rows = max(1, min(4096, int(UNIT / per_row)))
                for batch in table.iter_batches(rows, row_groups=[group], columns=[text_field], use_threads=False):
                    column = batch.column(0)
                    yield from _strings(column, file.name, number)
                    number += len(column)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.name}: row {number:,} or after: damaged: {_one_line(error)}") from None
    except OSError as error:
        if error.errno:
            raise
        raise UserError(f"{file.name}: row {number:,} or after: damaged: {_one_line(error)}") from None


def _text_column(table: Any, name: str, text_field: str) -> int:
    """The number of the column that holds the text. UserError where there is none."""
    from pyarrow import types

    schema = table.schema_arrow
    if (place := schema.get_field_index(text_field)) < 0:
        raise UserError(
            f'{name}: no column "{text_field}" ({_these(schema.names)}); name the text\'s column with --text-field'
        )
    kind = schema.field(place).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f'{name}: column "{text_field}" holds {_one_line(kind)}, not text')
    names = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
    return names.index(text_field)


def _strings(column: Any, name: str, first: int) -> Iterator[str]:
    """The texts of a column whose first row is row `first` of the file."""
    for number, value in enumerate(column, start=first):
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            raise UserError(f"{name}: row {number:,}: not UTF-8") from None
        if text is None:
            raise UserError(f"{name}: row {number:,}: null, where a text should be; leave such rows out of the file")
        if "\0" in text:
            raise UserError(f"{name}: row {number:,}: a NUL character in the text")
        if len(text) > MAX_DOCUMENT:
            raise UserError(f"{name}: row {number:,}: {_too_large()}")
        if text:
            yield text


def _too_large() -> str:
    return f"a document of more than {MAX_DOCUMENT >> 20} MiB"


def _newlines(parts: Iterable[bytes]) -> int:
    return sum(part.count(b"\n") for part in parts)


def _these(names: Iterable[str]) -> str:
    names = list(names)
    more = ", ..." if len(names) > 8 else ""
    return "it has " + (", ".join(f'"{name}"' for name in names[:8]) + more or "none")


def _one_line(error: object) -> str:
    return " ".join(str(error)[:200].split())
