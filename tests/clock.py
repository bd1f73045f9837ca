"""Time, as tests may ask for it: a machine may be busy with other work, and nothing may fail because of that.

So a test waits for what must happen (`wait_for`), patiently, and what must be quick is measured in CPU time.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

PATIENCE = 600.0  # seconds to wait for what takes one or two on an idle machine: only a hang takes longer


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE, every: float = 0.02) -> None:
    """Ask again and again. AssertionError where it does not become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(every)


def cpu_seconds(pid: int) -> float:
    """What a process that runs has computed so far, in all its threads."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def compute(pid: int, seconds: float) -> None:
    """Wait until a process has computed this much more: its own clock, which stands while others have the CPU."""
    until = cpu_seconds(pid) + seconds
    wait_for(lambda: cpu_seconds(pid) >= until, f"{seconds} s of its computing")


def cpu_seconds_of(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """What a command computes from its start to its end. It must succeed."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return used.ru_utime + used.ru_stime
