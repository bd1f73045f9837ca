"""How a CUDA graph is recorded, without a GPU: which device, stream and mode, and what is left behind by a failure."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from minigpt_cli.core import runtime as runtime_module
from minigpt_cli.core.runtime import Runtime


class Cuda:
    """The part of torch.cuda that recording uses. Each thread has a current device, and on every device a stream.

    As in PyTorch, a capture that fails to end does not give its stream back: whoever entered it must.
    """

    def __init__(self, fails: str) -> None:
        self.fails = fails
        self.state = threading.local()
        self.captures: list[tuple[int, str, str]] = []  # device, stream, mode
        self.made: list[int] = []

    def current_device(self) -> int:
        return getattr(self.state, "device", 0)

    def current_stream(self, device: Any = None) -> str:
        return self.streams.get(self.current_device(), f"default of {self.current_device()}")

    @property
    def streams(self) -> dict[int, str]:
        return self.state.__dict__.setdefault("streams", {})

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.current_device()
        self.state.device = 0 if device.index is None else device.index
        try:
            yield
        finally:
            self.state.device = before

    @contextlib.contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        device, before = self.current_device(), self.current_stream()
        self.streams[device] = stream
        try:
            yield
        finally:
            self.streams[device] = before

    def Stream(self, device: int) -> str:  # noqa: N802 # torch's name
        self.made.append(device)
        return f"capture stream of {device}"

    class CUDAGraph:
        def replay(self) -> None: ...

    @contextlib.contextmanager
    def graph(self, graph: Any, *, stream: str, capture_error_mode: str) -> Iterator[None]:
        self.streams[self.current_device()] = stream
        if self.fails == "beginning":
            raise RuntimeError("cannot begin")
        self.captures.append((self.current_device(), self.current_stream(), capture_error_mode))
        yield  # a failure of the work comes out here, and the stream stays
        if self.fails == "ending":
            raise RuntimeError("cannot end")


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    fake = Cuda(getattr(request, "param", ""))
    for name in ("CUDAGraph", "Stream", "current_device", "current_stream", "device", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    runtime_module.capture_stream.cache_clear()
    yield fake
    runtime_module.capture_stream.cache_clear()


def recorded_on(name: str) -> Runtime:
    return Runtime(torch.device(name), "bf16", compile=False)


def test_a_recording_is_made_on_its_own_device_on_one_stream_that_is_kept(cuda: Cuda) -> None:
    for name in ("cuda:1", "cuda:1", "cuda:0"):
        replay = recorded_on(name).record(lambda: None)
        assert callable(replay)
        assert (cuda.current_device(), cuda.current_stream()) == (0, "default of 0")  # as it was
    assert cuda.captures == [
        (1, "capture stream of 1", "thread_local"), (1, "capture stream of 1", "thread_local"),
        (0, "capture stream of 0", "thread_local"),
    ]  # fmt: skip
    assert cuda.made == [1, 0]


@pytest.mark.parametrize("cuda", ["beginning", "ending", "work"], indirect=True)
def test_after_a_recording_that_fails_the_thread_is_where_it_was(cuda: Cuda) -> None:
    def work() -> None:
        if cuda.fails == "work":
            raise RuntimeError("a copy that waits")

    with pytest.raises(RuntimeError):
        recorded_on("cuda:1").record(work)
    assert cuda.current_device() == 0
    with cuda.device(torch.device("cuda:1")):
        assert cuda.current_stream() == "default of 1"


def test_another_thread_records_on_the_same_device(cuda: Cuda) -> None:
    """As the engine of `serve` does, whose current device nobody has set."""
    thread = threading.Thread(target=lambda: recorded_on("cuda:1").record(lambda: None))
    thread.start()
    thread.join()
    assert cuda.captures == [(1, "capture stream of 1", "thread_local")]
