"""From a prompt to more tokens: prefill, decode with the cache, choose. Knows ids, not text.

Shapes: B samples side by side, P prompt, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.layers import KVCache, Place, compute_dtype
from minigpt_cli.core.model import GPT
from minigpt_cli.core.native import NativeStep
from minigpt_cli.core.runtime import DTYPES, Runtime, ThreadChoice, first_line

Record = Callable[[Callable[[], None]], Callable[[], None]]  # work -> what does that work again

CHECK_EVERY = 32  # tokens, on a GPU: until then nobody waits for it
ONE_THREAD_PARAMETERS = 32_000_000  # up to here one CPU thread decodes a float32 stream about as fast as several
GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing by it would overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_k` and `top_p` cut the tail before drawing."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def generate(
    model: GPT, prompt_BP: Tensor, n_tokens: int, sampling: Sampling, *,
    generator: torch.Generator | None = None, exact_window: bool = False,
    record: Record | None = None, note: Callable[[str], None] = lambda message: None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield `n_tokens` times (ids (B,), the logits (B, V) they were chosen from), extending `prompt_BP` (P >= 1).

    Only the newest `block_size` tokens of a longer prompt count. Past the window, rotary models slide: each new token
    takes the oldest's place in the cache, whose keys and values still know of what came before them. Learned positions
    cannot slide: the newest half is kept and prefilled again. `exact_window` instead recomputes the newest `block_size`
    tokens for every token, as the seed does: slower, and each token sees exactly the longest context it can.

    What is yielded stays on the device, and nothing here waits for a GPU except, now and then, to see that all is well:
    raises MinigptError when logits are not finite, on a GPU up to `CHECK_EVERY` tokens late. `record` makes work
    replayable (`Runtime.record`); where that fails, `note` is told and decoding goes on without.
    """
    model.eval()
    window = model.config.block_size
    weight = model.token_embedding.weight
    inference = torch.inference_mode()
    with inference:
        streams = prompt_BP.shape[0]
        cache = KVCache(streams, model.config, weight.device, cache_dtype(model, streams))
        total = torch.zeros((), device=weight.device)  # of all logits so far, on a GPU: finite if they are
        recorded = RecordedStep(model, cache, prompt_BP.shape[0], record) if record else None
    new_BT = prompt_BP[:, -window:]
    context = deque(new_BT.split(1, dim=1), maxlen=window)  # the newest tokens, one (B, 1) each
    threads = ThreadChoice(thread_numbers(model, prompt_BP.shape[0]))
    for n in range(1, n_tokens + 1):
        with inference:
            if cache.length + new_BT.shape[1] > window and (exact_window or not model.slides):
                cache.clear()
                kept = window if exact_window else max(1, window // 2)
                new_BT = torch.cat(list(context)[-kept:], dim=1)
            single = new_BT.shape[1] == 1
            logits_BV = None
            if recorded and single:
                try:
                    logits_BV = recorded(new_BT)
                except RuntimeError as error:
                    recorded = None
                    note(f"CUDA graph: failed, going on without it ({first_line(error)})")
            if logits_BV is None:
                with threads if single else contextlib.nullcontext():
                    logits_BV = model(new_BT, cache)[:, -1].float()
            total = logits_BV.sum() if weight.is_cpu else total + logits_BV.sum()
            if (weight.is_cpu or n % CHECK_EVERY == 0 or n == n_tokens) and not math.isfinite(total):
                raise MinigptError("the model's output is not finite: its weights are damaged, or training diverged")
            ids_B = choose(logits_BV, sampling, generator)
            new_BT = ids_B[:, None]
            context.append(new_BT)
        yield ids_B, logits_BV


def read_back(steps: Iterator[tuple[Tensor, Tensor]], every: int) -> Iterator[list[int]]:
    """The ids of each step of `generate` as numbers, B of them. The host waits for the device once in `every` steps."""
    if every == 1:
        yield from (ids_B.tolist() for ids_B, _ in steps)
        return
    waiting: list[Tensor] = []
    for ids_B, _ in steps:
        waiting.append(ids_B)
        if len(waiting) == every:
            yield from torch.stack(waiting).tolist()
            waiting = []
    if waiting:
        yield from torch.stack(waiting).tolist()


class RecordedStep:
    """One token more for each stream, as work on tensors that stay in place, which a GPU replays by itself.

    Attention looks at the cache's first 64, 128, 256, ... slots, with a recording for each, but not at empty ones. The
    first token of each is computed without: libraries prepare themselves at a first call, which must not be recorded.
    """

    def __init__(self, model: GPT, cache: KVCache, streams: int, record: Record) -> None:
        device = model.token_embedding.weight.device
        self.model, self.cache, self.record = model, cache, record
        self.ids_B1 = torch.zeros(streams, 1, dtype=torch.long, device=device)
        self.position_B = torch.zeros(streams, dtype=torch.long, device=device)
        self.logits_BV = torch.zeros(streams, model.vocab_size, device=device)
        self.replays: dict[int, Callable[[], None]] = {}
        self.warm: set[int] = set()

    def __call__(self, ids_B1: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """What the model makes of these ids: logits (B, V). The cache grows by one token.

        `lengths`, one for each stream, count instead of the cache's own where the streams differ in length.
        """
        longest = self.cache.length if lengths is None else max(lengths)
        reach = min(self.model.config.block_size, max(64, 1 << longest.bit_length()))
        if reach in self.warm and reach not in self.replays:
            self.replays[reach] = self.record(lambda: self._work(reach))
        self.ids_B1.copy_(ids_B1)
        if lengths is None:
            self.position_B.fill_(longest)
        else:
            self.position_B.copy_(torch.tensor(lengths))
        self.replays.get(reach, lambda: self._work(reach))()
        self.warm.add(reach)
        self.cache.length += 1
        return self.logits_BV.clone()

    def _work(self, reach: int) -> None:
        self.logits_BV.copy_(step_at(self.model, self.cache, self.ids_B1, self.position_B, reach))


def step_at(model: GPT, cache: KVCache, ids_B1: Tensor, position_B: Tensor, reach: int) -> Tensor:
    """Logits (B, V) after one more token of each stream, which comes to `position_B` of its own. Device code only.

    Attention looks at the cache's first `reach` slots. Streams may differ in length; `cache.length` does not matter.
    """
    cache.place = Place.of(position_B, cache, reach)
    try:
        return model(ids_B1, cache)[:, -1]
    finally:
        cache.place = None


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One id per row, (B,), from softmax(logits / temperature) after top-k and top-p (nucleus: arXiv:1904.09751).

    Plain device code: nothing is read back, so nothing is checked. Logits must be finite.
    """
    if sampling.temperature < GREEDY_BELOW:
        return logits_BV.argmax(dim=-1)
    if sampling.temperature != 1:
        logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        weakest = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < weakest, float("-inf"))
    probs_BV = logits_BV.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        beyond = sorted_BV.cumsum(dim=-1) - sorted_BV >= sampling.top_p  # never true of the likeliest
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(beyond, 0.0))
    # The first of several clocks to ring, each at its own rate: torch.multinomial's draws, without its checks.
    return (probs_BV / torch.empty_like(probs_BV).exponential_(generator=generator)).argmax(dim=-1)


def for_decoding(model: GPT, runtime: Runtime) -> GPT:
    """Change `model` in place to what decodes fastest in the precision of `runtime`, and return it. Not to be trained.

    Weights are cast once, not at every token; on a CPU single tokens are left to `decode.c`, if it could be compiled.
    Where that reads bf16 and prompts take float32, both are kept: 6 bytes a parameter instead of 4.
    """
    if runtime.precision != "fp32":
        model.to(DTYPES[runtime.precision])
    if runtime.compile and runtime.device.type == "cpu":
        model.native = NativeStep(model, DTYPES[runtime.decoding])
    return model


def cache_dtype(model: GPT, streams: int) -> torch.dtype:
    """Of keys and values: as `decode.c` reads them, where it takes so many streams; else as products are computed."""
    native = model.native
    if isinstance(native, NativeStep) and native.takes(streams):
        return native.dtype
    return compute_dtype(model.token_embedding.weight)


def thread_numbers(model: GPT, streams: int) -> Sequence[int]:
    """With which numbers of CPU threads a single token may be computed: that must not change what comes out."""
    every = torch.get_num_threads()
    if isinstance(model.native, NativeStep) and model.native.takes(streams):
        return (1, every)
    if not model.token_embedding.weight.is_cpu or streams > 1:
        return (every,)
    return (1,) if sum(p.numel() for p in model.parameters()) <= ONE_THREAD_PARAMETERS else (every,)
