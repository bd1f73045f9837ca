"""How good a model is on a whole split, and what counting models score on the same tokens.

Shapes: B windows side by side, T block_size, V vocabulary. Losses are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from minigpt_cli.core.config import RuntimeConfig, parse_section
from minigpt_cli.core.dataset import Array, Tokens, pieces, require_ids
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.model import GPT
from minigpt_cli.core.runtime import Runtime
from minigpt_cli.core.tokenizer import Tokenizer

EVALUATED_AT_ONCE = 16384  # tokens, at most
MAX_LOGITS = 1 << 26  # at once: 256 MB in float32; on a GPU with more memory, a sixteenth of that
LOGIT_BYTES = 10  # of one logit in 16 bits, its float32 copy and its log-probability
MAX_COUNTED = 20_000_000  # tokens that a bigram model is scored on; and counted on, if the vocabulary is large


@dataclass(frozen=True)
class Score:
    """`loss` is the mean over `tokens` predictions; `standard_error` is of that mean, taken over windows, whose tokens
    are not independent of each other but nearly so of other windows'. `accuracy` is top-1."""

    loss: float
    standard_error: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluation_settings(device: str, trained_in: str) -> RuntimeConfig:
    """Evaluate in a precision like that of the training, or exactly. UserError for what is no device."""
    precision = "fp32" if trained_in == "fp32" else "auto"
    return parse_section(RuntimeConfig, {"device": device, "precision": precision}, "--device")


@torch.no_grad()
def evaluate(
    model: GPT, tokens: Tokens, runtime: Runtime, *,
    progress: Callable[[int, int], None] | None = None, stop: Callable[[], object] | None = None,
) -> Score | None:  # fmt: skip
    """Score every token of the split but the first, in fixed windows that do not overlap; the last may be shorter.

    Draws nothing at random. Returns None if `stop` turned true on the way. Raises UserError below two tokens. Ranks
    share the windows, and each gets the same score; all must take part.
    """
    if len(tokens) < 2:
        raise UserError(f"this text has {len(tokens)} token(s); evaluating needs at least 2")
    was_training = model.training
    model.eval()
    world, at_once = runtime.world, _logits_at_once(runtime)
    windows = _windows(tokens, model.config.block_size, model.vocab_size, at_once)
    counts = np.array([y.shape[1] for _, y in windows for _ in range(len(y))])  # tokens of each row
    begin = np.cumsum([0, *(len(y) for _, y in windows)])  # of each batch's rows
    losses_N = torch.zeros(len(counts), device=runtime.device)
    hits = torch.zeros((), dtype=torch.long, device=runtime.device)
    for first in range(0, len(windows), world.size):
        if stop is not None and stop():
            model.train(was_training)
            return None
        turn = first + world.rank
        x, y = windows[min(turn, len(windows) - 1)]  # a sliced model takes every rank to run, if only for show
        require_ids(x, model.vocab_size)
        require_ids(y, model.vocab_size)
        x_BT, y_BT = (_on_device(ids, runtime.device) for ids in (x, y))
        with runtime.autocast():
            logits_BTV = model(x_BT)
        losses_BT = F.cross_entropy(logits_BTV.float().flatten(0, 1), y_BT.flatten(), reduction="none").view_as(y_BT)
        if turn < len(windows):
            losses_N[begin[turn] : begin[turn + 1]] = losses_BT.sum(dim=1)
            hits += (logits_BTV.argmax(dim=-1) == y_BT).sum()
        if progress is not None:
            progress(min(first + world.size, len(windows)), len(windows))
    model.train(was_training)
    sums = world.total(losses_N).cpu().numpy().astype(np.float64)
    loss = float(sums.sum() / counts.sum())
    deviations = sums - loss * counts
    error = math.sqrt((deviations**2).sum() * len(sums) / max(1, len(sums) - 1)) / counts.sum()
    return Score(loss, float(error), int(world.total(hits)) / int(counts.sum()), int(counts.sum()))


