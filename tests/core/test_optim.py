"""The learning rate of a step against numbers worked out by hand; AdamW against its formula; what decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt_cli.core import optim
from minigpt_cli.core.config import ModelConfig, TrainConfig, parse_config
from minigpt_cli.core.model import GPT
from minigpt_cli.core.optim import (
    WeightAverage,
    learning_rate_at,
    make_optimizer,
    orthogonalized,
    parameter_groups,
    resolved,
    set_learning_rate,
)
from oracle.adamw import NaiveAdamW
from oracle.muon import NaiveMuon

Tiny = Callable[..., ModelConfig]

SCHEDULES: dict[str, tuple[dict[str, Any], dict[int, float]]] = {
    "constant": ({}, {0: 1.0, 1: 1.0, 99: 1.0, 10_000: 1.0}),
    "constant ignores where a decay would end": ({"lr_decay_iters": 5, "min_lr": 0.1}, {4: 1.0, 5: 1.0, 50: 1.0}),
    "warmup": ({"warmup_iters": 4}, {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1.0, 5: 1.0}),
    "cosine": (
        {"lr_schedule": "cosine", "max_iters": 8},
        {0: 1.0, 1: 0.9619397663, 2: 0.8535533906, 4: 0.5, 6: 0.1464466094, 8: 0.0, 9: 0.0, 16: 0.0},
    ),
    "cosine from warmup to a floor": (
        {"lr_schedule": "cosine", "warmup_iters": 2, "lr_decay_iters": 10, "min_lr": 0.2, "max_iters": 1000},
        {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 0.8828427125, 6: 0.6, 8: 0.3171572875, 10: 0.2, 11: 0.2, 999: 0.2},
    ),
    "linear": (
        {"lr_schedule": "linear", "max_iters": 10},
        {0: 1.0, 1: 0.9, 5: 0.5, 9: 0.1, 10: 0.0, 11: 0.0},
    ),
    "linear from warmup to a floor": (
        {"lr_schedule": "linear", "warmup_iters": 2, "lr_decay_iters": 10, "min_lr": 0.2, "max_iters": 1000},
        {0: 1 / 3, 1: 2 / 3, 2: 1.0, 3: 0.9, 6: 0.6, 9: 0.3, 10: 0.2, 500: 0.2},
    ),
    "a decay longer than the run": (
        {"lr_schedule": "linear", "max_iters": 10, "lr_decay_iters": 20},
        {0: 1.0, 9: 0.55, 10: 0.5, 20: 0.0},
    ),
    "warmup, stable, decay": (
        {"lr_schedule": "wsd", "cooldown": 0.4, "warmup_iters": 1, "max_iters": 10, "min_lr": 0.2},
        {0: 0.5, 1: 1.0, 5: 1.0, 6: 1.0, 7: 0.8, 8: 0.6, 9: 0.4, 10: 0.2, 11: 0.2},
    ),
    "a cooldown of the whole run is linear": (
        {"lr_schedule": "wsd", "cooldown": 1.0, "warmup_iters": 2, "lr_decay_iters": 10, "max_iters": 1000},
        {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 0.75, 6: 0.5, 10: 0.0},
    ),
    "a warmup as long as the decay": (
        {"lr_schedule": "cosine", "warmup_iters": 4, "lr_decay_iters": 4, "min_lr": 0.5},
        {0: 0.2, 3: 0.8, 5: 0.5, 6: 0.5},
    ),
}


@pytest.mark.parametrize(("settings", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_the_rate_is_the_one_worked_out_by_hand(settings: dict[str, Any], expected: dict[int, float]) -> None:
    for peak in (1.0, 3e-4):
        scaled = {key: value * peak if key == "min_lr" else value for key, value in settings.items()}
        config = TrainConfig(learning_rate=peak, **scaled)
        for step, rate in expected.items():
            assert learning_rate_at(step, config) == pytest.approx(rate * peak, rel=1e-9, abs=1e-12), step


@given(
    schedule=st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    warmup=st.integers(0, 50),
    end=st.none() | st.integers(1, 100),
    low=st.floats(0, 1),
    step=st.integers(0, 200),
)
def test_the_rate_never_leaves_its_bounds_and_never_rises_after_warmup(
    schedule: Any, warmup: int, end: int | None, low: float, step: int
) -> None:
    config = TrainConfig(
        learning_rate=1.0, lr_schedule=schedule, warmup_iters=warmup, lr_decay_iters=end, min_lr=low, max_iters=100
    )
    rate, following = learning_rate_at(step, config), learning_rate_at(step + 1, config)
    assert 0 <= rate <= 1
    if step >= warmup:
        assert low - 1e-12 <= following <= rate + 1e-12
    else:
        assert 0 < rate < following + 1e-12


def test_matrices_decay_and_biases_and_norms_do_not(tiny: Tiny) -> None:
    model = GPT(tiny(bias_qkv=True), 11)
    decayed, rest = parameter_groups(model, TrainConfig(weight_decay=0.3, decay="matrices"))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    left_alone = {names[id(p)] for p in rest["params"]}
    assert left_alone == {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - left_alone
    assert {"token_embedding.weight", "head.weight", "blocks.1.mlp.up.weight"} <= set(names.values()) - left_alone


def test_decay_all_decays_every_parameter(tiny: Tiny) -> None:
    model = GPT(tiny(), 11)
    (group,) = parameter_groups(model, TrainConfig(weight_decay=0.3, decay="all"))
    assert group["weight_decay"] == 0.3
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_groups_hold_each_trained_parameter_once(decay: Any, tiny: Tiny) -> None:
    model = GPT(tiny(tie_weights=True), 11)
    model.position_embedding.weight.requires_grad_(False)
    grouped = [p for group in parameter_groups(model, TrainConfig(decay=decay)) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_model_without_biases_and_norms_makes_no_empty_group(tiny: Tiny) -> None:
    model = GPT(tiny(bias=False, bias_head=False, norm="none"), 11)
    assert len(parameter_groups(model, TrainConfig())) == 1


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_ten_steps_are_those_of_adamws_formula(decay: Any, tiny: Tiny) -> None:
    """On the same gradients, under a changing rate and a decay large enough to show."""
    config = TrainConfig(learning_rate=0.02, weight_decay=0.5, beta1=0.8, beta2=0.95, decay=decay)
    model, twin = GPT(tiny(), 11), GPT(tiny(), 11)
    twin.load_state_dict(model.state_dict())
    optimizer = make_optimizer(model, config)
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    references = [
        NaiveAdamW(matrices, lr=0.02, betas=(0.8, 0.95), decay=0.5),
        NaiveAdamW(vectors, lr=0.02, betas=(0.8, 0.95), decay=0.5 if decay == "all" else 0.0),
    ]
    for step in range(10):
        rate = 0.02 / (step + 1)
        set_learning_rate(optimizer, rate / 0.02)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        optimizer.step()
        for reference in references:
            reference.lr = rate
            reference.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_rate_reaches_every_group_as_a_part_of_its_own_peak(tiny: Tiny) -> None:
    config = TrainConfig(learning_rate=1e-3, optimizer="muon", muon_learning_rate=0.02)
    optimizer = make_optimizer(GPT(tiny(), 11), config)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.02, 1e-3, 1e-3])
    set_learning_rate(optimizer, 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.01, 5e-4, 5e-4])


@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "n_kv_head": 1, "n_embd": 32}], ids=str)
def test_ten_steps_of_muon_are_those_of_its_formula(options: dict[str, Any], tiny: Tiny) -> None:
    """Hidden matrices by Muon, each packed projection on its own; everything else by AdamW."""
    config = TrainConfig(
        learning_rate=0.01, muon_learning_rate=0.03, weight_decay=0.5, optimizer="muon", beta1=0.8, beta2=0.95
    )
    model, twin = GPT(tiny(**options), 11), GPT(tiny(**options), 11)
    twin.load_state_dict(model.state_dict())
    optimizer = make_optimizer(model, config)
    hidden = [p for name, p in twin.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    assert len(hidden) == 8
    C, D = twin.config.n_embd, twin.config.n_embd // 2
    kv = D * (twin.config.n_kv_head or 2)
    packed = {3 * C: (C, C, C), C + 2 * kv: (C, kv, kv), 4 * C: (4 * C,), C: (C,), 2 * 88: (88, 88)}
    muon = NaiveMuon(hidden, [packed[len(p)] for p in hidden], lr=0.03, decay=0.5)
    others = [p for p in twin.parameters() if not any(p is q for q in hidden)]
    adamw = [
        NaiveAdamW([p for p in others if p.ndim > 1], lr=0.01, betas=(0.8, 0.95), decay=0.5),
        NaiveAdamW([p for p in others if p.ndim == 1], lr=0.01, betas=(0.8, 0.95), decay=0.0),
    ]
    for step in range(10):
        set_learning_rate(optimizer, 1 / (step + 1))
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        optimizer.step()
        for reference, peak in ((muon, 0.03), (adamw[0], 0.01), (adamw[1], 0.01)):
            reference.lr = peak / (step + 1)
            reference.step()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 64, 16), (2, 16, 64), (1, 1, 8)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_orthogonalized_matrices_keep_their_directions_and_get_singular_values_near_one(
    shape: tuple[int, int, int], size: float
) -> None:
    matrices = torch.randn(shape) * size
    found = orthogonalized(matrices)
    assert found.shape == matrices.shape
    for matrix, result in zip(matrices, found, strict=True):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        core = u.T @ result @ vt.T  # diagonal, if the directions are kept
        kept = s > s.max() * 0.05  # tiny ones are lifted less in five steps
        assert ((core.diagonal()[kept] > 0.6) & (core.diagonal()[kept] < 1.3)).all()
        torch.testing.assert_close(core, torch.diag(core.diagonal()), rtol=0, atol=1e-3)


def test_orthogonalizing_nothing_gives_nothing() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def test_muon_takes_a_gradient_that_is_not_finite_for_none_and_does_not_move(tiny: Tiny) -> None:
    model = GPT(tiny(), 11)
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    optimizer.found_inf = torch.tensor(0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name


def test_muons_momentum_stands_still_in_a_skipped_step(tiny: Tiny) -> None:
    """As Adam's moments do: else every overflow of fp16 would shrink it by a twentieth."""
    model = GPT(tiny(), 11)
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon"))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for p, state in optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(value, before[p][key]), key


