"""Decoding without a cache: the whole context is computed again for every token.

Shapes: B batch, T time, V vocabulary. `model` is any function from ids (B, T) to logits (B, T, V).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def crop_and_recompute(
    model: Callable[[Tensor], Tensor], ids_BT: Tensor, n_tokens: int, block_size: int, *, greedy: bool = True
) -> Tensor:
    """The seed's way: look at the newest `block_size` tokens, add one, start over. (B, T) -> (B, T + n_tokens)."""
    for _ in range(n_tokens):
        last_BV = model(ids_BT[:, -block_size:])[:, -1]
        best_B1 = last_BV.argmax(dim=1, keepdim=True)
        next_B1 = best_B1 if greedy else torch.multinomial(torch.softmax(last_BV, dim=1), 1)
        ids_BT = torch.cat([ids_BT, next_B1], dim=1)
    return ids_BT


@torch.no_grad()
def keep_half_and_recompute(
    model: Callable[[Tensor], Tensor], prompt: list[int], n_tokens: int, block_size: int
) -> tuple[list[int], list[Tensor]]:
    """Greedy, one stream: the context grows to `block_size`, then shrinks to its newest half, and grows again.

    Half of an odd window is rounded down, and no less than one token is kept. Returns the new ids and their logits (V).
    """
    context, ids, logits = prompt[-block_size:], [], []
    for _ in range(n_tokens):
        if len(context) > block_size:
            context = context[-max(1, block_size // 2) :]
        logits.append(model(torch.tensor([context]))[0, -1])
        ids.append(int(logits[-1].argmax()))
        context = [*context, ids[-1]]
    return ids, logits
