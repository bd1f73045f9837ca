"""Tokens to text: whole characters, and nothing of a stop text, wherever tokens and characters are cut."""

from __future__ import annotations

import pytest

from minigpt_cli.core.detokenize import Detokenizer

BYTES = [bytes([i]) for i in range(256)]


def shown(text: str, stops: list[str]) -> tuple[list[str], Detokenizer]:
    """What is given out after each byte of `text`, and in the end."""
    detokenizer, parts = Detokenizer(BYTES, stops), []
    for byte in text.encode():
        detokenizer.add(byte)
        parts.append(detokenizer.take())
    return [*parts, detokenizer.finish()], detokenizer


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("an EN, an END, the END. more", ["END."], "an EN, an END, the "),
        ("the END", ["END."], "the END"),  # held back for a stop text that never came
        ("one two three", ["three", "two"], "one "),
        ("abcabd", ["abcabx", "abd"], "abc"),
        ("xaby", ["abyz", "b"], "xa"),  # the first that is whole counts
        ("Größe 東京 ends", ["京"], "Größe 東"),
        ("aé", ["ê"], "aé"),  # its first byte is the same
        ("", ["x"], ""),
    ],
)
def test_text_ends_before_the_first_stop_text_and_shows_nothing_of_it(
    text: str, stops: list[str], expected: str
) -> None:
    parts, detokenizer = shown(text, stops)
    assert "".join(parts) == expected
    assert all(expected.startswith("".join(parts[:n])) for n in range(len(parts)))
    assert detokenizer.ended


def test_of_two_stop_texts_in_one_token_the_first_counts() -> None:
    detokenizer = Detokenizer([b"xabz"], ["z", "b"])
    detokenizer.add(0)
    assert detokenizer.take() == "xa"


def test_a_character_comes_with_its_last_byte_and_half_of_one_is_replaced() -> None:
    assert shown("a東", [])[0] == ["a", "", "", "東", ""]
    detokenizer = Detokenizer(BYTES)
    for byte in "a東".encode()[:-1]:
        detokenizer.add(byte)
    assert detokenizer.seen == 1
    assert detokenizer.take() + detokenizer.finish() == "a\ufffd"


def test_half_of_a_windows_line_end_waits() -> None:
    assert shown("a\r\nb", [])[0] == ["a", "", "\r\n", "b", ""]


def test_the_end_of_a_document_ends_a_text_and_lets_go_of_what_was_held_back() -> None:
    detokenizer = Detokenizer([*BYTES, b""], ["END"], end=256)
    for token in [*b"the EN\r", 256, *b"more"]:
        detokenizer.add(token)
    assert detokenizer.ended
    assert detokenizer.take() == "the EN\r"
    detokenizer = Detokenizer([*BYTES, b""], end=256)
    for token in (ord("a"), "東".encode()[0], 256):
        detokenizer.add(token)
    assert detokenizer.take() == "a\ufffd"
