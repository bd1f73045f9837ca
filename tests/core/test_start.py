"""A new run from another's weights: the same function at its first step, and no other model than it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt_cli.core.checkpoint import Checkpoint, Header, Progress
from minigpt_cli.core.config import Config, parse_config
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.model import GPT
from minigpt_cli.core.start import starting_point, with_model_of
from minigpt_cli.core.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijk")
SHAPE: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "mlp": "gelu", "dropout_attn": 0.3}


def source_of(**options: Any) -> Checkpoint:
    """A checkpoint in memory, of random weights."""
    config = parse_config({"model": SHAPE | options, "train": {"max_iters": 7}}, "source")
    model = GPT(config.model, TOKENIZER.vocab_size)
    tensors = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    header = Header(
        config=config.model_dump(), tokenizer=TOKENIZER.to_json(), step=7, tokens_seen=99, val_loss=1.0,
        dataset_fingerprint="f", weights="averaged", progress=Progress(step=7, best_loss=0.5), versions={},
        checksums={},
    )  # fmt: skip
    return Checkpoint(Path("runs/best.safetensors"), header, config, TOKENIZER, tensors)


def settings(**model: Any) -> Config:
    return parse_config({"model": model, "train": {"max_iters": 50}}, "test")


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (8, 4), (1, 1)])
@pytest.mark.parametrize("tie", [True, False])
def test_the_first_step_has_the_logits_of_the_source(position: str, before: int, after: int, tie: bool) -> None:
    source = source_of(position=position, vocab_multiple=before, tie_weights=tie)
    config = with_model_of(settings(block_size=5, vocab_multiple=after), source.config.model, "source")
    start = starting_point(source, config)
    ids = torch.randint(11, (3, 5))
    with torch.no_grad():
        expected, found = (checkpoint.model().eval()(ids) for checkpoint in (source, start))
    # A head of other rows is another product, which some processors sum in another order: rounding, no more.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert start.model().head.weight.shape[0] == -(-11 // after) * after


def test_nothing_else_of_its_history_comes_along() -> None:
    source = source_of()
    header = starting_point(source, with_model_of(settings(), source.config.model, "source")).header
    assert (header.step, header.tokens_seen, header.val_loss, header.weights) == (0, 0, None, "trained")
    assert header.progress == Progress()
    assert header.initialised_from is not None
    assert header.initialised_from.model_dump() == {
        "name": "best.safetensors", "step": 7, "dataset_fingerprint": "f",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "model"),
    [
        ({}, SHAPE),  # all of it from the source
        ({"n_layer": 1, "mlp": "gelu"}, SHAPE),  # which is what it is
        ({"dropout": 0.1}, SHAPE | {"dropout": 0.1, "dropout_attn": None}),  # the new run's choice, as a whole
        ({"block_size": 4, "vocab_multiple": 64}, SHAPE | {"block_size": 4, "vocab_multiple": 64}),
    ],
    ids=str,
)
def test_what_the_config_says_of_the_model_holds_and_the_rest_comes_from_the_source(
    said: dict[str, Any], model: dict[str, Any]
) -> None:
    config = with_model_of(settings(**said), source_of().config.model, "source")
    assert config.model == parse_config({"model": model}, "test").model
    assert config.train.max_iters == 50


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"n_layer": 2, "mlp": "relu"}, "(model.n_layer: 2, there 1, model.mlp: relu, there gelu)"),
        ({"tie_weights": True}, "--config finetune"),
        ({"block_size": 9}, "model.block_size 9 is more than the 8 tokens"),
    ],
    ids=str,
)
def test_another_model_is_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        with_model_of(settings(**said), source_of().config.model, "source")
