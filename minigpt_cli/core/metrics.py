"""Where numbers go: metrics.jsonl, loss.png, and whoever else listens to a run.

A listener hears of a run through six methods; the trainer does not know who they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minigpt_cli.core.files import atomic_write

Record = dict[str, Any]


class Listener:
    """Hears of a run. Every method does nothing here: a listener overrides what it cares about."""

    def log(self, record: Record) -> None:
        """One line of metrics: always `step` and `seconds`, and `train_loss` or `val_loss`."""

    def progress(self, step: int) -> None:
        """`step` steps are done. Called after each; must be cheap."""

    def sample(self, step: int, text: str) -> None:
        """A text that the model wrote after `step` steps."""

    def saved(self, path: Path, step: int) -> None:
        """The checkpoint is whole and on the disk."""

    def note(self, message: str) -> None:
        """Something that a person should know."""

    def close(self) -> None:
        """The session is over, however it ended: nothing else will be told."""


class JsonLines(Listener):
    """metrics.jsonl: one JSON object a line, flushed as it comes."""

    def __init__(self, path: Path, *, resume_at: int | None = None, evaluated: bool = True, data_step: int = 0) -> None:
        """`resume_at`: keep the lines up to that step, so that a resumed run neither repeats nor skips any.

        `evaluated` says whether that step's evaluation was done; if not, it will be made up for. `data_step`: where the
        data changed before; an evaluation of older data stays.
        """
        if resume_at is not None:
            kept = [
                record
                for record in read_metrics(path)
                if kept_when_resuming(record, resume_at, evaluated or record.get("data_step", 0) != data_step)
            ]
            with atomic_write(path) as file:
                file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a" if resume_at is not None else "w", encoding="utf-8", newline="\n")

    def log(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sample(self, step: int, text: str) -> None:
        self.log({"step": step, "sample": text})

    def saved(self, path: Path, step: int) -> None:
        os.fsync(self._file.fileno())  # the lines before a checkpoint survive what the checkpoint survives

    def close(self) -> None:
        self._file.close()


def kept_when_resuming(record: Record, resume_at: int, evaluated: bool) -> bool:
    """Whether a record stands when the run goes on from a checkpoint of that step, and will not come again."""
    return bool(record["step"] < resume_at + ("val_loss" not in record or evaluated))


def read_metrics(path: Path) -> list[Record]:
    """Every whole line of metrics.jsonl that has a step; a line cut short by a power failure is left out."""
    return list(parse_metrics(path.read_bytes().splitlines())) if path.is_file() else []


def parse_metrics(lines: Iterable[bytes]) -> Iterator[Record]:
    """The records among `lines`; what is none is left out."""
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw the loss curves of metrics.jsonl. Nothing is drawn while there is nothing to draw."""
    from matplotlib.figure import Figure  # slow to import, needed once a run

    records = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1.2)
    if not axes.lines:
        return
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)
