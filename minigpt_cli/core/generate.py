"""From a prompt to more tokens: prefill, decode with the cache, choose. Knows ids, not text.

Shapes: B samples side by side, P prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt_cli.core.errors import MinigptError
from minigpt_cli.core.layers import KVCache, compute_dtype
from minigpt_cli.core.model import GPT

GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing by it would overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_k` and `top_p` cut the tail before drawing."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@torch.inference_mode()
def generate(
    model: GPT, prompt_BP: Tensor, n_tokens: int, sampling: Sampling, *,
    generator: torch.Generator | None = None, exact_window: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield `n_tokens` times (ids (B,), the logits (B, V) they were chosen from), extending `prompt_BP` (P >= 1).

    Only the newest `block_size` tokens of a longer prompt count. Past the window, rotary models slide: each new token
    takes the oldest's place in the cache, whose keys and values still know of what came before them. Learned positions
    cannot slide: the newest half is kept and prefilled again. `exact_window` instead recomputes the newest `block_size`
    tokens for every token, as the seed does: slower, and each token sees exactly the longest context it can.
    """
    model.eval()
    window = model.config.block_size
    context_BT = prompt_BP[:, -window:]
    weight = model.token_embedding.weight
    cache = KVCache(prompt_BP.shape[0], model.config, weight.device, compute_dtype(weight))
    new_BT = context_BT
    for _ in range(n_tokens):
        if cache.length + new_BT.shape[1] > window and (exact_window or not model.slides):
            cache.clear()
            new_BT = context_BT[:, -window:] if exact_window else context_BT[:, -max(1, window // 2) :]
        logits_BV = model(new_BT, cache)[:, -1].float()
        ids_B = choose(logits_BV, sampling, generator)
        yield ids_B, logits_BV
        new_BT = ids_B[:, None]
        context_BT = torch.cat([context_BT[:, -(window - 1) :] if window > 1 else context_BT[:, :0], new_BT], dim=1)


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One id per row, (B,), from softmax(logits / temperature) after top-k and top-p (nucleus: arXiv:1904.09751)."""
    if sampling.temperature < GREEDY_BELOW:
        return logits_BV.argmax(dim=-1)
    if not torch.isfinite(logits_BV).all():
        raise MinigptError("the model's output is not finite: its weights are damaged, or training diverged")
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        weakest = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < weakest, float("-inf"))
    probs_BV = logits_BV.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        beyond = sorted_BV.cumsum(dim=-1) - sorted_BV >= sampling.top_p  # never true of the likeliest
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(beyond, 0.0))
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(-1)
