"""The page of `minigpt serve` in a real browser: what a person does, and what the API says of the same."""

from __future__ import annotations

import json
import math

import pytest

from browser import Browser
from served import KEY, SCRIPT, Server

TOKENS = "[...document.querySelectorAll('#text .token')]"
WRITTEN = "document.getElementById('write').disabled == false && document.querySelectorAll('#text .token').length"


def at(browser: Browser, selector: str) -> tuple[float, float]:
    """The middle of what the selector finds."""
    x, y = browser.js(
        f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    return x, y


def mouse(browser: Browser, selector: str, click: bool = False) -> None:
    browser.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    x, y = at(browser, selector)
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    for kind in ("mousePressed", "mouseReleased") if click else ():
        browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def type_into(browser: Browser, selector: str, text: str) -> None:
    browser.js(f"document.querySelector({selector!r}).value = ''")
    mouse(browser, selector, click=True)
    browser.send("Input.insertText", text=text)


def slide(browser: Browser, name: str, value: float) -> None:
    browser.js(
        f"Object.assign(document.getElementById({name!r}), {{value: {value}}}).dispatchEvent(new Event('input'))"
    )


def opened(browser: Browser, server: Server, key: str = KEY, **window: object) -> None:
    """The page, with the key typed in."""
    browser.open(server.url + "/", **window)
    browser.js("document.getElementById('key-part').open = true")
    type_into(browser, "#key", key)
    browser.js("document.getElementById('key').blur()")
    browser.wait("document.getElementById('problem').hidden")


def quiet(browser: Browser, server: Server) -> None:
    """Nothing complained but that the key was missing at first, and nothing left the server's origin."""
    complaints = [c["params"]["entry"] for c in browser.complaints() if c["method"] == "Log.entryAdded"]
    assert len(complaints) == len(browser.complaints()) == 1
    assert "401" in complaints[0]["text"]
    assert "/v1/models" in complaints[0]["url"]
    assert {url.startswith(server.url) for url in browser.requests() if not url.startswith("data:")} == {True}


def test_a_prompt_streams_and_each_token_shows_what_the_api_says_of_it(browser: Browser, server: Server) -> None:
    browser.open(server.url + "/")
    assert "API key" in browser.js("document.getElementById('problem').textContent")
    assert browser.js("document.activeElement.id") == "key"
    n = len(SCRIPT.partition("!\n")[0].encode()) - 6
    opened(browser, server)
    assert browser.js("[document.title, document.getElementById('top-k').max]") == ["best", "100"]
    type_into(browser, "#prompt", "Grüße")
    slide(browser, "temperature", 0)
    browser.js("document.getElementById('tokens').step = 1")
    slide(browser, "tokens", n)
    mouse(browser, "#write", click=True)
    browser.wait(f"{WRITTEN} == {n}")
    told = server.complete(prompt="Grüße", max_tokens=n, temperature=0, logprobs=6).json["choices"][0]
    assert browser.js(TOKENS + ".map(n => n.textContent).join('')").replace("·", "") == told["text"]
    for i, hover in ((3, True), (11, False)):  # with the mouse, then with the keyboard
        if hover:
            mouse(browser, f"#text .token:nth-of-type({i + 2})")  # the first is the prompt
        else:
            browser.js("document.querySelector('#text .token').focus()")
            for _ in range(i):
                browser.press("ArrowRight")
        expected = math.exp(told["logprobs"]["token_logprobs"][i])
        shown = browser.js("document.getElementById('probability').textContent")
        assert float(shown.rstrip("%")) / 100 == pytest.approx(expected, abs=6e-4)
        rows = browser.js("[...document.querySelectorAll('.likelihoods li')].map(n => n.textContent)")
        likely = sorted(told["logprobs"]["top_logprobs"][i].values(), reverse=True)
        assert len(rows) == len(likely) >= 6
        name = told["logprobs"]["tokens"][i].replace(" ", "␣").removeprefix("bytes:")
        assert browser.js("document.querySelector('#detail .large').textContent") == name
        assert browser.js("document.querySelector('.likelihoods .chosen .sign').textContent") == name
        assert f"probability {shown}" in browser.js(f"{TOKENS}[{i}].ariaLabel")
    for key, place in (("Home", 0), ("End", n - 1), ("ArrowLeft", n - 2)):
        browser.press(key)
        assert browser.js(TOKENS + ".findIndex(n => n.ariaSelected == 'true')") == place
        assert browser.js(TOKENS + ".filter(n => n.tabIndex == 0).length") == 1
    quiet(browser, server)


def test_what_the_model_writes_is_text_and_nothing_else(browser: Browser, server: Server) -> None:
    """Markup, escapes and marks that reorder text, from the prompt and from the model."""
    opened(browser, server)
    evil = "</span><img src=x onerror=alert(2)>"
    type_into(browser, "#prompt", evil)
    slide(browser, "temperature", 0)
    slide(browser, "tokens", len(SCRIPT.encode()))
    type_into(browser, "#prompt", "")
    mouse(browser, "#write", click=True)
    browser.wait(WRITTEN + " > 100")
    text = browser.js("document.getElementById('text').textContent")
    assert "<img src=x onerror=alert(1)> aus 東京!" in text.replace("·", "")
    assert "\\u{1b}[31m" in text
    assert "\\u{202e}" in text
    assert not {"\x1b", "\u202e"} & set(text)
    type_into(browser, "#prompt", evil)
    browser.press("Escape")
    mouse(browser, "#write", click=True)
    browser.wait(WRITTEN + " > 100")
    assert evil in browser.js("document.getElementById('text').textContent")
    token = json.dumps(evil)  # all of it in one token, as a vocabulary may have it
    browser.js(f"add({{tokens: [{token}], token_logprobs: [-1], top_logprobs: [{{{token}: -1, '<b>': -2}}]}})")
    browser.js(TOKENS + ".at(-1).focus()")
    assert browser.js(TOKENS + ".at(-1).textContent") == evil
    assert evil.replace(" ", "␣") in browser.js("document.getElementById('detail').textContent")
    assert browser.js("document.querySelectorAll('img, b, iframe, #text :not(.token, .given)').length") == 0
    quiet(browser, server)
    browser.js("document.body.append(Object.assign(document.createElement('script'), {textContent: 'pwned = 1'}))")
    assert browser.js("typeof pwned") == "undefined"  # were there a way in, the policy stops it


def test_stop_stops_and_the_server_is_free(browser: Browser, server: Server) -> None:
    opened(browser, server)
    slide(browser, "tokens", 1000)
    busy = [server.begin(prompt="a", max_tokens=100_000, n=3) for _ in range(1)]  # so that it takes a while
    mouse(browser, "#write", click=True)
    browser.wait("document.querySelectorAll('#text .token').length > 3")
    mouse(browser, "#stop", click=True)
    browser.wait("document.getElementById('state').textContent.startsWith('stopped')")
    assert 3 < browser.js("document.querySelectorAll('#text .token').length") < 1000
    for connection in busy:
        connection.close()
    server.until(running=0)
    quiet(browser, server)


def test_an_error_is_told_and_the_page_goes_on(browser: Browser, server: Server) -> None:
    opened(browser, server)
    full = [server.begin(prompt="a", max_tokens=100_000, n=8) for _ in range(2)]
    server.until(running=4, waiting=12)
    mouse(browser, "#write", click=True)
    browser.wait("!document.getElementById('problem').hidden")
    assert "too many requests" in browser.js("document.getElementById('problem').textContent")
    for connection in full:
        connection.close()
    server.until(running=0)
    slide(browser, "top-k", 1)
    slide(browser, "tokens", 10)
    mouse(browser, "#write", click=True)
    browser.wait(WRITTEN + " == 10")
    assert browser.js("document.getElementById('problem').hidden")
    assert browser.js(TOKENS + ".map(n => n.textContent).join('')").replace("·", "") == SCRIPT.encode()[:10].decode()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_the_page_fits_every_screen_and_names_what_is_on_it(
    browser: Browser, server: Server, width: int, scheme: str
) -> None:
    opened(browser, server, width=width, scheme=scheme)
    type_into(browser, "#prompt", "y" * 300)
    slide(browser, "tokens", 120)
    mouse(browser, "#write", click=True)
    browser.wait(WRITTEN + " == 120")
    mouse(browser, "#text .token:nth-of-type(40)", click=True)
    assert browser.js("document.querySelector('#probability').textContent").endswith("%")
    assert browser.js("document.documentElement.scrollWidth") == width  # nothing sticks out
    unnamed = """[...document.querySelectorAll("input, textarea, button, [role=listbox], [role=option]")]
        .filter(n => !n.ariaLabel && !n.labels?.length && !n.textContent.trim()).length"""
    assert browser.js(unnamed) == 0
    paper = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 22, 27)") == (scheme == "dark")
    quiet(browser, server)
