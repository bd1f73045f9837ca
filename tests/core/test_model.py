"""The model's promises: causality, the cache, tied weights, the operation count, initialisation, dropout, learning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from minigpt_cli.core import model as model_module
from minigpt_cli.core.config import ModelConfig, load_config, shipped_configs
from minigpt_cli.core.generate import Sampling, for_decoding, generate
from minigpt_cli.core.layers import KVCache, rotary_table, rotate
from minigpt_cli.core.model import GPT, empty_model, lm_loss
from minigpt_cli.core.runtime import Runtime
from oracle.weights import naive_twin
from runs import MODEL_CHOICES, varied_model

Tiny = Callable[..., ModelConfig]
V = 11
SHAPES: dict[str, dict[str, object]] = {
    "rotary": {"position": "rope", "norm": "rmsnorm"},
    "two heads": {},
    "one head": {"n_head": 1},
    "narrow heads": {"n_head": 16},
    "no blocks": {"n_layer": 0},
    "wide heads": {"n_head": 3, "head_width": 10, "position": "rope"},
}


make = partial(varied_model, vocab_size=V, by=0.15)


def fresh_cache(model: GPT, batch: int) -> KVCache:
    return KVCache(batch, model.config, torch.device("cpu"), torch.float32)


def in_pieces(model: GPT, ids: Tensor, lengths: list[int]) -> Tensor:
    """The logits of `ids`, handed over in pieces of the given lengths with one cache."""
    cache = fresh_cache(model, ids.shape[0])
    logits = []
    for piece in ids.split(lengths, dim=1):
        logits.append(model(piece, cache))
        assert cache.length == sum(part.shape[1] for part in logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cached", [False, True])
def test_a_later_token_never_changes_earlier_logits(shape: dict[str, int], cached: bool, tiny: Tiny) -> None:
    model = make(tiny(**shape))
    ids = torch.randint(V, (2, 8))
    for position in range(8):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % V
        before, after = (model(i, fresh_cache(model, 2) if cached else None) for i in (ids, changed))
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.allclose(before[:, position], after[:, position])


def test_attention_reaches_back_to_the_first_token(tiny: Tiny) -> None:
    model = make(tiny())
    ids = torch.randint(V, (1, 8))
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    assert not torch.allclose(model(ids)[:, -1], model(changed)[:, -1])


@pytest.mark.parametrize("options", MODEL_CHOICES, ids=str)
def test_cached_logits_are_the_uncached_for_every_model_option(options: dict[str, object], tiny: Tiny) -> None:
    model = make(tiny(**options))
    ids = torch.randint(V, (2, 8))
    with torch.inference_mode():
        expected = model(ids)
        for lengths in ([8], [3, 4, 1], [1, 7], [5, 1, 2], [1] * 8):
            torch.testing.assert_close(in_pieces(model, ids, lengths), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cached_logits_are_the_uncached_however_the_window_is_cut(shape: dict[str, int], tiny: Tiny) -> None:
    model = make(tiny(**shape))
    ids = torch.randint(V, (2, 8))
    with torch.inference_mode():
        expected = model(ids)
        for cuts in range(1 << 7):  # every way to cut 8 tokens into pieces
            ends = [i + 1 for i in range(7) if cuts >> i & 1]
            lengths = [b - a for a, b in itertools.pairwise([0, *ends, 8])]
            torch.testing.assert_close(in_pieces(model, ids, lengths), expected, rtol=1e-5, atol=1e-5)


def test_a_cleared_cache_forgets(tiny: Tiny) -> None:
    model = make(tiny())
    ids, other = torch.randint(V, (2, 5)), torch.randint(V, (2, 8))
    cache = fresh_cache(model, 2)
    with torch.inference_mode():
        model(other, cache)
        cache.clear()
        torch.testing.assert_close(model(ids, cache), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[9], [8, 1], [5, 4], [1, 8]])
@pytest.mark.parametrize("position", ["learned", "none"])
def test_more_tokens_than_the_context_raise_and_leave_the_cache_as_it_was(
    lengths: list[int], position: str, tiny: Tiny
) -> None:
    model = make(tiny(position=position))
    cache = fresh_cache(model, 1)
    *fitting, last = (torch.zeros(1, n, dtype=torch.long) for n in lengths)
    for ids in fitting:
        model(ids, cache)
    with pytest.raises(ValueError, match="9 tokens do not fit a context of 8"):
        model(last, cache)
    assert cache.length == sum(lengths[:-1])


def test_more_tokens_than_the_context_raise_without_a_cache_too(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="9 tokens do not fit a context of 8"):
        GPT(tiny(), V)(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("block_size", [1, 2, 7, 8])
@pytest.mark.parametrize("options", [{}, {"n_kv_head": 1, "qk_norm": True, "norm": "rmsnorm"}], ids=str)
def test_past_the_window_a_rotary_cache_slides_as_a_windowed_oracle_does(
    block_size: int, options: dict[str, object], tiny: Tiny
) -> None:
    """The oracle reads 30 tokens at once, and in each of its layers a token sees itself and the newest before it."""
    model = make(tiny(position="rope", block_size=block_size, **options))
    wide = GPT(tiny(position="rope", block_size=30, **options), V).eval()
    wide.load_state_dict(model.state_dict())
    naive = naive_twin(wide)
    for layer in naive.layers:
        for head in layer.attention.heads:
            head.past &= torch.ones(30, 30).triu(1 - block_size).bool()
    ids = torch.randint(V, (2, 30))
    with torch.inference_mode():
        first = min(5, block_size)
        logits = in_pieces(model, ids, [first] + [1] * (30 - first))
        torch.testing.assert_close(logits, naive(ids), rtol=1e-5, atol=1e-5)


def test_rotation_depends_on_distances_only_however_far_the_positions() -> None:
    """q at m and k at n meet with the same score as q at m + 10^7 and k at n + 10^7."""
    q, k = torch.randn(2, 1, 1, 1, 64).unbind(0)

    def score(m: int, n: int) -> Tensor:
        return (
            rotate(q, rotary_table(torch.tensor([m]), 64, 1e4)) * rotate(k, rotary_table(torch.tensor([n]), 64, 1e4))
        ).sum()

    for distance in (0, 1, 5, 100):
        torch.testing.assert_close(score(10**7 + distance, 10**7), score(distance, 0), rtol=0, atol=1e-4)
    assert (score(5, 0) - score(0, 0)).abs() > 0.1


def test_zero_init_begins_with_blocks_that_add_nothing(tiny: Tiny) -> None:
    model = GPT(tiny(zero_init=True, bias=True), V)
    x = torch.randn(1, 4, 16)
    for block in model.blocks:
        assert torch.equal(block(x), x)
    assert not torch.equal(GPT(tiny(), V).blocks[0](x), x)


def test_softcapped_logits_stay_within_the_cap(tiny: Tiny) -> None:
    model = make(tiny(logit_softcap=2.0))
    with torch.no_grad():
        model.head.weight.mul_(100)
    logits = model(torch.randint(V, (2, 8)))
    assert 1.9 < logits.abs().max() <= 2.0


@pytest.mark.parametrize("init", ["normal", "gpt2", "torch"])
def test_a_tied_head_is_the_embedding_and_counts_once(init: str, tiny: Tiny) -> None:
    tied, untied = (GPT(tiny(tie_weights=tie, init=init), V) for tie in (True, False))
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight is not untied.token_embedding.weight
    assert untied.parameter_counts()["total"] - tied.parameter_counts()["total"] == V * 16
    assert tied.parameter_counts()["head"] == V  # its bias
    lm_loss(tied(torch.tensor([[0, 1]])), torch.tensor([[1, 2]])).backward()
    assert tied.token_embedding.weight.grad is not None
    assert tied.token_embedding.weight.grad[5].abs().sum() > 0  # token 5 was not read: this came through the head


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("n_layer", [0, 2])
@pytest.mark.parametrize("multiple", [1, 8])
def test_parameter_counts_are_the_arithmetic_of_the_shape_and_add_up(
    tie: bool, n_layer: int, multiple: int, tiny: Tiny
) -> None:
    """Per block: q, k, v 3C^2 and no bias, projection C^2 + C, feed-forward 8C^2 + 5C, two norms of 2C."""
    C = 16
    model = GPT(tiny(tie_weights=tie, n_layer=n_layer, vocab_multiple=multiple), V)
    counts = model.parameter_counts()
    expected = {
        "token embedding": V * C,
        "position embedding": 8 * C,
        "attention": n_layer * (4 * C * C + C),
        "feed-forward": n_layer * (8 * C * C + 5 * C),
        "norms": (2 * n_layer + 1) * 2 * C,
        "head": V if tie else V * C + V,
    }
    padding = (-V % multiple) * (C + 1 if tie else 2 * C + 1)
    assert counts == expected | {"padding": padding, "total": sum(expected.values())}
    assert sum(p.numel() for p in model.parameters()) == counts["total"] + padding


@pytest.mark.parametrize("options", [{}, {"norm": "rmsnorm", "qk_norm": True, "position": "rope", "zero_init": True}])
@pytest.mark.parametrize("init", ["gpt2", "torch"])
def test_an_empty_model_has_every_shape_and_draws_nothing(init: str, options: dict[str, Any], tiny: Tiny) -> None:
    config = tiny(init=init, tie_weights=True, vocab_multiple=8, **options)
    before = torch.get_rng_state()
    model = empty_model(config, V)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.is_meta for p in model.parameters())
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        name: t.shape for name, t in GPT(config, V).state_dict().items()
    }


def test_gpt2s_configs_have_the_parameters_of_gpt2() -> None:
    """Tokens, positions, twelve times (attention, feed-forward, two norms), the last norm; the head is tied."""
    C, L = 768, 12
    biased = 50257 * C + 1024 * C + L * (4 * C * C + 4 * C + 8 * C * C + 5 * C + 4 * C) + 2 * C
    gated = 50257 * C + L * (4 * C * C + 2 * 64 + 3 * C * 2048 + 2 * C) + C
    for name, expected in (("gpt2", biased), ("gpt2-modern", gated)):
        model = empty_model(load_config(name).model, 50257)
        assert model.parameter_counts()["total"] == expected
        assert model.parameter_counts()["padding"] == 47 * C
        assert model.head.weight.shape == (50304, C)
    assert biased == 124_439_808


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_padded_vocabulary_changes_no_logit_no_loss_and_no_gradient(tie: bool, precision: str, tiny: Tiny) -> None:
    plain, padded = (make(tiny(tie_weights=tie, vocab_multiple=multiple)) for multiple in (1, 8))
    with torch.no_grad():
        for name, p in padded.named_parameters():
            p.fill_(9.0)  # in a softmax, the padding would drown all else
            p[: len(dict(plain.named_parameters())[name])] = dict(plain.named_parameters())[name]
    ids = torch.randint(V, (2, 9))
    runtime = Runtime(torch.device("cpu"), precision, compile=False)
    with runtime.autocast():
        expected, logits = (model(ids[:, :-1]) for model in (plain, padded))
    assert logits.shape == (2, 8, V)
    # A head of other rows is another product, which some processors sum in another order: rounding, no more.
    rounding = {"fp32": 1e-5, "bf16": 1e-2}[precision]
    torch.testing.assert_close(logits, expected, rtol=rounding, atol=rounding)
    for x in (expected, logits):
        lm_loss(x, ids[:, 1:]).backward()
    for name, p in padded.named_parameters():
        wanted = dict(plain.named_parameters())[name].grad
        torch.testing.assert_close(
            p.grad[: len(wanted)], wanted, rtol=rounding, atol=rounding * float(wanted.abs().max())
        )
        assert p.grad[len(wanted) :].abs().sum() == 0, name
    for_decoding(padded, runtime)
    with torch.inference_mode():
        steps = list(generate(padded, ids[:1, :3], 12, Sampling(temperature=50.0)))
    assert {logits_BV.shape for _, logits_BV in steps} == {(1, V)}
    assert max(int(ids_B) for ids_B, _ in steps) < V


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_layer": 0},
        {"n_layer": 3, "n_head": 4},
        {"tie_weights": True},
        {"mlp": "gelu", "bias_qkv": True},
        {"mlp": "swiglu", "position": "rope", "n_kv_head": 1, "qk_norm": True, "vocab_multiple": 8},
        {"head_width": 24, "mlp": "gelu_tanh"},
    ],
    ids=str,
)
def test_flops_per_token_are_what_a_real_step_executes(shape: dict[str, object], tiny: Tiny) -> None:
    model = GPT(tiny(n_embd=32, block_size=16, **shape), V)
    assert model.flops_per_token() == executed(model, torch.randint(V, (3, 17))) / (3 * 16)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_flops_per_token_of_every_shipped_config_at_its_full_size(name: str) -> None:
    """On the meta device, which counts and does not compute."""
    config = load_config(name).model
    with torch.device("meta"):
        model = GPT(config, 50257)
        ids = torch.zeros(1, config.block_size + 1, dtype=torch.long)
    assert model.flops_per_token() == executed(model, ids) / config.block_size


def executed(model: GPT, ids: Tensor) -> int:
    """What PyTorch counts in one training step: the operations of matrix products, and nothing else, as our formula.

    PyTorch counts what its kernels execute, so attention runs as plain matrix products over the whole square, which is
    how our formula counts it; a fused kernel would skip the masked half, or compute the scores again backward.
    """

    def in_place(sum_shape: object, a_shape: object, b_shape: object, out_shape: object = None, **_: object) -> int:
        return int(bmm_flop(a_shape, b_shape))  # the counter does not know baddbmm_ by itself

    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter,
    ):
        lm_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
    return int(counter.get_total_flops())


def test_the_gpt2_init_draws_every_matrix_from_a_normal_of_0_02_and_zeroes_every_bias(tiny: Tiny) -> None:
    model = GPT(tiny(n_embd=128, block_size=64, bias_qkv=True), 100)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        else:
            n, values = parameter.numel(), parameter.detach().double().flatten() / 0.02
            assert abs(values.mean()) < 5 / math.sqrt(n), name  # five standard errors
            assert abs(values.std() - 1) < 5 / math.sqrt(2 * n), name
            assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / n), name  # a normal's fourth moment
            assert 3.5 < values.abs().max() < 7, name


def test_the_torch_init_is_pytorchs_own(tiny: Tiny) -> None:
    """Embeddings N(0, 1); a linear layer's weights and biases uniform within 1 / sqrt(its inputs)."""
    model = GPT(tiny(n_embd=128, block_size=64, bias_qkv=True, init="torch"), 100)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            assert module.weight.std().item() == pytest.approx(1, abs=0.05), name
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            for parameter in (module.weight, module.bias):
                assert 0.9 * bound < parameter.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_init_gpt2_has_the_spread_of_hugging_faces_gpt2(tiny: Tiny) -> None:
    """Every matrix and every bias of 12 layers against a model that transformers initialised."""
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 12, "n_head": 4, "n_embd": 64}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=512, n_positions=64, **shape))
    config = tiny(
        **shape, block_size=64, init="gpt2", mlp="gelu_tanh", bias_qkv=True, bias_head=False, tie_weights=True
    )
    model = GPT(config, 512)

    def spread(module: nn.Module, part: str) -> float:
        return torch.cat([p.detach().flatten() for name, p in module.named_parameters() if part in name]).std().item()

    for mine, their_name in {
        "token_embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight",
        "attn.qkv.weight": "attn.c_attn.weight", "attn.proj.weight": "attn.c_proj.weight",
        "mlp.up.weight": "mlp.c_fc.weight", "mlp.down.weight": "mlp.c_proj.weight",
        "attn.proj.bias": "attn.c_proj.bias",
        "mlp.up.bias": "mlp.c_fc.bias",
    }.items():  # fmt: skip
        assert spread(model, mine) == pytest.approx(spread(theirs, their_name), rel=0.03), mine
    assert spread(model, "mlp.down.weight") == pytest.approx(0.02 / math.sqrt(24), rel=0.03)


