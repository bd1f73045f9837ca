"""Scores and baselines against loops that anyone can check."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt_cli.core import evaluate as evaluate_module
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.evaluate import baselines, evaluate, text_size
from minigpt_cli.core.model import GPT
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.tokenizer import from_json
from runs import CPU

V = 11


def model(block_size: int = 8) -> GPT:
    torch.manual_seed(3)
    built = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=block_size), V)
    for parameter in built.parameters():
        parameter.data.mul_(4)  # far from uniform
    return built


def tokens(n: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, V, n).astype(np.uint16)


@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 100, 1001])
def test_every_token_but_the_first_is_scored_once(n: int) -> None:
    ids, net = tokens(n), model().eval()
    losses, hits = [], 0
    for target in range(1, n):  # window by window, position by position
        begin = (target - 1) // 8 * 8
        with torch.no_grad():
            logits = net(torch.from_numpy(ids[None, begin:target].astype(np.int64)))[0, -1]
        losses.append(-logits.log_softmax(-1)[int(ids[target])].item())
        hits += int(logits.argmax()) == ids[target]
    score = evaluate(net, ids, CPU)
    assert score is not None
    assert score.tokens == n - 1
    assert score.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert score.accuracy == pytest.approx(hits / (n - 1))
    assert score.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_the_standard_error_is_that_of_the_mean_over_windows() -> None:
    """With windows of one length it is the textbook's: deviation of the window means over the root of their number."""
    ids, net = tokens(40 * 8 + 1), model()
    score = evaluate(net, ids, CPU)
    means = []
    for begin in range(0, 40 * 8, 8):
        part = evaluate(net, ids[begin : begin + 9], CPU)
        assert part is not None
        means.append(part.loss)
    assert score is not None
    assert score.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(40), rel=1e-5)


def test_evaluating_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    net = model().train()
    state = torch.get_rng_state()
    evaluate(net, tokens(100), CPU)
    assert net.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())


def test_it_can_be_interrupted_and_says_how_far_it_is() -> None:
    calls: list[tuple[int, int]] = []
    assert evaluate(model(), tokens(100), CPU, stop=lambda: True) is None
    assert evaluate(model(), tokens(100), CPU, progress=lambda *p: calls.append(p)) is not None
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("n", [0, 1])
def test_too_little_to_score_is_the_users_mistake(n: int) -> None:
    with pytest.raises(UserError, match="at least 2"):
        evaluate(model(), tokens(n), CPU)


@given(text=st.text(min_size=1, max_size=60))
def test_characters_and_bytes_are_those_of_the_text_after_the_first_token(text: str) -> None:
    chars = from_json({"kind": "char", "chars": "".join(sorted(set(text)))})
    assert text_size(chars.encode(text), chars) == (len(text) - 1, len(text[1:].encode()))
    as_bytes = from_json({"kind": "byte"})
    n_bytes = len(text.encode())
    first_is_whole = len(text[0].encode()) == 1  # a character counts with its first byte
    assert text_size(as_bytes.encode(text), as_bytes) == (len(text) - 1, n_bytes - 1) or not first_is_whole


def naive_baselines(train: list[int], val: list[int], vocab: int) -> dict[str, float]:
    ones, pairs, firsts = Counter(train), Counter(itertools.pairwise(train)), Counter(train[:-1])
    p1 = {t: (ones[t] + 1) / (len(train) + vocab) for t in range(vocab)}
    bigram = [-math.log((pairs[a, b] + p1[b]) / (firsts[a] + 1)) for a, b in itertools.pairwise(val)]
    return {
        "uniform": math.log(vocab),
        "unigram": sum(-math.log(p1[t]) for t in val[1:]) / (len(val) - 1),
        "bigram": sum(bigram) / len(bigram),
    }


@pytest.mark.parametrize("vocab", [V, 5000], ids=["table of pairs", "list of pairs"])
def test_baselines_are_those_of_plain_counting(vocab: int) -> None:
    generator = np.random.default_rng(1)
    train = (generator.zipf(1.5, 3000) % vocab).astype(np.uint16)
    val = (generator.zipf(1.5, 400) % vocab).astype(np.uint16)
    assert baselines(train, val, vocab) == pytest.approx(naive_baselines(train.tolist(), val.tolist(), vocab))


def test_bigram_probabilities_sum_to_one() -> None:
    train = tokens(500)
    total = sum(math.exp(-baselines(train, np.array([3, b], np.uint16), V)["bigram"]) for b in range(V))
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize(("gigabytes", "rows"), [(None, 1), (4, 1), (16, 1), (24, 2), (80, 9), (1000, 16)])
def test_a_gpu_evaluates_as_many_windows_at_once_as_its_memory_allows(gigabytes: int | None, rows: int) -> None:
    """GPT-2's vocabulary and context: 51 million logits a window, 10 bytes each; at most 16,384 tokens."""
    runtime = replace(CPU)
    memory = property(lambda self: gigabytes and gigabytes * 10**9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "memory_bytes", memory)
        at_once = evaluate_module._logits_at_once(runtime)
    windows = evaluate_module._windows(np.zeros(20 * 1024 + 1, np.uint16), 1024, 50257, at_once)
    assert len(windows[0][0]) == rows
    assert sum(len(x) for x, _ in windows) == 20
