"""The embedding tables, as a plane, as neighbours, as a map of positions. Knows torch, no HTML.

Shapes: V vocabulary, C width, N points shown, P positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.model import GPT

MAX_POINTS = 600  # tokens drawn and given neighbours: more would be a cloud
MAX_POSITIONS = 128  # rows and columns of the map of positions
NEIGHBOURS = 5


@torch.no_grad()
def embedding_plane(model: GPT, first: list[int]) -> dict[str, Any]:
    """The token embeddings' two principal components and their nearest neighbours by cosine.

    Of a large vocabulary, the components are of all tokens, but only MAX_POINTS are drawn: the ids `first`, then the
    lowest. `explained` is the share of the variance along each component; every sign is chosen so that the largest
    coordinate is positive, so that the same weights always give the same picture.
    """
    table_VC = model.token_embedding.weight[: model.vocab_size].detach().float().cpu()
    V = len(table_VC)
    ids = sorted(list(dict.fromkeys([*first, *range(min(V, MAX_POINTS))]))[:MAX_POINTS])
    centred_VC = table_VC - table_VC.mean(dim=0)
    variances_C, axes_CC = torch.linalg.eigh(centred_VC.T @ centred_VC)  # ascending
    axes_C2 = axes_CC[:, -2:].flip(1)
    places_V2 = centred_VC @ axes_C2
    places_V2 = places_V2 * places_V2.gather(0, places_V2.abs().argmax(dim=0, keepdim=True)).sign()
    if places_V2.shape[1] < 2:  # a model of width one
        places_V2 = F.pad(places_V2, (0, 2 - places_V2.shape[1]))
    total = float(variances_C.clamp(min=0).sum())
    explained = [float(v) / total if total > 0 else 0.0 for v in variances_C[-2:].flip(0).clamp(min=0)]
    unit_VC = F.normalize(table_VC, dim=1)
    cosines_NV = unit_VC[ids] @ unit_VC.T
    cosines_NV[torch.arange(len(ids)), ids] = -math.inf  # no token is its own neighbour
    nearest = cosines_NV.topk(min(NEIGHBOURS, V - 1), dim=1)
    return {
        "vocabulary": V, "explained": [*explained, 0.0][:2], "ids": ids, "places": places_V2[ids].numpy(),
        "norms": table_VC[ids].norm(dim=1).numpy(),
        "neighbours": nearest.indices.tolist(), "cosines": nearest.values.numpy(),
    }  # fmt: skip


@torch.no_grad()
def positions(model: GPT) -> dict[str, Any]:
    """How the model knows where a token stands: learned vectors (cosines), rotation (wavelengths), or nothing."""
    if model.position_embedding is not None:
        table_PC = model.position_embedding.weight.detach().float().cpu()
        step = math.ceil(len(table_PC) / MAX_POSITIONS)
        unit_PC = F.normalize(table_PC[::step], dim=1)
        return {"kind": "learned", "step": step, "similarity": (unit_PC @ unit_PC.T).numpy()}
    if model.config.position == "rope":
        return {"kind": "rope", "wavelengths": wavelengths(model.config)}
    return {"kind": "none"}


def wavelengths(config: ModelConfig) -> list[float]:
    """Tokens that each rotated pair of a head's width takes for a whole turn (Su et al. 2021, arXiv:2104.09864)."""
    width = config.each_head
    return [2 * math.pi * config.rope_base ** (pair / width) for pair in range(0, width, 2)]