def test_a_weight_average_is_the_weighted_sum_of_all_weights_so_far() -> None:
    model = torch.nn.Linear(3, 2)
    average, expected = WeightAverage(model, 0.8), [p.detach().clone() for p in model.parameters()]
    for step in range(50):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.normal_()
                keep = min(0.8, (1 + step) / (10 + step))
                expected[i] = keep * expected[i] + (1 - keep) * p
        average.update(step)
    trained = [p.detach().clone() for p in model.parameters()]
    with average.swapped():
        for p, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p, wanted)
    for p, wanted in zip(model.parameters(), trained, strict=True):
        assert torch.equal(p, wanted)


@pytest.mark.parametrize(
    ("parameters", "tokens", "steps"),
    [(1_000_000, 100_000_000, 2000), (10_000_000, 1_000_000, 1200), (1_000, 1_000_000, 2), (10, 1_000_000, 1)],
)
def test_the_horizon_is_twenty_tokens_a_parameter_and_at_most_twelve_epochs(
    parameters: int, tokens: int, steps: int
) -> None:
    """With 10,000 tokens a step: 20 x 1e6 / 1e4; 12 x 1e6 / 1e4, for the text is short; and never no step at all."""
    config = parse_config({"train": {"max_iters": "auto", "batch_size": 100}, "model": {"block_size": 100}}, "test")
    assert resolved(config, tokens, parameters).train.steps == steps
    fixed = parse_config({"train": {"max_iters": 7}}, "test")
    assert resolved(fixed, tokens, parameters) is fixed


