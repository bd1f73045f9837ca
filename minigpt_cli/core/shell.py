"""Commands as a person can paste them into a shell. Knows no commands."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence


def command_line(words: Sequence[object], encoding: str = "utf-8") -> str:
    """`words` as one line that a shell reads back as these words, in characters that `encoding` has.

    For POSIX shells; on Windows for cmd and PowerShell alike.
    """
    quote = _windows_word if os.name == "nt" else _posix_word
    return " ".join(quote(str(word), encoding) for word in words)


def _posix_word(word: str, encoding: str) -> str:
    """Quoted as `shlex` does. What cannot be printed is spelled out in $'...', which bash, zsh and ksh read."""
    if word.isprintable() and _can_be_encoded(word, encoding):
        return shlex.quote(word)
    plain = {ord(c): c for c in "".join(map(chr, range(32, 127))) if c not in "'\\"}
    return "$'" + "".join(plain.get(byte, f"\\{byte:03o}") for byte in _bytes(word)) + "'"


def _bytes(word: str) -> bytes:
    """As they are in the name of a file."""
    try:
        return os.fsencode(word)
    except UnicodeEncodeError:  # an ASCII locale, or half of a surrogate pair
        return word.encode("utf-8", "surrogatepass")


def _windows_word(word: str, encoding: str) -> str:
    """In double quotes where need be, which both shells understand. (A file's name there cannot hold any itself.)

    Neither shell can be told in the other's language to leave %NAME% (cmd) or $NAME (PowerShell) alone.
    """
    if re.fullmatch(r"[\w./\\:=+-]+", word):
        return word
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', word)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'  # a backslash before the last quote would escape it


def _can_be_encoded(word: str, encoding: str) -> bool:
    try:
        word.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
