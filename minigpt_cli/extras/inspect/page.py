"""The report as one HTML file that needs nothing else. Knows templates and packing, no torch.

Whatever comes from a checkpoint, a text or a dataset reaches the page in two ways only: through Jinja's autoescape, and
as JSON in a script element that no browser runs, which the page's own script shows as text. The content security
policy names that one script and the style by their hashes, and forbids everything else, the network included.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minigpt_cli.extras.inspect.analysis import Report, as_plain
from minigpt_cli.extras.inspect.labels import KINDS

FOLDER = Path(__file__).parent
SCRIPTS = ("base", "draw", "tokens", "embeddings", "attention", "stream", "training")


def render(report: Report) -> bytes:
    """The page, UTF-8."""
    script = "'use strict';\n(() => {\n" + "".join(_static(f"{name}.js") for name in SCRIPTS) + "})();\n"
    style = _static("style.css")
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"signed": _signed, "thousands": lambda n: f"{n:,}"}
    html = environment.get_template("page.html.j2").render(
        report=report, kinds=KINDS, script=Markup(script), style=Markup(style), data=Markup(_json(_packed(report))),
        script_hash=_hash(script), style_hash=_hash(style),
    )  # fmt: skip
    return html.encode("utf-8")


def _packed(report: Report) -> Report:
    """What the page's script reads: the report, with queries and keys in 16 bits and without what follows from them.

    Scores and weights follow: the script multiplies the same queries and keys, exact to about four digits.
    """
    attention = report["attention"]
    packed = as_plain({key: value for key, value in report.items() if key != "attention"})
    if attention:
        packed["attention"] = {
            "scale": attention["scale"], "first": attention["first"],
            "queries": _pack(attention["queries"]), "keys": _pack(attention["keys"]),
        }  # fmt: skip
    return packed


def _pack(vectors: Any) -> dict[str, Any]:
    """(..., D) float32 -> int16 with one scale a vector, little-endian, base64; a tenth of what JSON would take."""
    scales = np.abs(vectors).max(axis=-1) / 32767
    whole = np.rint(vectors / np.where(scales > 0, scales, 1)[..., None])
    return {"shape": list(vectors.shape), "scales": _base64(scales, "<f4"), "values": _base64(whole, "<i2")}


def _base64(array: Any, dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode("ascii")


def _json(document: Report) -> str:
    """JSON that cannot end the element it stands in, nor begin another: ASCII, with <, > and & spelled out."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _static(name: str) -> str:
    return (FOLDER / "static" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _signed(value: float, digits: int = 3) -> str:
    """+0.123, with a true minus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")
