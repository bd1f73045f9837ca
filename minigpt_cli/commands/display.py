"""What a person sees of a run, and of other work that takes a while. Imported only when that begins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt_cli.commands.console import duration, note, safe, stderr
from minigpt_cli.core.metrics import Listener, Record

if TYPE_CHECKING:
    from minigpt_cli.core.config import Config

PATIENCE = 2.0  # seconds without a word
EVERY = 10.0  # seconds from one line to the next, where there is no terminal
SLOW_HOURS = 1.0  # a run that takes longer is said to


class Display(Listener):
    """A live bar on a terminal, plain lines elsewhere. Losing the terminal stops nothing."""

    def __init__(self, config: Config, start: int, device: str = "cpu") -> None:
        """`start`: the step that the run goes on from. `device`: the kind, for people."""
        self._total, self._start, self._device = config.train.steps, start, device
        self._began, self._budget = time.monotonic(), config.train.max_minutes
        self._first: tuple[int, float] | None = None  # the first step that was done, and when
        self._last = (start, self._began)
        self._latest: dict[str, float] = {}
        self._printed_at, self._told_hours = float("-inf"), start > 0
        self._live: Any = None
        self._ticker: Ticker | None = None
        console = stderr()
        if console.is_terminal and not console.is_dumb_terminal:
            from rich.progress import BarColumn, Progress, TextColumn

            self._live = Progress(
                TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"), console=console, refresh_per_second=4,
            )  # fmt: skip
            self._task = self._live.add_task("", total=self._total, completed=start, line=self._line())
            self._live.start()
        else:
            self._ticker = Ticker(self._tick)
            self._ticker.start()

    def log(self, record: Record) -> None:
        self._latest |= record
        evaluated = "val_loss" in record
        if self._live is None and (evaluated or time.monotonic() - self._printed_at >= PATIENCE):
            self._say_line(record["step"])
        elif self._live is not None and evaluated:
            self._say(f"step {record['step']:,}: validation loss {record['val_loss']:.4f}")

    def progress(self, step: int) -> None:
        self._last = (step, time.monotonic())
        self._first = self._first or self._last
        if not self._told_hours:
            self._tell_hours()
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
        if self._ticker is not None:
            self._ticker.stop()
        if self._live is not None:
            with suppress(OSError, ValueError):
                self._live.stop()

    def _tick(self) -> None:
        """By the ticker's thread: a step, or an evaluation, may take minutes."""
        now = time.monotonic()
        if now - self._printed_at >= EVERY and now - self._began >= PATIENCE - 0.1:
            self._say_line(self._last[0])

    def _say_line(self, step: int) -> None:
        self._printed_at = time.monotonic()
        self._say(f"step {step:,}/{self._total:,}  {self._line()}")

    def _line(self) -> str:
        latest, parts = self._latest, []
        for key, label, form in (("train_loss", "loss", ".4f"), ("val_loss", "val", ".4f"), ("lr", "lr", ".1e")):
            if key in latest:
                parts.append(f"{label} {latest[key]:{form}}")
        if "tokens_per_second" in latest:
            parts.append(f"{latest['tokens_per_second']:,.0f} tok/s")
        eta = self._eta()
        return "  ".join([*parts, f"ETA {duration(eta)}" if eta is not None else "the first step is running"])

    def _step_seconds(self) -> float | None:
        """Of the steps so far, evaluations included; the first, which prepares much, only where it is the only one."""
        if self._first is None:
            return None
        (first, since), (last, until) = self._first, self._last
        return (until - since) / (last - first) if last > first else (since - self._began) / max(1, first - self._start)

    def _eta(self) -> float | None:
        """Seconds to the end of the run, or None before the first step is done."""
        pace = self._step_seconds()
        if pace is None:
            return None
        left = pace * (self._total - self._last[0])
        if self._budget is None:
            return left
        spent = self._latest.get("seconds", time.monotonic() - self._began)
        return min(left, max(0.0, self._budget * 60 - spent))

    def _tell_hours(self) -> None:
        """Once, from real steps: the second of slow ones, or some seconds of quick ones."""
        pace, left = self._step_seconds(), self._eta()
        assert pace is not None
        assert left is not None
        if self._first == self._last or time.monotonic() - self._began < 2 * PATIENCE:
            return
        self._told_hours = True
        if left >= SLOW_HOURS * 3600:
            remedy = "; --config cpu takes minutes" if self._device == "cpu" else ""
            hours, seconds = left / 3600, f"{pace:.1f}" if pace >= 1 else f"{pace:.2g}"
            self._say(
                f"warning: this will take about {hours:,.0f} hours on {self._device} ({seconds} s a step){remedy}"
            )

    def _say(self, line: str) -> None:
        with suppress(OSError, ValueError):  # the terminal is gone; the run is not
            if self._live is not None:
                from rich.text import Text

                self._live.console.print(Text(safe(line)))
            else:
                note(line)


class Ticker(threading.Thread):
    """Calls `tick` every `PATIENCE` seconds until it is stopped."""

    def __init__(self, tick: Callable[[], object]) -> None:
        super().__init__(name="ticker", daemon=True)
        self._tick, self._stopped = tick, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(PATIENCE):
            self._tick()

    def stop(self) -> None:
        self._stopped.set()
        self.join()


@contextmanager
def telling(what: Callable[[], str], *, but_on_a_terminal: bool = False) -> Iterator[None]:
    """Say `what` on stderr when the block has taken two seconds, and every ten from then on.

    `but_on_a_terminal`: there something else shows how far it is.
    """
    if but_on_a_terminal and stderr().is_terminal:
        yield
        return
    next_at = time.monotonic() + PATIENCE

    def tick() -> None:
        nonlocal next_at
        if time.monotonic() >= next_at - 0.1:
            next_at = time.monotonic() + EVERY
            note(what())

    ticker = Ticker(tick)
    ticker.start()
    try:
        yield
    finally:
        ticker.stop()