@pytest.mark.parametrize("init", ["normal", "gpt2", "torch"])
def test_the_init_follows_from_the_seed_alone(init: str, tiny: Tiny) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in GPT(tiny(init=init), V).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_dropout_in_training_loses_whole_attention_weights(tiny: Tiny) -> None:
    """The first token's weight on itself is 1; with the projection out of the way it gives v, or 0, or v / (1 - p)."""
    model = make(tiny(dropout_attn=0.25))
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.proj.weight.copy_(torch.eye(16))
        attention.proj.bias.zero_()
    x = torch.randn(1000, 1, 16)
    whole = attention.eval()(x)
    kept = (attention.train()(x) / whole).view(1000, 2, 8)  # a factor for each sequence and head
    torch.testing.assert_close(kept, kept[:, :, :1].expand_as(kept))
    assert_lost_and_grown(kept[:, :, 0])


@pytest.mark.parametrize(("place", "part"), [("dropout_proj", "attn"), ("dropout_mlp", "mlp")])
def test_dropout_in_training_loses_outputs_of_the_projection_and_of_the_feed_forward(
    place: str, part: str, tiny: Tiny
) -> None:
    module = getattr(make(tiny(**{place: 0.25})).blocks[0], part)
    x = torch.randn(50, 4, 16)
    assert_lost_and_grown(module.train()(x) / module.eval()(x))


