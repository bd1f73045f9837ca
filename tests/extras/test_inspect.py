"""What `minigpt inspect` shows is true: each kind of number against the oracle, or a model whose mind we know."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inspected import IDS, V, made_checkpoint, report_of
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.errors import MinigptError, UserError
from minigpt_cli.core.model import GPT, lm_loss
from minigpt_cli.core.tokenizer import CharTokenizer
from minigpt_cli.extras.inspect.ablation import ablate, affordable_tokens, validation_windows
from minigpt_cli.extras.inspect.capture import capture
from minigpt_cli.extras.inspect.heads import induction_score, measure_heads, pattern_scores, repeated_sequences
from minigpt_cli.extras.inspect.text import MAX_SHOWN, given_text, most_tokens
from oracle.model import NaiveGPT
from oracle.operations import Formulas
from oracle.weights import naive_twin
from runs import OnlyFloat32

SHAPES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "v2": {"init": "torch", "dropout": 0.2, "mlp": "gelu"},
    "no biases": {"bias": False, "bias_head": False, "bias_qkv": True, "tie_weights": True},
    "no norm, no positions": {"norm": "none", "position": "none"},
    "bigram": {"n_layer": 0, "norm": "none"},
    "modern": {
        "n_head": 4, "n_kv_head": 2, "position": "rope", "norm": "rmsnorm", "qk_norm": True, "mlp": "relu2",
        "bias": False, "bias_head": False, "logit_softcap": 2.0,
    },
    "modern, gated": {"n_head": 4, "n_kv_head": 1, "position": "rope", "norm": "rmsnorm", "mlp": "swiglu"},
    "padded": {"vocab_multiple": 8, "logit_softcap": 2.0},
}  # fmt: skip


class Watched(Formulas):
    """The oracle's operations; what goes into a softmax and what comes out is kept, head by head, layer by layer."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.weights: list[Tensor] = []

    def softmax(self, x: Tensor) -> Tensor:
        weights = super().softmax(x)
        self.scores.append(x[0].detach())
        self.weights.append(weights[0].detach())
        return weights


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> GPT:
    """Two layers of each shape, with weights large enough to make opinions."""
    config = ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, **SHAPES[request.param]})
    made = GPT(config, V).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def streams_of(naive: NaiveGPT) -> list[Tensor]:
    """The oracle's residual stream before its first layer and after each half of each."""
    x = naive.token_table.weight[IDS][None]
    if naive.position_table is not None:
        x = x + naive.position_table.weight[: len(IDS)]
    found = [x]
    for layer in naive.layers:
        found.append(found[-1] + layer.attention(layer.norm_1(found[-1])))
        found.append(found[-1] + layer.feed_forward(layer.norm_2(found[-1])))
    return [stream[0].detach() for stream in found]


def capped(naive: NaiveGPT, logits: Tensor) -> Tensor:
    return logits if naive.ceiling is None else naive.ceiling * torch.tanh(logits / naive.ceiling)


