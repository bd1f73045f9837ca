"""A headless Chromium, for tests of pages.

It is driven through its own pipe (--remote-debugging-pipe): NUL-separated JSON on two file descriptors, which takes no
library and opens no port.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from clock import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--hide-scrollbars", "--force-color-profile=srgb",
]  # fmt: skip


class Browser:
    """One headless Chromium with one tab. `events` are those of the open page, in order."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()

        def give_pipes() -> None:  # Chromium reads from 3 and writes to 4
            first, second = os.dup(to_browser), os.dup(from_browser)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"], preexec_fn=give_pipes, close_fds=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._in, self._out, self._buffer, self._last = ours_in, ours_out, b"", 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """A command and its result. AssertionError if the browser refuses it, or does not answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self, seconds: float = PATIENCE) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the browser says nothing any more"
            piece = os.read(self._in, 1 << 20)
            assert piece, "the browser is gone"
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        document: dict[str, Any] = json.loads(message)
        if "method" in document:
            self.events.append(document)
        return document

    def open(self, page: Path | str, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Load a file or an address, and wait until its script has run to the end."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self.wait("document.documentElement?.classList.contains('ready')")

    def wait(self, condition: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not self.js(f"!!({condition})"):
            assert time.monotonic() < deadline, f"waited for {condition}: {self.complaints()}"
            time.sleep(0.05)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page. AssertionError if it throws."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """A real key, to whatever has the focus."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def complaints(self) -> list[dict[str, Any]]:
        """Errors and warnings on the console, exceptions, violations of the content security policy."""
        self.js("1")  # whatever was on its way has come
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in bad]

    def requests(self) -> list[str]:
        """Every address that the page asked for, itself included."""
        self.js("1")
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path, clip: dict[str, float] | None = None) -> None:
        more = {"clip": clip | {"scale": 1}} if clip else {}
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, **more)["data"]
        path.write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
