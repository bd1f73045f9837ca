"""The second thread: in order, bounded, and nothing that goes wrong in it is lost."""

from __future__ import annotations

import hashlib
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt_cli.core import background
from minigpt_cli.core.background import Sha256, Worker


def test_calls_run_in_order_and_in_another_thread() -> None:
    seen: list[tuple[int, threading.Thread]] = []

    def call(i: int) -> None:
        time.sleep(0.02 if i % 2 == 0 else 0)  # a second thread of the worker would overtake
        seen.append((i, threading.current_thread()))

    with Worker() as worker:
        for i in range(8):
            worker.start(call, i)
        worker.wait()
        assert not worker.busy
    assert [i for i, _ in seen] == list(range(8))
    assert len({threading.main_thread(), *(thread for _, thread in seen)}) == 2


def test_few_calls_wait() -> None:
    gate = threading.Event()
    with Worker() as worker:
        for _ in range(background.WAITING):
            worker.start(gate.wait)
        assert worker.busy
        late = threading.Timer(0.1, gate.set)
        late.start()
        worker.start(lambda: None)  # waits for the first to be done
        assert gate.is_set()
        late.join()


def test_what_a_call_raises_is_raised_here_once() -> None:
    with Worker() as worker:
        worker.start(int, "not a number")
        with pytest.raises(ValueError, match="not a number"):
            worker.wait()
        worker.wait()
        worker.start(int, "nor this")
        worker.start(int)
        with pytest.raises(ValueError, match="nor this"):
            worker.start(int)


def test_the_thread_ends_with_the_block_and_a_short_text_needs_none() -> None:
    before = threading.active_count()
    with Sha256() as digest:
        digest.update(b"short")
        assert digest.hexdigest() == hashlib.sha256(b"short").hexdigest()
        assert threading.active_count() == before
        digest.update(bytes(background.BATCH))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@given(st.lists(st.binary(max_size=40)), st.integers(1, 400))
def test_sha256_of_blocks_is_that_of_the_whole(blocks: list[bytes], batch: int) -> None:
    numbers = np.arange(100, dtype="<u2")
    whole = b"".join(blocks) + numbers.tobytes() + b"end"
    with pytest.MonkeyPatch.context() as patch, Sha256() as digest:
        patch.setattr(background, "BATCH", batch)
        for block in blocks:
            digest.update(block)
        digest.update(numbers.data)
        first = digest.hexdigest()
        digest.update(b"e")
        assert digest.hexdigest() == hashlib.sha256(whole[:-2]).hexdigest()
        digest.update(b"nd")
        assert (first, digest.hexdigest()) == (
            hashlib.sha256(whole[:-3]).hexdigest(),
            hashlib.sha256(whole).hexdigest(),
        )


def test_what_waits_to_be_hashed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "BATCH", 1000)
    batches: list[int] = []
    monkeypatch.setattr(Sha256, "_hash", lambda self, blocks: batches.append(sum(map(len, blocks))))
    with Sha256() as digest:
        for _ in range(100):
            digest.update(bytes(300))
        digest.hexdigest()
    assert batches == [1200] * 25 + [0]