def test_attention_is_the_oracles(model: GPT, tmp_path: Path) -> None:
    watched = Watched()
    naive_twin(model, watched)(IDS[None])
    attention = report_of(model, tmp_path)["attention"]
    if not model.config.n_layer:
        assert attention == {}
        return
    n_head, width = model.config.n_head, model.config.n_embd // model.config.n_head
    assert len(watched.weights) == model.config.n_layer * n_head
    for i, (scores, weights) in enumerate(zip(watched.scores, watched.weights, strict=True)):
        for t in range(len(IDS)):
            shown = attention["weights"][i // n_head][i % n_head][t]
            assert len(shown) == t + 1
            assert sum(shown) == pytest.approx(1, abs=1e-4)
            assert shown == pytest.approx(weights[t, : t + 1].tolist(), abs=2e-6)
            raw = (scores[t, : t + 1] * math.sqrt(width)).tolist()
            assert attention["scores"][i // n_head][i % n_head][t] == pytest.approx(raw, abs=1e-4)
    assert attention["scale"] == pytest.approx(1 / math.sqrt(width))
    assert attention["first"] == [[0] * len(IDS)] * model.config.n_layer
    q, k = np.array(attention["queries"]), np.array(attention["keys"])  # (L, H, T, D), (L, K, T, D)
    k = k.repeat(n_head // k.shape[1], axis=1)
    assert (q @ k.swapaxes(2, 3))[:, :, -1] == pytest.approx(
        np.array([[head[-1] for head in layer] for layer in attention["scores"]]), abs=1e-3
    )


def test_predictions_are_the_oracles(model: GPT, tmp_path: Path) -> None:
    text = report_of(model, tmp_path)["text"]
    probabilities = naive_twin(model)(IDS[None])[0].softmax(dim=1).detach()
    assert text["at"][0] is None
    for t in range(1, len(IDS)):
        expected, entry = probabilities[t - 1], text["at"][t]
        p = expected[IDS[t]].item()
        assert entry["probability"] == pytest.approx(p, rel=1e-4)
        assert entry["bits"] == pytest.approx(-math.log2(p), abs=1e-4)
        assert entry["rank"] == 1 + sum(expected.tolist()[i] > p for i in range(V))
        assert entry["ids"] == expected.argsort(descending=True)[:5].tolist()
        assert entry["probabilities"] == pytest.approx(expected.sort(descending=True).values[:5].tolist(), abs=1e-5)
    assert text["next"]["ids"] == probabilities[-1].argsort(descending=True)[:5].tolist()
    assert text["loss"] == pytest.approx(lm_loss(model(IDS[None, :-1]), IDS[None, 1:]).item(), abs=1e-5)


def test_the_lens_is_the_oracles_and_ends_in_the_models_output(model: GPT, tmp_path: Path) -> None:
    lens = report_of(model, tmp_path)["stream"]["lens"]
    naive = naive_twin(model)
    rows = streams_of(naive)[::2]
    assert len(lens["ids"]) == len(rows) == model.config.n_layer + 1
    for i, stream in enumerate(rows):
        expected = capped(naive, naive.to_logits(naive.final_norm(stream))).softmax(dim=1)
        likeliest = expected.sort(dim=1, descending=True)
        assert lens["ids"][i] == likeliest.indices[:, :3].tolist()
        assert torch.tensor(lens["probabilities"][i]) == pytest.approx(likeliest.values[:, :3].detach(), abs=1e-5)
        right = expected[:-1].gather(1, IDS[1:, None])[:, 0]
        assert lens["right"][i] == pytest.approx(right.tolist(), abs=1e-5)
        assert lens["loss"][i] == pytest.approx(-right.log().mean().item(), abs=1e-4)
    output = model(IDS[None])[0].softmax(dim=1)
    assert torch.tensor(lens["probabilities"][-1]) == pytest.approx(output.topk(3, dim=1).values.detach(), abs=1e-5)


def test_norms_are_of_the_oracles_stream(model: GPT, tmp_path: Path) -> None:
    norms = report_of(model, tmp_path)["stream"]["norms"]
    streams = streams_of(naive_twin(model))
    for i, stream in enumerate(streams[::2]):
        assert norms["stream"][i] == pytest.approx(stream.norm(dim=1).tolist(), rel=1e-4)
    for i in range(model.config.n_layer):
        for name, j in (("attention", 2 * i), ("feed_forward", 2 * i + 1)):
            assert norms[name][i] == pytest.approx(
                (streams[j + 1] - streams[j]).norm(dim=1).tolist(), rel=1e-3, abs=1e-5
            )


def test_pushes_are_what_the_logit_loses_without_the_part(model: GPT, tmp_path: Path) -> None:
    """With the last norm's divisor held, the head is linear: leaving a part out takes its share of the logit away."""
    push = report_of(model, tmp_path)["stream"]["push"]
    naive = naive_twin(model)
    streams = streams_of(naive)
    parts = {"token embedding": naive.token_table.weight[IDS].detach()}
    if naive.position_table is not None:
        parts["position embedding"] = streams[0] - parts["token embedding"]
    for i in range(model.config.n_layer):
        parts[f"attention {i + 1}"] = streams[2 * i + 1] - streams[2 * i]
        parts[f"feed-forward {i + 1}"] = streams[2 * i + 2] - streams[2 * i + 1]
    end = streams[-1]

    def above_mean(x: Tensor) -> Tensor:
        if model.config.norm == "layernorm":
            x = (x - x.mean(dim=1, keepdim=True)) / (end.var(dim=1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        if model.config.norm == "rmsnorm":
            x = x / (end.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        if naive.final_norm.gain is not None:
            x = x * naive.final_norm.gain
        if naive.final_norm.offset is not None:
            x = x + naive.final_norm.offset
        logits = naive.to_logits(x)[:-1]
        return (logits.gather(1, IDS[1:, None])[:, 0] - logits.mean(dim=1)).detach()

    assert push["total"] == pytest.approx(above_mean(end).tolist(), abs=1e-4)
    assert [name for name in push["parts"] if name != "biases"] == list(parts)
    for name, written in parts.items():
        expected = above_mean(end) - above_mean(end - written)
        assert push["values"][push["parts"].index(name)] == pytest.approx(expected.tolist(), abs=1e-4), name
    assert np.sum(push["values"], axis=0) == pytest.approx(np.array(push["total"]), abs=1e-4)
    assert ("biases" in push["parts"]) == (
        model.config.bias_head or (model.config.bias and model.config.norm == "layernorm")
    )


def test_importance_is_the_rise_with_zeroed_columns_and_a_skipped_block(model: GPT) -> None:
    tokens = torch.randint(V, (8 * 6 + 1,)).numpy()
    x, y = validation_windows(tokens, model)
    with OnlyFloat32() if model.config.position != "rope" else nullcontext():
        measured = ablate(model, x, y)
    naive, width = naive_twin(model), model.config.n_embd // model.config.n_head
    with torch.no_grad():
        whole = float(F.cross_entropy(naive(x).flatten(0, 1), y.flatten()))
        assert measured.loss == pytest.approx(whole, abs=1e-5)
        assert measured.tokens == x.numel() == 48
        assert [len(measured.heads), len(measured.blocks)] == [model.config.n_layer] * 2
        for i in range(model.config.n_layer):
            for h in range(model.config.n_head):
                silenced = copy.deepcopy(naive)
                silenced.layers[i].attention.out.weight[:, h * width : (h + 1) * width] = 0
                rises = [
                    F.cross_entropy(silenced(a[None])[0], b) - F.cross_entropy(naive(a[None])[0], b)
                    for a, b in zip(x, y, strict=True)
                ]
                windows = torch.stack(rises)
                assert measured.heads[i][h].rise == pytest.approx(float(windows.mean()), abs=1e-5)
                assert measured.heads[i][h].error == pytest.approx(float(windows.std() / math.sqrt(6)), abs=1e-5)
            shorter = copy.deepcopy(naive)
            shorter.layers = nn.ModuleList([layer for j, layer in enumerate(naive.layers) if j != i])
            loss = float(F.cross_entropy(shorter(x).flatten(0, 1), y.flatten()))
            assert measured.blocks[i].rise == pytest.approx(loss - whole, abs=1e-5)


def test_looking_changes_nothing(model: GPT, tmp_path: Path) -> None:
    """Neither weights nor modules, nor hooks left behind; also where looking fails halfway."""
    before, blocks = model(IDS[None]), list(model.blocks)
    x, y = validation_windows(np.arange(40) % V, model)
    ablate(model, x, y)
    capture(model, IDS)
    if model.config.n_layer:

        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ablate(model, x, y, stop)
    assert list(model.blocks) == blocks
    assert torch.equal(model(IDS[None]), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_validation_windows_spread_evenly_and_cost_what_was_promised() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4), 101)
    tokens = np.arange(101)
    x, y = validation_windows(tokens, model, limit=16)
    assert x[:, 0].tolist() == [0, 32, 64, 96]
    assert torch.equal(y, x + 1)
    assert validation_windows(tokens, model)[0].numel() == 100
    assert validation_windows(tokens[:3], model)[0].tolist() == [[0, 1]]  # shorter than the context
    endless = GPT(ModelConfig(n_layer=0, n_embd=8, block_size=1 << 20, position="none"), 200)
    assert validation_windows(np.arange(5000) % 200, endless)[0].shape == (4, 1024)
    big = GPT(ModelConfig(), 65)  # gpt.yaml's shape
    assert 1024 <= affordable_tokens(big) <= 8192


def patterned(rows: list[list[float]]) -> Tensor:
    return torch.tensor([rows])


def test_patterns_are_one_where_all_weight_follows_them_and_zero_where_none_is_preferred() -> None:
    ids, T = torch.tensor([1, 2, 1, 2, 1]), 5
    uniform = torch.ones(1, T, T).tril() / torch.arange(1, T + 1)[None, :, None]
    for name, (score, _) in pattern_scores(uniform, ids).items():
        if not name.startswith("distance"):
            assert float(score) == pytest.approx(1 if name == "spread" else 0, abs=1e-6), name
    previous = torch.zeros(1, T, T)
    previous[0, range(1, T), range(T - 1)] = 1
    previous[0, 0, 0] = 1
    start = torch.zeros(1, T, T)
    start[0, :, 0] = 1
    same = torch.eye(T)[None].clone()
    for t in (2, 3, 4):
        same[0, t] = 0
        same[0, t, t - 2] = 1
    for name, weights in (("previous token", previous), ("start of text", start), ("same token", same)):
        scores = pattern_scores(weights, ids)
        assert float(scores[name][0]) == pytest.approx(1)
        assert float(scores["spread"][0]) == pytest.approx(0, abs=1e-6)
    assert float(pattern_scores(previous, ids)["distance 1"][0]) == 1
    assert float(pattern_scores(same, ids)["same token"][0]) == pytest.approx(1)


def test_induction_is_the_weight_behind_the_first_time() -> None:
    period = 4
    weights = torch.zeros(2, 8, 8)
    for t in range(8):
        weights[0, t, t - period + 1 if t >= period else 0] = 1
        weights[1, t] = (torch.arange(8) <= t) / (t + 1)
    score, n = induction_score(weights, period)
    assert n == 4
    assert score.tolist() == pytest.approx([1, 0], abs=1e-6)


def test_texts_too_short_to_tell_say_so(tmp_path: Path) -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=1), V)
    assert repeated_sequences(model) == []
    report = report_of(model, tmp_path, ids=[3])
    assert [head["scores"] for head in report["heads"]] == [
        dict.fromkeys(("previous token", "same token", "induction", "start of text"))
    ] * 2
    assert report["text"]["at"] == [None]
    assert report["text"]["loss"] is None


def test_a_model_trained_on_repetition_has_an_induction_head_and_a_head_that_feeds_it() -> None:
    """Olsson et al. 2022: what repeats is learned by two heads in a row. The second looks at what came after the same
    token the last time; it finds that by what the first, which looks one back, has written there. Periods vary, so
    that no fixed distance will do."""
    context, vocabulary, batch = 32, 24, 32
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=48, block_size=context, mlp="gelu", init="torch"), vocabulary)
    texts = [torch.randint(vocabulary, (context,))]
    untrained = [head for layer in measure_heads(model, texts) for head in layer]
    assert not any(head.role == "induction" for head in untrained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    model.train()
    for _ in range(450):
        period = int(torch.randint(6, context // 2 + 1, ()))
        seen = torch.randint(vocabulary, (batch, period))[:, torch.arange(context + 1) % period]
        loss = lm_loss(model(seen[:, :-1]), seen[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, second = measure_heads(model, texts)
    assert any(head.role == "previous token" for head in first)
    assert any(head.role == "induction" and (head.scores["induction"] or 0) > 0.6 for head in second)
    assert not any(head.role == "induction" for head in first)
    # And these heads are what it predicts with: on repeated text, they carry it.
    text = torch.cat(repeated_sequences(model)).numpy()[: context * 3 + 1]
    x, y = validation_windows(text, model)
    rises = ablate(model, x, y)
    feeding = max(range(2), key=lambda h: first[h].scores["previous token"] or 0)
    assert rises.heads[0][feeding].rise > 1
    assert rises.blocks[1].rise > 1  # the two that induce stand in for each other; without both, nothing is copied


def test_embeddings_plane_is_the_singular_value_decomposition(tmp_path: Path) -> None:
    model = GPT(ModelConfig(n_layer=0, n_embd=6, block_size=8), V)
    found = report_of(model, tmp_path)["embeddings"]
    table = model.token_embedding.weight.detach().double().numpy()
    centred = table - table.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    assert found["explained"] == pytest.approx((s**2 / (s**2).sum())[:2], abs=1e-4)
    for axis in range(2):
        mine, theirs = np.array(found["places"])[:, axis], u[:, axis] * s[axis]
        assert abs(mine) == pytest.approx(abs(theirs), abs=1e-4)
        assert mine[abs(mine).argmax()] > 0
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    for i in range(V):
        cosines = unit @ unit[i]
        cosines[i] = -9
        assert found["neighbours"][i] == np.argsort(-cosines)[:5].tolist()
        assert found["cosines"][i] == pytest.approx(np.sort(cosines)[::-1][:5], abs=1e-5)
    assert found["kinds"] == [0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1]  # a, e and i are vowels


def test_heads_of_a_width_of_their_own_are_seen_whole(tmp_path: Path) -> None:
    config = ModelConfig(
        n_layer=1, n_head=3, n_embd=16, head_width=6, block_size=8, position="rope", mlp="gelu_tanh", norm_eps=1e-3
    )
    found = report_of(GPT(config, V), tmp_path)
    assert found["positions"]["wavelengths"] == pytest.approx([2 * math.pi * 10000 ** (i / 3) for i in range(3)])
    assert [len(head) for head in found["attention"]["queries"][0]] == [8, 8, 8]
    assert {len(query) for head in found["attention"]["queries"][0] for query in head} == {6}


def test_positions_are_cosines_or_wavelengths(tmp_path: Path) -> None:
    learned = GPT(ModelConfig(n_layer=0, n_embd=6, block_size=8), V)
    similarity = report_of(learned, tmp_path)["positions"]["similarity"]
    table = F.normalize(learned.position_embedding.weight, dim=1)  # type: ignore[union-attr]
    assert np.array(similarity) == pytest.approx((table @ table.T).detach().numpy(), abs=1e-5)
    rotary = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, position="rope"), V)
    wavelengths = report_of(rotary, tmp_path)["positions"]["wavelengths"]
    assert wavelengths == pytest.approx([2 * math.pi * 10000 ** (i / 4) for i in range(4)])
    # A whole turn later, a pair stands where it stood: the model's own table agrees.
    from minigpt_cli.core.layers import rotary_table

    cosines, _ = rotary_table(torch.tensor([0.0, wavelengths[1]]), 8, 10000.0)
    assert float(cosines[1, 1]) == pytest.approx(1, abs=1e-6)


def test_how_much_text_fits_a_page() -> None:
    assert most_tokens(ModelConfig()) == 256  # gpt.yaml's whole context
    assert most_tokens(ModelConfig(n_layer=0, block_size=8)) == 8
    assert most_tokens(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4096)) == MAX_SHOWN
    assert most_tokens(ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024)) < 100
    assert most_tokens(ModelConfig(n_layer=1, n_head=1024, n_embd=1024, block_size=1024)) == 128  # 1,024 square maps


def test_a_longer_prompt_counts_with_its_newest_tokens(tmp_path: Path) -> None:
    model = GPT(ModelConfig(n_layer=0, n_embd=8, block_size=4), V)
    saved = made_checkpoint(tmp_path, model, CharTokenizer("abcdefghijk"))
    text = given_text(saved, "abcdefg", "--prompt")
    assert text.ids == [3, 4, 5, 6]
    assert text.note == "The text has 7 tokens and the context is 4: its newest count."
    for prompt, message in (("", "--prompt: the text is empty"), ("az", r"--prompt: .*not in the vocabulary.*'z'")):
        with pytest.raises(UserError, match=message):
            given_text(saved, prompt, "--prompt")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8), V)
    with torch.no_grad():
        model.head.bias[3] = math.nan
    with pytest.raises(MinigptError, match=r"head\.bias are not finite"):
        report_of(model, tmp_path)
