"""The residual stream: how long its vectors are, what the model would say from it, who pushes the right token.

Knows torch, no HTML. Shapes: T tokens, C width, V vocabulary, L layers, P parts.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from minigpt_cli.core.model import GPT
from minigpt_cli.extras.inspect.capture import Capture, lens_logits

LENS_TOP = 3  # tokens kept of what the model would say after each layer


def stream_norms(captured: Capture) -> dict[str, Any]:
    """L2 norms at every position: of the stream (L + 1, T), and of what each part of each block added (L, T)."""
    streams = captured.streams
    added = [(after - before).norm(dim=1) for before, after in pairwise(streams)]
    return {
        "stream": _rows([x.norm(dim=1) for x in captured.after_blocks]),
        "attention": _rows(added[::2]), "feed_forward": _rows(added[1::2]),
    }  # fmt: skip


@torch.no_grad()
def logit_lens(model: GPT, ids_T: Tensor, captured: Capture) -> dict[str, Any]:
    """What the model would say after the embedding and after each block, at each position (nostalgebraist 2020).

    `ids` and `probabilities` (L + 1, T, 3) are the likeliest tokens; `right` (L + 1, T - 1) is the probability of the
    token that did come, and `loss` (L + 1) the mean of its negative logarithm, in nats. The last row is the model's
    own output.
    """
    ids, probabilities, right, losses = [], [], [], []
    for stream_TC in captured.after_blocks:
        log_TV = lens_logits(model, ids_T, stream_TC).log_softmax(dim=1)
        top = log_TV.topk(min(LENS_TOP, log_TV.shape[1]), dim=1)
        right_T = log_TV[:-1].gather(1, ids_T[1:, None])[:, 0]
        ids.append(top.indices.tolist())
        probabilities.append(top.values.exp())
        right.append(right_T.exp())
        losses.append(float(-right_T.mean()) if len(right_T) else None)
    return {"ids": ids, "probabilities": _rows(probabilities), "right": _rows(right), "loss": losses}


@torch.no_grad()
def direct_push(model: GPT, ids_T: Tensor, captured: Capture) -> dict[str, Any] | None:
    """How much each part raises the right token's logit above the mean logit of the vocabulary: direct logit
    attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

    The final norm is linear once its divisor at each position is taken as given, so the head's output is a sum over
    the parts that wrote to the stream: `values` (P, T - 1), whose sum over `parts` is `total` (T - 1). Logits that are
    capped are meant before the cap. None for a norm of a kind that this does not know.
    """
    frozen = _frozen_norm(model.norm, captured.streams[-1])
    if frozen is None:
        return None
    gain_TC, centre, offset_C = frozen
    weight_VC = model.head.weight[: model.vocab_size].float()
    push_TC = weight_VC[ids_T[1:]] - weight_VC.mean(dim=0)  # from logits to "above the vocabulary's mean"
    names, writes = _parts(model, captured)
    values = []
    for write_TC in writes:
        x_TC = write_TC[:-1].float()
        x_TC = x_TC - x_TC.mean(dim=1, keepdim=True) if centre else x_TC
        values.append((x_TC * gain_TC[:-1] * push_TC).sum(dim=1))
    constant_T = push_TC @ offset_C
    if model.head.bias is not None:
        constant_T = constant_T + model.head.bias[ids_T[1:]] - model.head.bias[: model.vocab_size].mean()
    if model.head.bias is not None or bool(offset_C.any()):
        names, values = [*names, "biases"], [*values, constant_T]
    head_TV = captured.uncapped[:-1]
    total_T = head_TV.gather(1, ids_T[1:, None])[:, 0] - head_TV.mean(dim=1)
    return {"parts": names, "values": _rows(values), "total": total_T.cpu().numpy()}


def _parts(model: GPT, captured: Capture) -> tuple[list[str], list[Tensor]]:
    """What was written to the stream, in order: names, and the vectors (T, C) that add up to its end."""
    streams = captured.streams
    names, writes = ["token embedding"], [captured.tokens]
    if model.position_embedding is not None:
        names.append("position embedding")
        writes.append(streams[0] - captured.tokens)
    for i in range(len(model.blocks)):
        names += [f"attention {i + 1}", f"feed-forward {i + 1}"]
        writes += [streams[2 * i + 1] - streams[2 * i], streams[2 * i + 2] - streams[2 * i + 1]]
    return names, writes


def _frozen_norm(norm: nn.Module, x_TC: Tensor) -> tuple[Tensor, bool, Tensor] | None:
    """The norm at x as gain * (x, centred or not) + offset, its divisor taken as given: gain (T, C), offset (C,)."""
    zero_C = torch.zeros(x_TC.shape[1], device=x_TC.device)
    if isinstance(norm, nn.Identity):
        return torch.ones_like(x_TC), False, zero_C
    if isinstance(norm, nn.LayerNorm):
        divisor_T = (x_TC.var(dim=1, unbiased=False) + norm.eps).sqrt()
        return norm.weight / divisor_T[:, None], True, norm.bias if norm.bias is not None else zero_C
    if isinstance(norm, nn.RMSNorm):
        divisor_T = (x_TC.square().mean(dim=1) + (norm.eps or math.ulp(0.0))).sqrt()
        return norm.weight / divisor_T[:, None], False, zero_C
    return None


def _rows(rows: list[Tensor]) -> Any:
    """Equally long rows as one numpy array; an empty list where there are none."""
    return torch.stack(rows).float().cpu().numpy() if rows else []
