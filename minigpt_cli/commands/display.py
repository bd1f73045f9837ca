"""What a person sees of a run. Imported only when one begins."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from minigpt_cli.commands.console import duration, note, safe, stderr
from minigpt_cli.core.config import Config
from minigpt_cli.core.metrics import Listener, Record


class Display(Listener):
    """A live bar on a terminal, plain lines elsewhere. Losing the terminal stops nothing."""

    def __init__(self, config: Config, start: int) -> None:
        self._total, self._start, self._began = config.train.steps, start, time.monotonic()
        self._budget = config.train.max_minutes
        self._latest: dict[str, float] = {}
        self._printed_at = 0.0
        self._live: Any = None
        console = stderr()
        if console.is_terminal and not console.is_dumb_terminal:
            from rich.progress import BarColumn, Progress, TextColumn

            self._live = Progress(
                TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"), console=console, refresh_per_second=4,
            )  # fmt: skip
            self._task = self._live.add_task("", total=self._total, completed=start, line="")
            self._live.start()

    def log(self, record: Record) -> None:
        self._latest |= record
        evaluated = "val_loss" in record
        if self._live is None and (evaluated or time.monotonic() - self._printed_at >= 2):
            self._printed_at = time.monotonic()
            self._say(f"step {record['step']:,}/{self._total:,}  {self._line()}")
        elif self._live is not None and evaluated:
            self._say(f"step {record['step']:,}: validation loss {record['val_loss']:.4f}")

    def progress(self, step: int) -> None:
        self._latest["step"] = step
        if self._live is not None:
            with suppress(OSError, ValueError):
                self._live.update(self._task, completed=step, line=self._line())

    def sample(self, step: int, text: str) -> None:
        self._say(f"--- sample at step {step:,} ---\n{text}\n---")

    def saved(self, path: Path, step: int) -> None:
        self._say(f"saved {path} at step {step:,}")

    def note(self, message: str) -> None:
        self._say(message)

    def close(self) -> None:
        if self._live is not None:
            with suppress(OSError, ValueError):
                self._live.stop()

    def _line(self) -> str:
        latest, parts = self._latest, []
        for key, label, form in (("train_loss", "loss", ".4f"), ("val_loss", "val", ".4f"), ("lr", "lr", ".1e")):
            if key in latest:
                parts.append(f"{label} {latest[key]:{form}}")
        if "tokens_per_second" in latest:
            parts.append(f"{latest['tokens_per_second']:,.0f} tok/s")
        return "  ".join([*parts, f"ETA {duration(self._eta())}"])

    def _eta(self) -> float:
        step, spent = int(self._latest.get("step", self._start)), time.monotonic() - self._began
        left = spent / max(1, step - self._start) * (self._total - step)
        return (
            left
            if self._budget is None
            else min(left, max(0.0, self._budget * 60 - self._latest.get("seconds", spent)))
        )

    def _say(self, line: str) -> None:
        with suppress(OSError, ValueError):  # the terminal is gone; the run is not
            if self._live is not None:
                from rich.text import Text

                self._live.console.print(Text(safe(line)))
            else:
                note(line)
