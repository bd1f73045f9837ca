"""How a token is written where people read it: on one line, with nothing invisible, and of which kind it is."""

from __future__ import annotations

import unicodedata

SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}
KINDS = ("vowel", "consonant", "capital", "word", "digit", "punctuation", "space", "other")
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")  # controls, marks that reorder text, spaces like no other


def visible(text: str, keep: str = " \n\t") -> str:
    """`text` with every character that cannot be seen, or would change how others are seen, spelled out (\\x1b)."""
    return "".join(c if c in keep else _spelled(c) for c in text)


def token_label(piece: bytes) -> str:
    """A token in a few visible signs: ␣ ↵ ⇥ for white space, \\xe6 for a part of a character, ∅ for no text."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)
    # A sign that stands in the text itself is spelled out, so that the signs mean one thing.
    label = "".join(SIGNS.get(c) or (_number(c) if c in SIGNS.values() else _spelled(c)) for c in text) or "∅"
    return label if len(label) <= 40 else label[:39] + "…"


def token_kind(piece: bytes) -> str:
    """One of KINDS, by which tokens are coloured."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "other"
    bare = text.strip()
    if not bare:
        return "space" if text else "other"
    if bare.isalpha():
        if len(text) > 1:
            return "word"
        return (
            "capital"
            if bare != bare.lower()
            else "vowel"
            if bare in "aeiouäöüáéíóúàèìòùâêîôûyаеиоуыэюя"
            else "consonant"
        )
    if bare.isdigit():
        return "digit"
    return "punctuation" if all(unicodedata.category(c)[0] in "PS" for c in bare) else "other"


def _spelled(c: str) -> str:
    category = unicodedata.category(c)
    if category in _HIDDEN and c != " ":
        return _number(c)
    return f"◌{c}" if category in ("Mn", "Me", "Mc") else c  # an accent needs something to stand on


def _number(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")
