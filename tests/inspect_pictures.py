"""The pictures of the README: python tests/inspect_pictures.py report.html docs. Needs Chromium."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from browser import Browser

TOKEN = 36  # in the middle of a name, where the previous token matters
PARTS = {  # scheme, what the picture ends with, its width
    "queries": ("light", "#queries", 1160),
    "stream": ("light", "#lens-detail", 1160),
    "heads": ("dark", "#wall", 860),
}


def main(page: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            for name, (scheme, last, width) in PARTS.items():
                browser.open(page, width=1160, scheme=scheme)
                browser.wait("document.querySelector('#norms svg')")
                browser.js(f"document.querySelectorAll('#query-tokens .token')[{TOKEN}].click()")
                browser.js("new Promise(done => setTimeout(done, 500))")  # the wall is drawn one map after the other
                top = browser.js(f"document.getElementById({name!r}).getBoundingClientRect().top + scrollY") + 30
                bottom = browser.js(f"document.querySelector({last!r}).getBoundingClientRect().bottom + scrollY") + 12
                path = folder / f"inspect-{name}.png"
                browser.screenshot(path, {"x": 0, "y": top, "width": width, "height": bottom - top})
                colours = Image.open(path).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE, dither=0)
                colours.save(path, optimize=True)
                print(path, f"{path.stat().st_size:,} bytes")
        finally:
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
