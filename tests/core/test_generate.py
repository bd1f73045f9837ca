"""Generation: greedy is the argmax, both ways past the window are as documented, and draws follow the distribution."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.generate import RecordedStep, Sampling, choose, for_decoding, generate, read_back, step_at
from minigpt_cli.core.layers import KVCache
from minigpt_cli.core.model import GPT
from minigpt_cli.core.runtime import Runtime
from oracle.generate import crop_and_recompute, keep_half_and_recompute
from oracle.weights import naive_twin
from runs import cpu_threads, varied_model

Tiny = Callable[..., ModelConfig]
V = 11
BF16 = Runtime(torch.device("cpu"), "bf16", compile=False)
GREEDY = Sampling(temperature=0.0)


make = partial(varied_model, vocab_size=V, by=0.4)


def ids_of(model: GPT, prompt: Tensor, n: int, sampling: Sampling = GREEDY, **options: object) -> Tensor:
    """(B, n) generated ids."""
    return torch.stack([ids for ids, _ in generate(model, prompt, n, sampling, **options)], dim=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("exact", [False, True])
def test_greedy_within_the_window_is_the_argmax_of_recomputed_logits(exact: bool, tiny: Tiny) -> None:
    model = make(tiny(block_size=16))
    ids = torch.randint(V, (2, 3))
    for chosen, logits in generate(model, ids, 13, GREEDY, exact_window=exact):
        expected = model(ids)[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(chosen, expected.argmax(dim=-1))
        ids = torch.cat([ids, chosen[:, None]], dim=1)
    assert ids.shape == (2, 16)
    assert ids[:, 3:].unique().numel() > 2


@pytest.mark.parametrize("options", [{}, {"position": "none", "norm": "none", "n_layer": 1}, {"n_layer": 0}], ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("prompt_length", [1, 4, 20])
def test_past_the_window_the_newest_half_is_kept(
    prompt_length: int, block_size: int, options: dict[str, object], tiny: Tiny
) -> None:
    """For several windows, against an oracle that keeps the same half and recomputes everything."""
    model = make(tiny(block_size=block_size, **options))
    prompt = torch.randint(V, (1, prompt_length))
    ids, logits = keep_half_and_recompute(naive_twin(model), prompt[0].tolist(), 30, block_size)
    steps = list(generate(model, prompt, 30, GREEDY))
    torch.testing.assert_close(torch.cat([found for _, found in steps]), torch.stack(logits), rtol=1e-5, atol=1e-5)
    assert [int(chosen) for chosen, _ in steps] == ids


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("prompt_length", [1, 4, 20])
def test_in_exact_mode_the_newest_window_is_recomputed_for_every_token(
    prompt_length: int, block_size: int, tiny: Tiny
) -> None:
    model = make(tiny(block_size=block_size))
    prompt = torch.randint(V, (2, prompt_length))
    expected = crop_and_recompute(naive_twin(model), prompt, 30, block_size)
    assert torch.equal(ids_of(model, prompt, 30, exact_window=True), expected[:, prompt_length:])


@pytest.mark.parametrize("exact", [False, True])
def test_only_the_newest_window_of_a_longer_prompt_counts(exact: bool, tiny: Tiny) -> None:
    model = make(tiny())
    prompt = torch.randint(V, (2, 30))
    assert torch.equal(
        ids_of(model, prompt, 20, exact_window=exact), ids_of(model, prompt[:, -8:], 20, exact_window=exact)
    )


@pytest.mark.parametrize("exact", [False, True])
def test_the_rows_of_a_batch_do_not_see_one_another(exact: bool, tiny: Tiny) -> None:
    model = make(tiny())
    prompts = torch.randint(V, (4, 3))
    together = ids_of(model, prompts, 20, exact_window=exact)
    alone = torch.cat([ids_of(model, prompt[None], 20, exact_window=exact) for prompt in prompts])
    assert torch.equal(together, alone)
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_samples_of_one_prompt_in_one_batch_differ(tiny: Tiny) -> None:
    samples = ids_of(make(tiny()), torch.zeros(8, 1, dtype=torch.long), 20, Sampling(), generator=seeded(1))
    assert len({tuple(row) for row in samples.tolist()}) == 8


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8)], ids=str)
def test_the_same_seed_gives_the_same_ids(sampling: Sampling, tiny: Tiny) -> None:
    model, prompt = make(tiny()), torch.zeros(3, 1, dtype=torch.long)
    first, again, other = (ids_of(model, prompt, 25, sampling, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generation_leaves_dropout_out_even_of_a_model_in_training(tiny: Tiny) -> None:
    model = make(tiny(dropout=0.5))
    prompt = torch.zeros(1, 1, dtype=torch.long)
    expected = ids_of(model, prompt, 20)
    assert torch.equal(ids_of(model.train(), prompt, 20), expected)


def test_each_token_is_yielded_before_the_next_is_computed(tiny: Tiny) -> None:
    model = make(tiny())
    calls: list[int] = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    steps = generate(model, torch.zeros(1, 1, dtype=torch.long), 5, GREEDY)
    for n in range(1, 6):
        next(steps)
        assert len(calls) == n
    assert next(steps, None) is None


# Choosing one token. 20,000 draws of each case are compared with the exact distribution, computed in plain Python.

DRAWS = 20_000


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [power / sum(powers) for power in powers]


def expected_distribution(logits: list[float], sampling: Sampling) -> list[float]:
    """Softmax at the temperature; of it the `top_k` likeliest; of those the fewest likeliest that reach `top_p`."""
    kept = softmax(logits, sampling.temperature)
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    if sampling.top_k is not None:
        allowed = ranked[: sampling.top_k]
        kept = [p if i in allowed else 0.0 for i, p in enumerate(kept)]
        kept = [p / sum(kept) for p in kept]
    if sampling.top_p is not None:
        allowed, mass = [], 0.0
        for i in ranked:
            if mass >= sampling.top_p:
                break
            allowed.append(i)
            mass += kept[i]
        kept = [p if i in allowed else 0.0 for i, p in enumerate(kept)]
    return [p / sum(kept) for p in kept]


def draw(logits: list[float], sampling: Sampling, seed: int) -> list[int]:
    """How often each id came up."""
    rows = torch.tensor([logits]).expand(DRAWS, -1)
    return torch.bincount(choose(rows, sampling, seeded(seed)), minlength=len(logits)).tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    "cut",
    [
        {}, {"top_k": 1}, {"top_k": 3}, {"top_k": 8}, {"top_k": 1000},
        {"top_p": 1e-9}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 1.0}, {"top_k": 4, "top_p": 0.7},
    ],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_distribution_cut_by_top_k_and_top_p(cut: dict[str, float], temperature: float) -> None:
    sampling = Sampling(temperature, **cut)
    for seed in range(3):
        logits = (2 * torch.randn(8, generator=seeded(seed))).tolist()
        counts, expected = draw(logits, sampling, seed), expected_distribution(logits, sampling)
        assert [i for i, p in enumerate(expected) if p == 0 and counts[i]] == []
        likely = [(n, p * DRAWS) for n, p in zip(counts, expected, strict=True) if p * DRAWS >= 5]
        chi_square = sum((n - e) ** 2 / e for n, e in likely)
        assert chi_square < 30  # of at most 7 degrees of freedom: one seed in 10,000 goes beyond


@pytest.mark.parametrize("cut", [{"top_k": 1000}, {"top_k": 8}, {"top_p": 1.0}], ids=str)
def test_a_cut_that_keeps_all_changes_no_draw(cut: dict[str, float]) -> None:
    logits = torch.randn(500, 8)
    assert torch.equal(choose(logits, Sampling(**cut), seeded(3)), choose(logits, Sampling(), seeded(3)))


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1e-9), Sampling(top_k=1), Sampling(top_p=1e-9)], ids=str)
def test_greedy_and_the_narrowest_cuts_take_the_likeliest(sampling: Sampling) -> None:
    logits = torch.randn(1000, 50)
    assert torch.equal(choose(logits, sampling, seeded(0)), logits.argmax(dim=-1))


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_no_temperature_and_no_size_of_logits_overflows(temperature: float, offset: float) -> None:
    logits = torch.tensor([[offset, offset + 3.0, offset - 50.0]]).expand(100, -1)
    ids = choose(logits, Sampling(temperature), seeded(0))
    assert set(ids.tolist()) <= {0, 1, 2}
    if temperature <= 1e-3:
        assert set(ids.tolist()) == {1}


def test_logits_as_large_as_float32_holds_do_not_overflow() -> None:
    logits = torch.tensor([[0.0, 3e38, -3e38]])
    assert choose(logits, Sampling(1e-5), seeded(0)).item() == 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5, top_k=3)], ids=str)
def test_draws_are_those_of_torch_multinomial(sampling: Sampling) -> None:
    logits = torch.randn(50, 20)
    probs = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_k:
        probs = probs.masked_fill(probs < probs.topk(sampling.top_k).values[:, -1:], 0.0)
    expected = torch.multinomial(probs, 1, generator=seeded(3)).squeeze(1)
    assert torch.equal(choose(logits, sampling, seeded(3)), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling()], ids=str)
def test_logits_that_are_not_finite_are_an_error_and_not_a_crash(sampling: Sampling, bad: float, tiny: Tiny) -> None:
    model = make(tiny())
    with torch.no_grad():
        model.head.bias[3] = bad
    with pytest.raises(MinigptError, match="not finite"):
        next(generate(model, torch.zeros(2, 1, dtype=torch.long), 5, sampling))


# Reading back, and deciding where to compute.


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_ids_are_read_back_in_order_and_none_is_lost(every: int, tiny: Tiny) -> None:
    model, prompt = make(tiny()), torch.zeros(2, 1, dtype=torch.long)
    steps = generate(model, prompt, 7, GREEDY)
    assert list(read_back(steps, every)) == ids_of(model, prompt, 7).T.tolist()


def test_one_at_a_time_each_token_is_read_before_the_next_is_computed(tiny: Tiny) -> None:
    model = make(tiny())
    calls: list[int] = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    ids = read_back(generate(model, torch.zeros(1, 1, dtype=torch.long), 5, GREEDY), 1)
    next(ids)
    assert len(calls) == 1


@pytest.mark.parametrize(("streams", "limit", "expected"), [(1, 10**6, 1), (2, 10**6, 2), (1, 10, 2)])
def test_one_float32_stream_of_a_small_model_is_decoded_by_one_thread(
    streams: int, limit: int, expected: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt_cli.core.generate.ONE_THREAD_PARAMETERS", limit)
    model, seen = make(tiny()), []
    model.head.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with cpu_threads(2):
        for _ in generate(model, torch.zeros(streams, 3, dtype=torch.long), 12, GREEDY):
            assert torch.get_num_threads() == 2  # whoever reads the tokens has them all
    assert seen == [2] + [expected] * 5 + [2] + [expected] * 4 + [2]  # prompt and refills take all


# Weights in bf16: how near the text stays.


@pytest.mark.parametrize(
    "options",
    [{}, {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 1, "bias": False},
     {"tie_weights": True, "logit_softcap": 15.0, "mlp": "gelu"}, {"n_layer": 0, "norm": "none"},
     {"mlp": "gelu_tanh", "head_width": 24, "norm_eps": 0.01}],
    ids=str,
)  # fmt: skip
def test_decoding_in_bf16_stays_near_float32_with_and_without_the_cache(options: dict[str, object], tiny: Tiny) -> None:
    model = GPT(tiny(n_embd=32, block_size=16, **options), V).eval()
    exact = copy.deepcopy(model)
    decoder = for_decoding(model, BF16)
    ids = torch.randint(V, (1, 1))
    for chosen, logits in generate(decoder, ids, 12, GREEDY):
        assert logits.dtype == torch.float32
        for whole in (exact(ids), decoder(ids).float()):
            torch.testing.assert_close(logits, whole[:, -1], rtol=0.03, atol=0.03)
        ids = torch.cat([ids, chosen[:, None]], dim=1)


def test_decoding_in_float32_is_the_model_untouched(tiny: Tiny) -> None:
    model = make(tiny())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert for_decoding(model, Runtime(torch.device("cpu"), "fp32", compile=False)) is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# A step that can be recorded: the same work at every position. Without a GPU the work is done again instead.


class Tape:
    """Records work as `Runtime.record` does, which does not do it yet, and counts."""

    def __init__(self, broken_from: int = 10**9) -> None:
        self.recordings, self.replays, self.broken_from = 0, 0, broken_from

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        if self.recordings >= self.broken_from:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay() -> None:
            self.replays += 1
            work()

        return replay


OPTIONS = [
    {}, {"position": "rope"}, {"position": "none", "n_kv_head": 1},
    {"position": "rope", "qk_norm": True, "n_kv_head": 2, "head_width": 6},
]  # fmt: skip


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_recorded_step_gives_the_logits_of_the_sliced_cache(
    options: dict[str, object], streams: int, tiny: Tiny
) -> None:
    """Up to the window of 160 and past it: through three recordings, refills, and a cache that slides."""
    model = make(tiny(n_head=4, block_size=160, **options))
    prompt, tape = torch.randint(V, (streams, 5)), Tape()
    recorded = list(generate(model, prompt, 400, GREEDY, record=tape))
    for (ids, logits), (expected_ids, expected) in zip(recorded, generate(model, prompt, 400, GREEDY), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(ids, expected_ids)
    assert tape.recordings == 3  # 64, 128, 160 slots
    prefills = 1 if model.slides else 1 + -(-(400 - 156) // 81)
    assert tape.replays == 400 - prefills - 3  # the first token of each warms up


def test_nothing_that_changes_from_step_to_step_is_known_to_the_host(tiny: Tiny) -> None:
    """What Python reads while it records is frozen: so while this one works, the host's own count is nonsense."""
    model = make(tiny(block_size=64, position="rope"))
    cache = KVCache(1, model.config, torch.device("cpu"), torch.float32)

    def record(work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            cache.length, length = -1000, cache.length
            work()
            cache.length = length

        return replay

    with torch.inference_mode():
        step = RecordedStep(model, cache, 1, record)
        ids, context = torch.tensor([[4]]), torch.tensor([[1, 2, 3]])
        model(context, cache)
        for position in range(3, 60):
            context = torch.cat([context, ids], dim=1)
            torch.testing.assert_close(step(ids), model(context)[:, -1], rtol=1e-4, atol=1e-4)
            assert cache.length == position + 1


@pytest.mark.parametrize("broken_from", [1, 2])
def test_where_recording_fails_decoding_goes_on_and_says_so(broken_from: int, tiny: Tiny) -> None:
    model, prompt, notes = make(tiny(block_size=160)), torch.zeros(1, 1, dtype=torch.long), []
    found = ids_of(model, prompt, 150, record=Tape(broken_from), note=notes.append)
    assert torch.equal(found, ids_of(model, prompt, 150))
    assert notes == ["CUDA graph: failed, going on without it (operation not permitted when stream is capturing)"]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streams_of_different_lengths_step_together_as_each_does_alone(
    options: dict[str, object], recorded: bool, tiny: Tiny
) -> None:
    """Four in one cache, of which a rotary one is past its window; the fifth row is not used and not read."""
    model = make(tiny(n_head=4, block_size=80, **options))
    lengths = [3, 70, 1, 95 if model.slides else 40]
    together = KVCache(5, model.config, torch.device("cpu"), torch.float32)
    alone = [KVCache(1, model.config, torch.device("cpu"), torch.float32) for _ in lengths]
    with torch.inference_mode():
        for i, length in enumerate(lengths):
            row, ids = together.streams(i, 1), torch.randint(V, (1, length))
            for cache in (row, alone[i]):
                for piece in (ids[:, :80], *ids[:, 80:].split(1, dim=1)):
                    model(piece, cache) if piece.numel() else None
            assert row.length == length
        rows = together.streams(0, 4)
        step = RecordedStep(model, rows, 4, Tape())
        for _ in range(9):
            ids_B1 = torch.randint(V, (4, 1))
            if recorded:
                found = step(ids_B1, lengths)
            else:
                found = step_at(model, rows, ids_B1, torch.tensor(lengths), min(80, max(lengths) + 1))
            expected = torch.cat([model(ids[None], cache)[:, -1] for ids, cache in zip(ids_B1, alone, strict=True)])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            lengths = [length + 1 for length in lengths]
    assert all(not layer.k_BHSD[4].any() for layer in together.layers)
