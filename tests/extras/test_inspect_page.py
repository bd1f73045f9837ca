"""The page and what is written on it: labels, curves, packing, and that nothing from outside becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from inspected import NOTHING, evil_report, made_checkpoint
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.model import GPT
from minigpt_cli.core.tokenizer import ByteTokenizer, CharTokenizer
from minigpt_cli.extras.inspect.analysis import analyse
from minigpt_cli.extras.inspect.labels import token_kind, token_label, visible
from minigpt_cli.extras.inspect.page import render
from minigpt_cli.extras.inspect.text import Text, given_text
from minigpt_cli.extras.inspect.training import training


@pytest.mark.parametrize(
    ("piece", "label", "kind"),
    [
        (b"e", "e", "vowel"), (b"x", "x", "consonant"), (b"Q", "Q", "capital"), ("É".encode(), "É", "capital"),
        (b" the", "␣the", "word"), (b"7", "7", "digit"), (b";", ";", "punctuation"), (b"\n", "↵", "space"),
        (b" ", "␣", "space"), (b"\t", "⇥", "space"), (b"\xe6", "\\xe6", "other"), (b"", "∅", "other"),
        (b"\x1b[31m", "\\x1b[31m", "other"), ("\u202e".encode(), "\\u202e", "other"),
        ("\u2028".encode(), "\\u2028", "space"), ("\u0301".encode(), "◌\u0301", "other"),
        ("↵".encode(), "\\u21b5", "punctuation"), (b"x" * 99, "x" * 39 + "…", "word"),
    ],
)  # fmt: skip
def test_a_token_is_written_in_visible_signs(piece: bytes, label: str, kind: str) -> None:
    assert token_label(piece) == label
    assert token_kind(piece) == kind


def test_visible_text_keeps_its_lines_and_nothing_hidden() -> None:
    assert visible("a b\n\tc\x1b[0m\u200b\u202e") == "a b\n\tc\\x1b[0m\\u200b\\u202e"


def test_training_is_read_from_beside_the_checkpoint_and_only_numbers_are_believed(tmp_path: Path) -> None:
    ckpt, metrics = tmp_path / "last.safetensors", tmp_path / "metrics.jsonl"
    assert training(ckpt)["note"] == "no metrics.jsonl lies beside the checkpoint"
    lines = [{"step": 10 * i, "train_loss": 4 / (i + 1), "lr": 1e-3, "seconds": 1.0} for i in range(2000)]
    lines += [{"step": 500, "val_loss": 2.0}, {"step": 500, "sample": "<b>\x1b[0mhi\n"}]
    hostile = [
        '{"step": 1e999, "val_loss": 1}', '{"step": 3, "val_loss": NaN}', '{"step": 4, "val_loss": "<script>"}',
        '{"step": 5, "val_loss": ' + "9" * 400 + "}", '{"step": 6, "sample": 7}', "\0\xff",
        '{"step": true, "lr": -Infinity}',
    ]  # fmt: skip
    metrics.write_text("\n".join([*map(json.dumps, lines), *hostile]), encoding="utf-8")
    found = training(ckpt)
    assert found["note"] is None
    assert found["curves"]["val_loss"] == [[500, 2.0]]
    assert len(found["curves"]["train_loss"]) == 500
    assert found["curves"]["train_loss"][0] == [30, pytest.approx((4 + 2 + 4 / 3 + 1) / 4)]
    assert found["samples"] == [{"step": 500, "text": "<b>\\x1b[0mhi\n"}]
    metrics.write_text("[" * 100_000)
    assert "metrics.jsonl" in training(ckpt)["note"]


class Page(HTMLParser):
    """Every tag with its attributes, and the text of each script."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page.decode("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    raw = render(evil_report(tmp_path))
    page = Page(raw)
    names = [name for name, _ in page.tags]
    assert names.count("script") == 2
    assert not {"img", "iframe", "object", "base", "form"} & set(names)
    assert not any(key.startswith("on") or key == "style" for _, attributes in page.tags for key in attributes)
    assert "{{7*7}}" in page.text  # no template was made of it
    assert b"49" not in raw[raw.index(b"<header>") : raw.index(b"<nav")]
    hidden = {c for c in raw.decode() if c in "\x1b\u2028\u202e"}
    assert not hidden
    assert not set("<>&") & set(page.scripts[0])
    data = json.loads(page.scripts[0])
    assert "".join(data["labels"][str(i)] for i in data["text"]["ids"]).startswith("</script><script>")


def test_the_policy_names_the_script_and_the_style_and_no_more(tmp_path: Path) -> None:
    raw = render(evil_report(tmp_path)).decode()
    page = Page(raw.encode())
    (policy,) = (a["content"] for name, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = lambda text: "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()  # noqa: E731
    style = re.search(r"<style>(.*?)</style>", raw, re.S)
    assert style is not None
    assert policy == (
        f"default-src 'none'; script-src '{digest(page.scripts[1])}'; style-src '{digest(style[1])}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    addresses = [
        v for name, a in page.tags for k, v in a.items() if k in ("src", "href") and v and not v.startswith("#")
    ]
    assert addresses == ["data:,"]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|eval\(", raw)


def test_the_page_of_gpt_yaml_keeps_below_five_megabytes(tmp_path: Path) -> None:
    model = GPT(ModelConfig(dropout=0.2), 65)
    saved = made_checkpoint(tmp_path, model, CharTokenizer("".join(map(chr, range(40, 105)))))
    text = Text(torch.randint(65, (256,)).tolist(), "a test")
    report = analyse(saved, model, text, NOTHING)
    page = render(report)
    assert len(page) < 5_000_000
    packed = json.loads(Page(page).scripts[0])["attention"]["queries"]
    values = np.frombuffer(base64.b64decode(packed["values"]), "<i2").reshape(packed["shape"])
    scales = np.frombuffer(base64.b64decode(packed["scales"]), "<f4").reshape(packed["shape"][:-1])
    error = abs(values * scales[..., None] - report["attention"]["queries"])
    assert (error <= 0.51 * scales[..., None]).all()  # to the nearest


def test_bytes_are_a_vocabulary_like_any_other(tmp_path: Path) -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16), 256)
    saved = made_checkpoint(tmp_path, model, ByteTokenizer())
    report = analyse(saved, model, given_text(saved, "東京 x", "--prompt"), NOTHING)
    assert [report["labels"][str(i)] for i in report["text"]["ids"]][:4] == ["\\xe6", "\\x9d", "\\xb1", "\\xe4"]
    assert b"html" in render(report)
