"""The page in a real browser: a person's choices, and the numbers that it then shows, against the JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import Browser
from inspected import V, evil_report, made_checkpoint
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.model import GPT
from minigpt_cli.core.tokenizer import CharTokenizer
from minigpt_cli.extras.inspect.analysis import analyse, as_plain
from minigpt_cli.extras.inspect.page import render
from minigpt_cli.extras.inspect.text import Text, Validation

Pages = dict[str, tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Name -> (the page, its report as JSON): a classic model, a modern one, one without blocks, one token alone."""
    torch.manual_seed(1)
    folder, made = tmp_path_factory.mktemp("pages"), {}
    tokens = torch.randint(V, (400,)).numpy()
    modern = {"n_head": 4, "n_kv_head": 2, "position": "rope", "norm": "rmsnorm", "qk_norm": True, "logit_softcap": 9.0}
    for name, shape in {"classic": {}, "modern": modern, "bigram": {"n_layer": 0, "norm": "none"}, "one": {}}.items():
        model = GPT(ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, **shape}), V)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        (folder / name).mkdir()
        lines = [{"step": s, "train_loss": 3 - s / 9, "val_loss": 3.5, "lr": 1e-3} for s in range(9)]
        lines += [{"step": 8, "sample": "a b"}]
        (folder / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        saved = made_checkpoint(folder / name, model, CharTokenizer("\n abcdefgh~"))
        ids = [3] if name == "one" else [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 0, 8]
        report = analyse(saved, saved.model(), Text(ids, "a test"), Validation(tokens, "somewhere"))
        page = folder / f"{name}.html"
        page.write_bytes(render(report))
        made[name] = page, as_plain(report)
    return made


def number(text: str) -> float:
    """As people read it: a true minus sign, a percentage."""
    bare = text.replace("−", "-").replace(",", "")
    return float(bare[:-1]) / 100 if bare.endswith("%") else float(bare)


def rows(browser: Browser, selector: str) -> list[list[str]]:
    """The cells of a table's body."""
    return browser.js(
        f"[...document.querySelectorAll({json.dumps(selector + ' tbody tr')})]"
        ".map(row => [...row.children].map(cell => cell.innerText.trim()))"
    )


def quiet(browser: Browser, page: Path) -> None:
    """Nothing complained, and nothing left the page."""
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]


@pytest.mark.parametrize("name", ["classic", "modern"])
def test_a_chosen_head_and_token_show_the_reports_own_numbers(browser: Browser, pages: Pages, name: str) -> None:
    page, report = pages[name]
    browser.open(page)
    attention, t, layer, head = report["attention"], 8, 1, 1
    tile = layer * report["model"]["config"]["n_head"] + head
    browser.js(f"document.querySelectorAll('#wall .tile')[{tile}].click()")
    browser.js(f"document.querySelectorAll('#query-tokens .token')[{t}].click()")
    assert browser.js("[layer.value, head.value]") == [str(layer), str(head)]
    shown = rows(browser, "#formula")
    labels = [report["labels"][str(i)] for i in report["text"]["ids"]]
    scores, weights = attention["scores"][layer][head], attention["weights"][layer][head][t]
    order = sorted(range(t + 1), key=lambda s: -weights[s])
    for s, row in zip(order[:6], shown, strict=False):
        assert row[0].split() == [labels[s].strip(), str(s + 1)]
        assert number(row[1]) == pytest.approx(scores[t][s], abs=6e-3)
        assert number(row[2]) == pytest.approx(scores[t][s] * attention["scale"], abs=6e-3)
        assert row[3] == "0"
        assert number(row[5]) == pytest.approx(weights[s], abs=6e-4)
    more, later, total = shown[6:]
    assert more[0] == "3 more"
    assert number(more[5]) == pytest.approx(sum(weights[s] for s in order[6:]), abs=1e-3)
    assert later[3] == "−∞"
    assert number(later[5]) == 0
    scaled = [attention["scale"] * score for score in scores[t]]
    assert number(total[4]) == pytest.approx(sum(math.exp(x - max(scaled)) for x in scaled), abs=6e-3)
    product = browser.js("document.querySelector('#product .strip:last-child .number').textContent")
    assert number(product.removeprefix("Σ = ")) == pytest.approx(scores[t][order[0]], abs=6e-3)
    told = report["heads"][tile]
    role = browser.js("document.getElementById('head-role').textContent")
    assert told["label"] in role
    assert f"{told['importance']['rise']:+.3f}".replace("-", "−") in role
    quiet(browser, page)


