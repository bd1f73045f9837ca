"""One function, in as many processes as there are processors, with its results in the order of what it was given."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.files import WINDOWS

MOST_ON_WINDOWS = 61  # handles that it waits for at once
WAITING = 3  # items on their way for each process: a long one holds up the results, but not the others

Item = TypeVar("Item")
Result = TypeVar("Result")
_function: Callable[[Any], Any]  # of this process


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    make: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """`make()` of each item, in order. `make` is called once in each of `workers` processes; below two, right here.

    What the function raises is raised here, at its place in the order. Few items are on their way at a time. Ctrl-C is
    the caller's business, and where the caller dies, however that comes, the processes end too.
    """
    if workers < 2:
        yield from map(make(), items)
        return
    workers = min(workers, MOST_ON_WINDOWS) if WINDOWS else workers
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (make,))
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            with (
                _signals_held()
            ):  # processes are started by the first calls, and hold signals back as long as they live
                waiting.append(pool.submit(_call, item))
            if len(waiting) >= WAITING * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise MinigptError(
            "a worker process was killed, or could not start (out of memory?); run it again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _function
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where Ctrl-C goes to every process of the window
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one of as many as there are processors
    _function = make()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)


@contextmanager
def _signals_held() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
