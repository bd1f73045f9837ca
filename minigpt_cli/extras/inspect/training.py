"""What metrics.jsonl beside a checkpoint tells of its training. The file may come from anywhere. No torch, no HTML."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from minigpt_cli.core.metrics import Record, read_metrics
from minigpt_cli.extras.inspect.labels import visible

MAX_BYTES = 64 << 20  # a longer file is no log of a run on one machine
MAX_POINTS = 500  # of each curve that is drawn
MAX_SAMPLES = 12
MAX_SAMPLE = 1500  # characters


def training(checkpoint: Path) -> dict[str, Any]:
    """`curves`: name -> [[step, value], ...]; `samples`: [{step, text}, ...]; `note`: why there is nothing, or None."""
    path = checkpoint.parent / "metrics.jsonl"
    try:
        if not path.is_file():
            return _nothing("no metrics.jsonl lies beside the checkpoint")
        if path.stat().st_size > MAX_BYTES:
            return _nothing("the metrics.jsonl beside the checkpoint is too large to be a run's")
        records = read_metrics(path)
    except (OSError, RecursionError):
        return _nothing("the metrics.jsonl beside the checkpoint cannot be read")
    curves = {key: _thinned(_points(records, key)) for key in ("train_loss", "val_loss", "lr")}
    samples = [record for record in records if isinstance(record.get("sample"), str) and _is_number(record["step"])]
    if not samples and not any(curves.values()):
        return _nothing("the metrics.jsonl beside the checkpoint holds no numbers")
    return {
        "curves": curves, "note": None,
        "samples": [
            {"step": record["step"], "text": visible(record["sample"][:MAX_SAMPLE])}
            for record in _spread(samples, MAX_SAMPLES)
        ],
    }  # fmt: skip


def _points(records: list[Record], key: str) -> list[tuple[float, float]]:
    return [(r["step"], float(r[key])) for r in records if _is_number(r["step"]) and _is_number(r.get(key))]


def _is_number(value: object) -> bool:
    """A finite number, of a size that can be drawn."""
    return isinstance(value, int | float) and abs(value) < 1e15  # which NaN is not


def _thinned(points: list[tuple[float, float]]) -> list[list[float]]:
    """At most MAX_POINTS: the mean of each run of neighbours, at the last one's step."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]


def _spread(samples: list[Record], n: int) -> list[Record]:
    """The first, the last, and some between."""
    if len(samples) <= n:
        return samples
    return [samples[round(i * (len(samples) - 1) / (n - 1))] for i in range(n)]


def _nothing(note: str) -> dict[str, Any]:
    return {"curves": {}, "samples": [], "note": note}
