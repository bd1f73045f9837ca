"""Signals that ask a run to stop: noted when they come, acted on at a step boundary."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

# What terminals and schedulers send. SIGINT is Ctrl-C; SIGBREAK is what Windows sends for Ctrl-Break and when a window
# is closed. Not all of them exist on every system.
STOP_SIGNALS = [s for s in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK") if hasattr(signal, s)]


class StopSignals:
    """`with StopSignals() as stop:` then `stop()` is the signal that asked to stop, or None.

    A second Ctrl-C leaves at once with exit code 130; checkpoints are renamed into place, so the last one is intact.
    Where the process is not ours to end (`leaving` False), it does what it did before we came. A signal that was being
    ignored when we came (SIGHUP under nohup) stays ignored; in other threads than the main one, Python hears of none.
    """

    def __init__(self, *, leaving: bool = True) -> None:
        self._leaving = leaving
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __call__(self) -> signal.Signals | None:
        return self._received

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after any of the signals that schedulers send."""
        return 130 if self._received == signal.SIGINT else 143

    def __enter__(self) -> StopSignals:
        for name in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
            number = signal.Signals[name]
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            if not self._leaving:
                self._previous[signal.SIGINT](number, frame)
                return
            if sys.stderr is not None and sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # a progress bar may have hidden the cursor
            os._exit(130)
        self._received = signal.Signals(number)