def assert_lost_and_grown(factors: Tensor) -> None:
    """A quarter of the numbers became 0, and the others grew by 1 / 0.75."""
    lost = factors == 0
    assert lost.float().mean() == pytest.approx(0.25, abs=0.04)
    torch.testing.assert_close(factors[~lost], torch.full_like(factors[~lost], 1 / 0.75), rtol=1e-3, atol=0)


@pytest.mark.parametrize("place", ["dropout", "dropout_attn", "dropout_proj", "dropout_mlp"])
def test_dropout_acts_in_training_and_not_in_evaluation(place: str, tiny: Tiny) -> None:
    ids = torch.randint(V, (2, 8))
    model = make(tiny(**{place: 0.5}))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_a_places_own_dropout_of_zero_overrides_the_models(tiny: Tiny) -> None:
    model = make(tiny(dropout=0.5, dropout_attn=0.0, dropout_proj=0.0, dropout_mlp=0.0)).train()
    ids = torch.randint(V, (2, 8))
    assert torch.equal(model(ids), model(ids))


def test_the_loss_is_in_nats_and_computed_in_float32() -> None:
    assert lm_loss(torch.zeros(2, 3, 50), torch.zeros(2, 3, dtype=torch.long)).item() == pytest.approx(math.log(50))
    logits = torch.randn(2, 3, 50).bfloat16()
    loss = lm_loss(logits, torch.zeros(2, 3, dtype=torch.long))
    assert loss.dtype == torch.float32
    probabilities = torch.softmax(logits.double(), dim=-1)[:, :, 0]
    assert loss.item() == pytest.approx(-probabilities.log().mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"mlp": "gelu", "bias": False, "bias_head": False}, {"tie_weights": True}, {"init": "torch"}],
    ids=str,
)
def test_one_batch_overfits(options: dict[str, object], tiny: Tiny) -> None:
    """Four rows of random tokens, each known by its first."""
    model = GPT(tiny(n_embd=32, **options), V).train()
    ids = torch.randint(V, (4, 9))
    ids[:, 0] = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = lm_loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_in_chunks_is_the_loss(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (torch.randn(3, 5, V, dtype=dtype) * 3).requires_grad_()
    targets = torch.randint(V, (3, 5))
    expected = -logits.double().log_softmax(-1).gather(2, targets[:, :, None]).mean()
    (wanted,) = torch.autograd.grad(2.5 * expected, logits)
    monkeypatch.setattr(model_module, "WHOLE_LOGITS", rows * V)
    loss = lm_loss(logits, targets)
    (found,) = torch.autograd.grad(2.5 * loss, logits)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(lm_loss(logits, targets), loss)


def test_the_loss_in_chunks_keeps_no_float32_copy_of_large_logits() -> None:
    """Saved for the backward pass: one tensor in the logits' own dtype, where plain cross-entropy keeps two wider."""
    logits = torch.randn(2, 300, 30_000, dtype=torch.bfloat16).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lm_loss(logits, torch.zeros(2, 300, dtype=torch.long)).backward()
    assert sum(t.nbytes for t in saved) <= 1.01 * logits.nbytes  # and a log-sum-exp and a target for each row


def test_fp16_gradients_of_many_logits_survive_loss_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 8,192 tokens' gradients is below fp16's smallest number for most of the vocabulary, unless it is scaled
    first. Here scaled by GradScaler's first factor, against float64."""
    N, vocab, scale = 8192, 512, 65536.0
    monkeypatch.setattr(model_module, "WHOLE_LOGITS", N * vocab // 4)
    logits = (torch.randn(2, N // 2, vocab) * 4).half().requires_grad_()
    targets = torch.randint(vocab, (2, N // 2))
    exact = logits.detach().double().requires_grad_()
    (scale * -exact.log_softmax(-1).gather(2, targets[:, :, None]).mean()).backward()
    (lm_loss(logits, targets) * scale).backward()
    assert exact.grad is not None
    assert logits.grad is not None
    assert logits.grad.dtype == torch.float16
    found, wanted = logits.grad.double(), exact.grad
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999999
    assert (found != 0).sum() >= 0.999 * (wanted.half() != 0).sum()  # all that fp16 can hold