@pytest.mark.parametrize(
    ("max_iters", "tokens", "warmup"),
    [("auto", 1_000_000, 100), ("auto", 34_000, 10), ("auto", 100, 0), (40, 34_000, 100)],
)
def test_warmup_is_at_most_a_quarter_of_an_automatic_horizon(max_iters: int | str, tokens: int, warmup: int) -> None:
    """With 10,000 tokens a step, twelve passes are 1,200 steps; 41, of which 10; 1. A number of steps is left alone."""
    train = {"max_iters": max_iters, "batch_size": 100, "warmup_iters": 100}
    config = parse_config({"train": train, "model": {"block_size": 100}}, "test")
    assert resolved(config, tokens, 10_000_000).train.warmup_iters == warmup


@pytest.mark.parametrize(
    ("settings", "tokens", "parameters", "decay"),
    [
        ({"max_iters": 100}, 1_000_000, 4_000_000, 0.1),
        ({"max_iters": 400}, 1_000_000, 4_000_000, 0.1),  # four passes
        ({"max_iters": 800}, 1_000_000, 4_000_000, 0.5),  # eight: half of what twelve get
        ({"max_iters": 1200}, 1_000_000, 4_000_000, 1.0),  # 2 / 100 a step, at a rate of 0.02
        ({"max_iters": 9000}, 1_000_000, 4_000_000, 1.0),
        ({"max_iters": 1200, "muon_learning_rate": 0.04}, 1_000_000, 4_000_000, 0.5),
        ({"max_iters": 1200}, 1_000_000, 9_000_000, 1.5),
        ({"max_iters": 1200, "batch_size": 50}, 500_000, 2_000_000, 1.0),  # passes count, not steps
        ({"max_iters": 1200}, 1_000_000, 5_000_000, 1.1),  # to two digits: 1.118
        ({"max_iters": "auto"}, 1_000_000, 4_000_000, 1.0),  # twelve passes
        ({"max_iters": "auto"}, 1_000_000, 100_000, 0.1),  # two passes
        ({"max_iters": 9000}, 1_000_000, 1_000, 0.1),  # a small model cannot learn it by heart
        ({"max_iters": 1200}, 10_000, 1_000_000, 5.0),  # never more than a tenth a step
        ({"max_iters": 1200, "optimizer": "adamw", "learning_rate": 2e-3}, 1_000_000, 4_000_000, 2.0),
    ],
)
def test_weight_decay_grows_with_the_parameters_per_token_where_a_text_is_read_often(
    settings: dict[str, Any], tokens: int, parameters: int, decay: float
) -> None:
    """With 10,000 tokens a step, 100 steps read a million: the root of parameters per token, by steps and by rate."""
    train = {"weight_decay": "auto", "batch_size": 100, "optimizer": "muon", **settings}
    config = parse_config({"train": train, "model": {"block_size": 100}}, "test")
    assert resolved(config, tokens, parameters).train.decay_strength == pytest.approx(decay)
    assert resolved(resolved(config, tokens, parameters), tokens, parameters).train.decay_strength == decay


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_where_a_device_cannot_skip_a_step_the_host_does(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on MPS, whose fused step ignores `found_inf`: PyTorch's other step, which here gives the same."""
    config = parse_config({"train": {"optimizer": name, "weight_decay": 0.1, "grad_clip": None}}, "test").train
    models = [GPT(tiny(), 11) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fused = make_optimizer(models[0], config)
    monkeypatch.setattr(optim, "skips_on_the_device", lambda device: False)
    asking = make_optimizer(models[1], config)
    assert not asking.defaults["fused"]
    for step in range(6):
        gradient = {key: torch.randn_like(p) for key, p in models[0].named_parameters()}
        skipped = torch.tensor(float(step == 3))
        before = [p.clone() for p in models[1].parameters()]
        for model, optimizer in zip(models, (fused, asking), strict=True):
            for key, p in model.named_parameters():
                p.grad = torch.full_like(p, float("nan")) if step == 3 else gradient[key].clone()
            set_learning_rate(optimizer, (step + 1) / 6)
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()
        moved = [not torch.equal(p, old) for p, old in zip(models[1].parameters(), before, strict=True)]
        assert any(moved) == (step != 3)
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
