"""All the numbers of a report, from a checkpoint and a text, as plain data. Knows torch, no HTML.

Shapes: T tokens, V vocabulary, L layers, H heads, K key heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt_cli import __version__
from minigpt_cli.core.checkpoint import Checkpoint
from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.model import GPT
from minigpt_cli.extras.inspect.ablation import Ablations, Rise, ablate, validation_windows
from minigpt_cli.extras.inspect.capture import Capture, capture
from minigpt_cli.extras.inspect.embeddings import embedding_plane, positions
from minigpt_cli.extras.inspect.heads import MAX_WINDOW, measure_heads
from minigpt_cli.extras.inspect.labels import KINDS, token_kind, token_label, visible
from minigpt_cli.extras.inspect.stream import direct_push, logit_lens, stream_norms
from minigpt_cli.extras.inspect.text import Text, Validation
from minigpt_cli.extras.inspect.training import training

ALTERNATIVES = 5
ROLE_TOKENS = 1024  # tokens of the validation text that roles are measured on

Report = dict[str, Any]


def analyse(
    checkpoint: Checkpoint, model: GPT, text: Text, validation: Validation,
    progress: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """The report: strings, numbers, lists, dictionaries and numpy arrays. `as_plain` makes JSON of it.

    Raises MinigptError if the model's weights or its output are not finite.
    """
    _require_finite(model)
    ids_T = torch.tensor(text.ids, device=model.token_embedding.weight.device)
    captured = capture(model, ids_T)
    predictions = _predictions(captured.logits, ids_T)
    embeddings = embedding_plane(model, text.ids)
    lens = logit_lens(model, ids_T, captured)
    ablations, role_texts = None, [ids_T]
    if validation.tokens is not None:
        x_BT, y_BT = validation_windows(validation.tokens, model)
        ablations = ablate(model, x_BT, y_BT, progress)
        role_texts = list(x_BT[:, :MAX_WINDOW].split(1)[: max(1, ROLE_TOKENS // min(x_BT.shape[1], MAX_WINDOW))])
        role_texts = [window[0] for window in role_texts]
    pieces = checkpoint.tokenizer.token_bytes()
    used = {id for ids in (text.ids, embeddings["ids"], *embeddings["neighbours"]) for id in ids}
    used |= {id for p in [*predictions["at"], predictions["next"]] if p is not None for id in p["ids"]}
    used |= {id for row in lens["ids"] for ids in row for id in ids}
    kinds = [KINDS.index(token_kind(pieces[id])) for id in embeddings["ids"]]
    return {
        "format": 1,
        "model": _model(checkpoint, model),
        "text": {"source": visible(text.source), "note": text.note, "ids": text.ids} | predictions,
        "labels": {str(id): token_label(pieces[id]) for id in sorted(used)},
        "embeddings": embeddings | {"kind_names": list(KINDS), "kinds": kinds},
        "positions": positions(model),
        "attention": _attention(captured),
        "heads": _heads(model, role_texts, ablations),
        "roles_from": "the validation text" if validation.tokens is not None else "the text above",
        "stream": {"norms": stream_norms(captured), "lens": lens, "push": direct_push(model, ids_T, captured)},
        "validation": _validation(validation, ablations),
        "training": training(checkpoint.path),
    }


def as_plain(value: Any) -> Any:
    """The report as JSON holds it: arrays as lists, numbers of some six digits, None for what is not finite.

    Of attention's scores and weights, row t keeps its t + 1 numbers: those of the past and of t itself.
    """
    if isinstance(value, dict):
        ragged = ("scores", "weights")
        return {
            key: _past(item) if key in ragged and isinstance(item, np.ndarray) else as_plain(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        rounded = np.round(value.astype(np.float64), 6)
        return rounded.tolist() if np.isfinite(rounded).all() else as_plain(rounded.tolist())
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def _past(table: Any) -> Any:
    """(..., T, T) -> nested lists, the row of each t cut behind t."""
    if table.ndim > 2:
        return [_past(part) for part in table]
    return [row[: t + 1] for t, row in enumerate(as_plain(table))]


def _require_finite(model: GPT) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise MinigptError(f"the weights {name} are not finite: they are damaged, or training diverged")


def _model(checkpoint: Checkpoint, model: GPT) -> Report:
    header, config = checkpoint.header, checkpoint.config.model
    val_loss = header.val_loss if header.val_loss is not None and math.isfinite(header.val_loss) else None
    return {
        "checkpoint": visible(checkpoint.path.name), "step": header.step, "val_loss": val_loss,
        "tokens_seen": header.tokens_seen, "parameters": model.parameter_counts(), "vocabulary": model.vocab_size,
        "tokenizer": checkpoint.tokenizer.kind, "config": config.model_dump(),
        "n_kv_head": config.n_kv_head or config.n_head, "minigpt": __version__,
    }  # fmt: skip


def _predictions(logits_TV: Tensor, ids_T: Tensor) -> Report:
    """`at`: for each token but the first (None), what the model expected there: the token's probability, its rank
    (1 is the likeliest), its surprise in bits, and the likeliest alternatives. `next`: what it expects to follow."""
    log_TV = logits_TV.log_softmax(dim=1)
    top = log_TV.topk(min(ALTERNATIVES, log_TV.shape[1]), dim=1)
    probabilities = top.values.exp().cpu().numpy()
    likeliest = [
        {"ids": ids, "probabilities": row} for ids, row in zip(top.indices.tolist(), probabilities, strict=True)
    ]
    right_T = log_TV[:-1].gather(1, ids_T[1:, None])
    ranks = (log_TV[:-1] > right_T).sum(dim=1) + 1
    at: list[Report | None] = [None]
    for value, rank, row in zip(right_T[:, 0].tolist(), ranks.tolist(), likeliest, strict=False):
        at.append({"probability": math.exp(value), "bits": -value / math.log(2), "rank": rank} | row)
    loss = float(-right_T.mean()) if len(right_T) else None
    return {"at": at, "next": likeliest[-1], "loss": loss}


def _attention(captured: Capture) -> Report:
    """Queries (L, H, T, D), keys (L, K, T, D), scores (L, H, T, T), weights, and from where on each t sees (L, T)."""
    layers = captured.attention
    if not layers:
        return {}
    return {
        "scale": layers[0].scale,
        "first": torch.stack([layer.visible.int().argmax(dim=1) for layer in layers]).tolist(),
        "queries": torch.stack([layer.queries for layer in layers]).cpu().numpy(),
        "keys": torch.stack([layer.keys for layer in layers]).cpu().numpy(),
        "scores": torch.stack([layer.scores() for layer in layers]).cpu().numpy(),
        "weights": torch.stack([layer.weights() for layer in layers]).cpu().numpy(),
    }


def _heads(model: GPT, texts: list[Tensor], ablations: Ablations | None) -> list[Report]:
    found = []
    for layer, heads in enumerate(measure_heads(model, texts)):
        for head, measured in enumerate(heads):
            rise = ablations.heads[layer][head] if ablations is not None else None
            found.append({"layer": layer, "head": head} | asdict(measured) | {"importance": _rise(rise)})
    return found


def _validation(validation: Validation, ablations: Ablations | None) -> Report:
    if ablations is None:
        return {"tokens": 0, "note": visible(validation.note)}
    return {
        "path": visible(validation.path), "note": visible(validation.note), "tokens": ablations.tokens,
        "loss": ablations.loss, "skipped": [_rise(rise) for rise in ablations.blocks],
    }  # fmt: skip


def _rise(rise: Rise | None) -> Report | None:
    return None if rise is None else asdict(rise)
