"""A second thread for work that lets go of the interpreter lock: files, hashing, NumPy. Knows not what it is for."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

WAITING = 2  # calls on their way: one that runs, and one for when it is done, or both threads wait by turns
BATCH = 4 << 20  # bytes hashed at a time: on a busy machine each handing over costs a wait for the processor

Self = TypeVar("Self", bound="Worker")


class Worker:
    """Calls functions in a second thread, in order, for their effects. What one raises, `start` or `wait` raises here.

    Few calls are on their way at a time, which bounds the memory that their arguments hold.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)  # makes its thread at the first call
        self._calls: deque[Future[Any]] = deque()

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.wait(WAITING - 1)
        self._calls.append(self._pool.submit(function, *arguments))

    def wait(self, left: int = 0) -> None:
        """Until at most `left` calls are on their way."""
        while len(self._calls) > left:
            self._calls.popleft().result()

    @property
    def busy(self) -> bool:
        return any(not call.done() for call in self._calls)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()


class Sha256(Worker):
    """The sha256 of all it is given, computed while the caller goes on. What it is given must not change afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._digest = hashlib.sha256()
        self._blocks: list[bytes | memoryview] = []
        self._size = 0  # bytes in them

    def update(self, data: bytes | memoryview) -> None:
        self._blocks.append(data)
        self._size += memoryview(data).nbytes
        if self._size >= BATCH:
            self.start(self._hash, self._blocks)
            self._blocks, self._size = [], 0

    def hexdigest(self) -> str:
        self.wait()
        self._hash(self._blocks)
        self._blocks, self._size = [], 0
        return self._digest.hexdigest()

    def _hash(self, blocks: list[bytes | memoryview]) -> None:
        for block in blocks:
            self._digest.update(block)