def _logits_at_once(runtime: Runtime) -> int:
    """How many logits the device may hold at once. Of several kinds of device the smallest decides: ranks take turns
    with the same batches. By the size of the memory, not by what is free, so that the same run gives the same bits."""
    memory = runtime.memory_bytes
    return -runtime.world.largest(-max(MAX_LOGITS, memory // (16 * LOGIT_BYTES)) if memory else -MAX_LOGITS)


def _on_device(ids: Array, device: torch.device) -> torch.Tensor:
    """Token ids as int64. On a GPU the copy is only ordered: the host prepares the next batch meanwhile."""
    host = torch.from_numpy(ids.astype(np.int64))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _windows(tokens: Tokens, block_size: int, vocab_size: int, max_logits: int) -> list[tuple[Array, Array]]:
    """(x, y) pairs of shape (B, T), y one token ahead, that cover every prediction once."""
    full = (len(tokens) - 1) // block_size
    rows = max(1, min(EVALUATED_AT_ONCE // block_size, max_logits // (block_size * vocab_size)))
    pairs = []
    for first in range(0, full, rows):
        begin, end = first * block_size, min(first + rows, full) * block_size
        pairs.append((tokens[begin:end].reshape(-1, block_size), tokens[begin + 1 : end + 1].reshape(-1, block_size)))
    if (rest := full * block_size) < len(tokens) - 1:
        pairs.append((tokens[rest:-1][None], tokens[rest + 1 :][None]))
    return pairs


def text_size(tokens: Tokens, tokenizer: Tokenizer) -> tuple[int, int]:
    """(characters, UTF-8 bytes) of the text that the tokens after the first stand for: what a loss is spread over."""
    texts = tokenizer.token_bytes()
    n_bytes = np.array([len(text) for text in texts])
    n_characters = np.array([sum(byte & 0xC0 != 0x80 for byte in text) for text in texts])  # not continuation bytes
    counts = _count(tokens, len(texts), start=1)
    return int(counts @ n_characters), int(counts @ n_bytes)


def baselines(train: Tokens, tokens: Tokens, vocab_size: int) -> dict[str, float]:
    """What models that only count score on `tokens`, having counted `train`: nats per token, as `evaluate` gives.

    uniform: every token alike. unigram: how often each came, plus one (Laplace). bigram: how often each came after the
    one before it, backed off to the unigram with one pseudo-count per context (MacKay & Peto 1995). Of a long split
    the first `MAX_COUNTED` tokens are scored.
    """
    train = train[:MAX_COUNTED] if vocab_size > 4096 else train
    tokens = tokens[:MAX_COUNTED]
    counts = _count(train, vocab_size)
    unigram = (counts + 1.0) / (counts + 1.0).sum()
    before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    pairs = _count_pairs(train, vocab_size, wanted=before * vocab_size + after)
    contexts = counts - np.bincount(train[-1:], minlength=vocab_size)
    bigram = (pairs + unigram[after]) / (contexts[before] + 1.0)
    return {
        "uniform": math.log(vocab_size),
        "unigram": float(-np.log(unigram[after]).mean()),
        "bigram": float(-np.log(bigram).mean()),
    }


def _count(tokens: Tokens, vocab_size: int, start: int = 0) -> Array:
    """How often each id comes from `start` on. In pieces: numpy counts with eight bytes for each token."""
    counts = np.zeros(vocab_size, np.int64)
    for piece in pieces(tokens, vocab_size, start):
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def _count_pairs(train: Tokens, vocab_size: int, wanted: Array) -> Array:
    """How often each wanted pair (first * V + second) stands in `train`."""
    if vocab_size <= 4096:
        table = np.zeros(vocab_size * vocab_size, np.int64)
        for start in range(0, len(train) - 1, 1 << 22):  # in pieces: the codes are eight bytes each
            piece = train[start : start + (1 << 22) + 1].astype(np.int64)
            table += np.bincount(piece[:-1] * vocab_size + piece[1:], minlength=len(table))
        return table[wanted]
    codes, counts = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    places = np.searchsorted(codes, wanted).clip(max=len(codes) - 1)
    return np.where(codes[places] == wanted, counts[places], 0)