def test_a_token_shows_its_surprise_its_lens_and_its_pushes(browser: Browser, pages: Pages) -> None:
    page, report = pages["modern"]
    browser.open(page)
    t = 5
    browser.js(f"document.querySelectorAll('#text-tokens .token')[{t}].click()")
    entry = report["text"]["at"][t]
    probability, rank, surprise = browser.js(
        "[...document.querySelectorAll('#text-detail dd')].map(n => n.textContent)"
    )
    assert number(probability) == pytest.approx(entry["probability"], abs=6e-3)
    assert rank == f"{entry['rank']} of {V}"
    assert number(surprise.removesuffix(" bits")) == pytest.approx(entry["bits"], abs=6e-3)
    bars = browser.js("[...document.querySelectorAll('#text-detail .likelihoods .number')].map(n => n.textContent)")
    assert [number(bar) for bar in bars] == pytest.approx(entry["probabilities"], abs=6e-3)
    for l, row in enumerate(rows(browser, "#lens-detail")):  # noqa: E741
        shown = [number(cell.split()[-1]) for cell in row[1:4]]
        assert shown == pytest.approx(report["stream"]["lens"]["probabilities"][l][t], abs=6e-3)
        assert number(row[4]) == pytest.approx(report["stream"]["lens"]["right"][l][t], abs=6e-3)
    push = report["stream"]["push"]
    for i, row in enumerate(rows(browser, "#push")[:-1]):
        assert row[0] == push["parts"][i]
        assert number(row[2]) == pytest.approx(push["values"][i][t], abs=6e-3)
    skipped = [number(row[2].split("±")[0]) for row in rows(browser, ".skipped")]
    assert skipped == pytest.approx([rise["rise"] for rise in report["validation"]["skipped"]], abs=1e-4)
    quiet(browser, page)


def test_the_keyboard_is_enough(browser: Browser, pages: Pages) -> None:
    page, report = pages["classic"]
    browser.open(page)
    browser.js("document.querySelector('#text-tokens .token').focus()")
    browser.press("Home")
    chosen = "[...document.querySelectorAll('#text-tokens .token')].findIndex(n => n.ariaSelected == 'true')"
    assert browser.js(chosen) == 0
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 11), ("Home", 0)):
        browser.press(key)
        assert browser.js(chosen) == expected, key
        assert browser.js("document.activeElement.getAttribute('aria-selected')") == "true"
    one_stop = "[...document.querySelectorAll({})].filter(n => n.tabIndex == 0).length"
    for selector in ("#text-tokens .token", "#query-tokens .token", "#wall .tile", "#plane .point"):
        assert browser.js(one_stop.format(json.dumps(selector))) == 1, selector
    browser.js("document.querySelector('#wall .tile[tabindex=\"0\"]').focus()")
    browser.press("ArrowUp")
    browser.press("ArrowLeft")
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    assert browser.js("[layer.value, head.value]") == ["1", "1"]
    browser.js("document.querySelector('#plane .point[tabindex=\"0\"]').focus()")
    browser.press("Home")
    first = report["embeddings"]
    told = browser.js("[...document.querySelectorAll('#neighbours .number')].map(n => n.textContent)")
    assert [number(text) for text in told] == pytest.approx(first["cosines"][0], abs=6e-3)
    quiet(browser, page)


@pytest.mark.parametrize("name", ["classic", "modern", "bigram", "one"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_every_model_fits_every_screen_without_a_complaint(
    browser: Browser, pages: Pages, name: str, width: int, scheme: str
) -> None:
    page, _ = pages[name]
    browser.open(page, width=width, scheme=scheme)
    browser.wait("document.querySelector('#losses svg')")  # drawn when its size is known
    assert browser.js("document.documentElement.scrollWidth") == width  # nothing sticks out
    unnamed = """[...document.querySelectorAll("canvas, svg, select, button, [role=listbox], [role=option]")]
        .filter(n => !n.ariaLabel && !n.closest("label, [aria-hidden=true]") && !n.textContent.trim()).length"""
    assert browser.js(unnamed) == 0  # every picture says in words what it is
    says = browser.js("document.body.innerText")
    assert ("no blocks" in says) == (name == "bigram")
    assert "undefined" not in says
    assert "NaN" not in says
    quiet(browser, page)


def test_a_hostile_report_runs_nothing_and_asks_for_nothing(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "evil.html"
    page.write_bytes(render(evil_report(tmp_path)))
    browser.open(page)
    assert browser.js("typeof pwned") == "undefined"
    assert browser.js("document.querySelectorAll('img, iframe, body script').length") == 2  # its own two scripts
    browser.js("document.querySelectorAll('#text-tokens .token').forEach(token => token.click())")
    assert browser.js("typeof pwned") == "undefined"
    assert "<img src=x onerror=pwned=1>" in browser.js("document.querySelector('h1').textContent")
    quiet(browser, page)
    # And were there a way in: the policy stops what is not the page's own.
    browser.js("document.body.append(Object.assign(document.createElement('script'), {textContent: 'pwned = 1'}))")
    browser.js("document.body.append(Object.assign(document.createElement('img'), {src: 'http://192.0.2.1/x.png'}))")
    assert browser.js("typeof pwned") == "undefined"
    assert browser.complaints()
    (blocked,) = (e["params"]["blockedReason"] for e in browser.events if e["method"] == "Network.loadingFailed")
    assert blocked == "csp"
