"""Texts written side by side: each is what it would be alone, whoever comes, goes or waits beside it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from clock import wait_for
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.generate import Sampling, for_decoding, generate
from minigpt_cli.core.model import GPT
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.extras.serve.engine import Busy, Engine, Stopping
from minigpt_cli.extras.serve.stream import Order, Stream
from runs import varied_model

V = 40
PIECES = [chr(0x61 + i).encode() for i in range(V)]  # ASCII, and then some of two bytes
GREEDY = Sampling(0.0)
Tiny = Callable[..., ModelConfig]
OPTIONS = [
    {}, {"position": "rope", "qk_norm": True, "n_kv_head": 2}, {"position": "none", "n_kv_head": 1}, {"n_layer": 0},
]  # fmt: skip


make = partial(varied_model, vocab_size=V, by=0.4)


@contextmanager
def running(model: GPT, slots: int = 4, queue: int = 8, **more: Any) -> Iterator[Engine]:
    engine = Engine(model, PIECES, slots=slots, queue=queue, **more)
    try:
        yield engine
    finally:
        engine.close()


def submit(engine: Engine, *orders: Order) -> list[Stream]:
    return engine.submit(orders, lambda: None)


def until(condition: Callable[[], object]) -> None:
    wait_for(condition, "the engine", every=0.001)


def texts(streams: list[Stream]) -> list[str]:
    until(lambda: all(stream.done for stream in streams))
    for stream in streams:
        if stream.error:
            raise stream.error
    return ["".join(piece.text for piece in stream.pieces) for stream in streams]


def alone(model: GPT, prompt: list[int], n: int, sampling: Sampling = GREEDY, seed: int = 0) -> str:
    steps = generate(model, torch.tensor([prompt]), n, sampling, generator=torch.Generator().manual_seed(seed))
    return b"".join(PIECES[int(ids)] for ids, _ in steps).decode()


def test_a_text_ends_with_its_document(tiny: Tiny) -> None:
    with running(make(tiny())) as engine:
        [whole] = submit(engine, Order([3], 9, GREEDY, logprobs=0))
        until(lambda: whole.done)
        tokens = [scored.token for piece in whole.pieces for scored in piece.tokens]
        end = tokens[4]
        [ended] = submit(engine, Order([3], 9, GREEDY, end_of_text=end))
        until(lambda: ended.done)
    assert ended.written == tokens.index(end) + 1
    assert ended.pieces[-1].finish == "stop"


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_greedy_texts_of_any_lengths_are_those_of_generate(
    options: dict[str, object], recorded: bool, tiny: Tiny
) -> None:
    """Seven in three slots, some past the window of 12 (a refill, or a cache that slides), some with longer prompts."""
    model = make(tiny(n_head=4, block_size=12, **options))
    prompts = [torch.randint(V, (length,)).tolist() for length in (1, 3, 12, 30, 2, 5, 1)]
    lengths = [30, 5, 40, 17, 1, 26, 60]
    with running(model, slots=3, record=(lambda work: work) if recorded else None) as engine:
        orders = [Order(prompt, n, GREEDY) for prompt, n in zip(prompts, lengths, strict=True)]
        found = texts(submit(engine, *orders))
    assert found == [alone(model, prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("precision", "single"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")])
def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(
    precision: str, single: str, native: bool, tiny: Tiny
) -> None:
    """And that of `generate`, bit for bit: in bf16, too, where a batch is rounded otherwise than one text."""
    if native and shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    runtime = Runtime(torch.device("cpu"), precision, compile=native, decode_precision=single)
    model = for_decoding(make(tiny(n_embd=64, position="rope")), runtime)
    sampling = Sampling(0.9, top_k=20, top_p=0.95)
    order = Order([3, 1, 4], 60, sampling, seed=11)
    others = [Order([i], 15 + 9 * i, Sampling(1.0 + i / 10)) for i in range(6)]
    with running(model, slots=5, queue=20) as engine:
        (quiet,) = texts(submit(engine, order))
        (among, *_, twin) = texts(submit(engine, order, *others, Order([2], 9, sampling, seed=5), order))
    assert quiet == among == twin == alone(model, [3, 1, 4], 60, sampling, seed=11)


def test_texts_without_a_seed_differ_and_follow_their_own_settings(tiny: Tiny) -> None:
    model = make(tiny())
    wild, narrow = Order([1], 40, Sampling(1.0)), Order([1], 40, Sampling(1.0, top_k=1))
    with running(model, slots=8) as engine:
        found = texts(submit(engine, wild, narrow, wild, narrow, wild))
    assert found[1] == found[3] == alone(model, [1], 40)
    assert len({found[0], found[2], found[4]}) == 3


def test_several_are_computed_in_one_step_of_the_model(tiny: Tiny) -> None:
    model, seen = make(tiny(block_size=64)), []
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2])))
    with running(model) as engine:
        texts(submit(engine, *[Order([1, 2], 20, GREEDY)] * 4))
    assert seen == [(1, 1)] * 4 + [(4, 1)] * 20  # the prompts but for their last tokens; then all of them


def test_whoever_waits_takes_the_place_of_what_is_cancelled(tiny: Tiny) -> None:
    model = make(tiny())
    with running(model, slots=2, queue=2) as engine:
        endless = submit(engine, Order([1], 10**9, GREEDY), Order([2], 10**9, GREEDY, seed=1))
        until(lambda: all(stream.written > 3 for stream in endless))
        waiting = submit(engine, Order([3], 20, GREEDY), Order([4], 20, GREEDY))
        assert (engine.running, engine.waiting) == (2, 2)
        with pytest.raises(Busy, match="4 texts"):
            submit(engine, Order([5], 20, GREEDY))
        engine.cancel([waiting[1]])
        assert (engine.running, engine.waiting) == (2, 1)
        engine.cancel([endless[0]])
        assert texts([waiting[0]]) == [alone(model, [3], 20)]
        until(lambda: (engine.running, engine.waiting) == (1, 0))
        engine.cancel([endless[1]])
        until(lambda: engine.running == 0)
        assert not any(stream.done for stream in (*endless, waiting[1]))


def test_nobody_is_woken_before_there_is_something_that_they_want(tiny: Tiny) -> None:
    model, woken = make(tiny()), {"each": 0, "end": 0}

    def waker(name: str) -> Callable[[], None]:
        def wake() -> None:
            woken[name] += 1

        return wake

    with running(model) as engine:
        (end,) = engine.submit([Order([1], 20, GREEDY)], waker("end"))
        (each,) = engine.submit([Order([1], 20, GREEDY, partial=True)], waker("each"))
        texts([end, each])
    assert woken == {"each": 20, "end": 1}


def test_log_probabilities_are_those_of_the_uncached_model(tiny: Tiny) -> None:
    """Of the prompt and of the text, alone and side by side, before temperature and cuts."""
    model = make(tiny(block_size=32))
    prompt = [5, 6, 7, 8]
    order = Order(prompt, 10, Sampling(0.5, top_k=3), logprobs=4, score_prompt=True)
    scored_only = Order(prompt, 0, GREEDY, logprobs=4, score_prompt=True)
    with running(model) as engine:
        streams = submit(engine, order, order, scored_only, Order(prompt, 10, GREEDY, logprobs=4, seed=1))
        texts(streams)
    for stream in streams:
        tokens = [token for piece in stream.pieces for token in piece.tokens]
        ids = prompt + [token.token for token in tokens]
        log_probs_TV = model(torch.tensor([ids]))[0].detach().log_softmax(dim=-1)
        scores = [*stream.prompt_scores, *((t.logprob, t.likeliest) for t in tokens)]
        first = 1 if stream.prompt_scores else len(prompt)
        assert len(scores) == len(ids) - first
        for at, (logprob, likeliest) in enumerate(scores, first):
            expected = log_probs_TV[at - 1]
            assert logprob == pytest.approx(float(expected[ids[at]]), abs=1e-4)
            assert [p for _, p in likeliest] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)
            assert [i for i, _ in likeliest] == expected.topk(4).indices.tolist()
    assert streams[2].pieces[0].finish == "length"
    assert streams[2].written == 0


@pytest.mark.parametrize("stop_at", [3, 7])
def test_at_a_stop_text_neither_it_nor_its_tokens_are_told(stop_at: int, tiny: Tiny) -> None:
    model = make(tiny(block_size=32))
    whole = alone(model, [9], 20)
    stop = whole[stop_at : stop_at + 3]
    expected = whole[: whole.index(stop)]
    with running(model) as engine:
        (stream,) = submit(engine, Order([9], 20, GREEDY, stops=["~never", stop], logprobs=0))
        assert texts([stream]) == [expected]
    assert stream.pieces[-1].finish == "stop"
    tokens = [token for piece in stream.pieces for token in piece.tokens]
    assert [PIECES[token.token].decode() for token in tokens] == list(expected)
    assert [token.offset for token in tokens] == list(range(len(expected)))
    assert stream.written == len(expected) + 3


def test_weights_that_give_no_numbers_end_a_text_and_not_the_engine(tiny: Tiny) -> None:
    model = make(tiny(n_layer=0))
    with torch.no_grad():
        model.token_embedding.weight[7] = float("nan")
    with running(model) as engine:
        bad, good = submit(engine, Order([7], 5, GREEDY), Order([1], 5, Sampling(1.0)))
        until(lambda: bad.done)
        with pytest.raises(MinigptError, match="not finite"):
            texts([bad])
        model.token_embedding.weight.data[7] = 0
        texts([*submit(engine, Order([7], 5, GREEDY))])
        until(lambda: good.done)


def test_a_step_that_fails_ends_its_texts_and_says_so_and_the_next_goes_on(tiny: Tiny) -> None:
    model, notes, broken = make(tiny()), [], threading.Event()
    broken.set()

    def fail(*_: object) -> None:
        if broken.is_set():
            raise RuntimeError("not enough memory\nmore")

    model.head.register_forward_pre_hook(fail)
    with running(model, note=notes.append) as engine:
        (stream,) = submit(engine, Order([1], 5, GREEDY))
        with pytest.raises(MinigptError, match=r"computing failed: not enough memory$"):
            texts([stream])
        broken.clear()
        assert texts(submit(engine, Order([1], 5, GREEDY))) == [alone(model, [1], 5)]
    assert notes == ["a step failed: not enough memory"]


def test_where_recording_fails_the_engine_goes_on_and_says_so(tiny: Tiny) -> None:
    model, notes = make(tiny()), []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted")

    with running(model, record=record, note=notes.append) as engine:
        assert texts(submit(engine, *[Order([1], 20, GREEDY)] * 2)) == [alone(model, [1], 20)] * 2
    assert notes == ["CUDA graph: failed, going on without it (operation not permitted)"]


def test_told_to_stop_it_takes_nothing_new_and_closing_ends_what_runs(tiny: Tiny) -> None:
    with running(make(tiny()), slots=1) as engine:
        streams = submit(engine, *[Order([1], 10**9, GREEDY)] * 2)
        until(lambda: streams[0].written)
        engine.refuse()
        with pytest.raises(Stopping):
            submit(engine, Order([1], 1, GREEDY))
        seen = streams[0].written
        until(lambda: streams[0].written > seen)
        engine.close()
        for stream in streams:
            assert stream.done
            assert isinstance(stream.error, Stopping)
