"""Continuous batching: texts are written side by side, and each begins and ends when it will (Orca, Yu et al. 2022).

One worker thread computes a token for every text, again and again. It knows no HTTP; whoever asked is woken when there
is something new. Shapes: B texts side by side, T places, V vocabulary.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.generate import (
    Record,
    RecordedStep,
    Sampling,
    cache_dtype,
    choose,
    step_at,
    thread_numbers,
)
from minigpt_cli.core.layers import KVCache
from minigpt_cli.core.model import GPT
from minigpt_cli.core.runtime import ThreadChoice, first_line
from minigpt_cli.extras.serve.stream import Order, Stream, Wake


class Busy(MinigptError):
    """There is no room in the queue now."""


class Stopping(MinigptError):
    """The server is about to end."""


class Engine:
    """`submit` texts, from any thread. At most `slots` are computed at a time, and at most `queue` wait."""

    def __init__(
        self, model: GPT, pieces: Sequence[bytes], *, slots: int, queue: int, record: Record | None = None,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:  # fmt: skip
        weight = model.token_embedding.weight
        self.model, self.slots, self.queue = model.eval(), slots, queue
        self._pieces, self._record, self._note = pieces, record, note
        self._device, self._dtype = weight.device, cache_dtype(model, 1)
        self._cache = KVCache(slots, model.config, self._device, self._dtype)
        self._rows = [self._cache.streams(i, 1) for i in range(slots)]
        self._first = [self._cache.streams(0, n) for n in range(1, slots + 1)]
        self._recorded: dict[int, RecordedStep] = {}  # number of streams -> the step
        self._generator = torch.Generator(self._device)
        self._generator.seed()
        self._batch: list[Stream] = []  # the i-th has row i of the cache
        self._alone: list[Stream] = []  # each has a cache of its own
        self._waiting: deque[Stream] = deque()
        self._changed = threading.Condition()
        self._stopping = self._closed = False
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    @property
    def running(self) -> int:
        return len(self._batch) + len(self._alone)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def submit(self, orders: Sequence[Order], wake: Wake) -> list[Stream]:
        """All of them or, where the queue has not the room, none: then Busy. `wake` is called from the worker."""
        streams = [Stream(order, self._pieces, self.model.config.block_size, wake) for order in orders]
        with self._changed:
            if self._stopping:
                raise Stopping("the server is stopping")
            if self.running + self.waiting + len(streams) > self.slots + self.queue:
                raise Busy(f"{self.running + self.waiting} texts are being written or wait already")
            self._waiting.extend(streams)
            self._changed.notify()
        return streams

    def cancel(self, streams: Sequence[Stream]) -> None:
        """Nobody reads these any more: whoever waits takes their place at the next step."""
        with self._changed:
            for stream in streams:
                stream.cancelled = True
            self._waiting = deque(stream for stream in self._waiting if not stream.cancelled)

    def refuse(self) -> None:
        """Take nothing new; what runs or waits goes on."""
        self._stopping = True

    def close(self) -> None:
        """End whatever still runs, and the worker."""
        with self._changed:
            self._stopping = self._closed = True
            self._changed.notify()
        self._worker.join()

    def _work(self) -> None:
        many = (1, torch.get_num_threads())
        self._threads = [ThreadChoice(many if n > 1 else thread_numbers(self.model, 1)) for n in range(self.slots + 1)]
        with torch.inference_mode():
            while self._wait_for_work():
                try:
                    self._admit()
                    self._step()
                except Exception as error:  # out of memory, say: that ends these texts, not the server
                    self._note(f"a step failed: {first_line(error)}")
                    self._end_all(MinigptError(f"computing failed: {first_line(error)}"))
            self._end_all(Stopping("the server is stopping"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._closed or self._waiting or self.running):
                self._changed.wait()
        return not self._closed

    def _admit(self) -> None:
        """Free what was cancelled, and give what is free to those who wait longest."""
        for stream in [s for s in (*self._batch, *self._alone) if s.cancelled]:
            self._remove(stream)
        with self._changed:
            while self._waiting and self.running < self.slots:
                stream = self._waiting.popleft()
                if stream.order.seed is None:
                    self._batch.append(stream)
                    stream.cache = self._rows[len(self._batch) - 1]
                    stream.cache.clear()
                else:
                    self._alone.append(stream)
                    stream.generator = torch.Generator(self._device).manual_seed(stream.order.seed)

    def _step(self) -> None:
        """One token more for every text."""
        together = len(self._batch) > 1 or self._record is not None
        for stream in list(self._alone) if together else [*self._alone, *self._batch]:
            self._step_alone(stream)
        if self._batch and together:
            self._step_together(list(self._batch))

    def _step_alone(self, stream: Stream) -> None:
        """As `generate` does it, bit for bit."""
        if stream.cache is None:
            stream.cache = KVCache(1, self.model.config, self._device, self._dtype)
        cache, single = stream.make_room(self.model), len(stream.pending) == 1
        logits_TV = self._forward(stream.pending, cache, single)
        stream.score_prompt(logits_TV[:-1])
        self._write([stream], logits_TV[-1:])

    def _step_together(self, streams: list[Stream]) -> None:
        """The last token of each in one step of the model, after whatever comes before it: a prompt, or a refill."""
        caches = [stream.make_room(self.model) for stream in streams]
        for stream, cache in zip(streams, caches, strict=True):
            if len(stream.pending) > 1:
                stream.score_prompt(self._forward(stream.pending[:-1], cache, single=False))
        ids_B1 = torch.tensor([stream.pending[-1:] for stream in streams], device=self._device)
        lengths = [cache.length for cache in caches]
        with self._threads[len(streams)]:
            logits_BV = self._together(ids_B1, lengths)
        for cache in caches:
            cache.length += 1
        self._write(streams, logits_BV)

    def _forward(self, ids: list[int], cache: KVCache, single: bool) -> Tensor:
        """Logits (T, V) of one text's next tokens."""
        ids_1T = torch.tensor([ids], device=self._device)
        with self._threads[1] if single else contextlib.nullcontext():
            return self.model(ids_1T, cache)[0]

    def _together(self, ids_B1: Tensor, lengths: list[int]) -> Tensor:
        """Logits (B, V) of one token more for the texts in the cache's first rows; recorded, where that is possible."""
        n = len(lengths)
        if self._record is not None:
            padded = min(self.slots, 1 << (n - 1).bit_length())  # rows that nobody uses make up the number
            try:
                if padded not in self._recorded:
                    self._recorded[padded] = RecordedStep(self.model, self._first[padded - 1], padded, self._record)
                unused = padded - n
                return self._recorded[padded](F.pad(ids_B1, (0, 0, 0, unused)), [*lengths, *[0] * unused])[:n]
            except RuntimeError as error:
                self._record = None
                self._note(f"CUDA graph: failed, going on without it ({first_line(error)})")
        reach = min(self.model.config.block_size, max(lengths) + 1)
        position_B = torch.tensor(lengths, device=self._device)
        return step_at(self.model, self._first[n - 1], ids_B1, position_B, reach)

    def _write(self, streams: list[Stream], logits_BV: Tensor) -> None:
        """Choose a token for each, and take those that are done out."""
        logits_BV = logits_BV.float()
        finite = torch.isfinite(logits_BV).all(dim=-1).tolist()
        for i, token in enumerate(self._choose(streams, logits_BV)):
            if finite[i]:
                streams[i].write(token, logits_BV[i])
            else:
                streams[i].end(MinigptError("the model's output is not finite: its weights are damaged"))
        for stream in streams:
            if stream.done:
                self._remove(stream)
        for wake in {s.wake for s in streams if s.done or (s.order.partial and s.pieces)}:
            wake()

    def _choose(self, streams: list[Stream], logits_BV: Tensor) -> list[int]:
        """An id for each. Texts that are sampled alike draw together; one with a seed, which comes alone, by itself."""
        alike = defaultdict[Sampling, list[int]](list)
        for i, stream in enumerate(streams):
            alike[stream.order.sampling].append(i)
        ids = [0] * len(streams)
        for sampling, rows in alike.items():
            logits = logits_BV if len(alike) == 1 else logits_BV[rows]
            chosen = choose(logits, sampling, streams[rows[0]].generator or self._generator)
            for i, token in zip(rows, chosen.tolist(), strict=True):
                ids[i] = token
        return ids

    def _remove(self, stream: Stream) -> None:
        """Forget a text. The last row of the cache moves into its place: rows in use lie side by side."""
        if stream in self._alone:
            self._alone.remove(stream)
            return
        hole, last = self._batch.index(stream), self._batch.pop()
        if last is not stream and last.cache is not None:
            for into, layer in zip(self._rows[hole].layers, last.cache.layers, strict=True):
                into.k_BHSD.copy_(layer.k_BHSD)
                into.v_BHSD.copy_(layer.v_BHSD)
            self._rows[hole].length = last.cache.length
            self._batch[hole], last.cache = last, self._rows[hole]

    def _end_all(self, error: MinigptError) -> None:
        with self._changed:
            streams = [*self._batch, *self._alone, *self._waiting]
            for group in (self._batch, self._alone, self._waiting):
                group.clear()
        for stream in streams:
            stream.end(error)
            stream.wake()
