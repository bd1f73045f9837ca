"""Which text is looked at, and on which text the parts are measured. Knows tokens and datasets, no HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt_cli.core.checkpoint import Checkpoint
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.dataset import Dataset, Tokens, require_known_tokens
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.generate import Sampling, generate
from minigpt_cli.core.model import GPT
from minigpt_cli.core.tokenizer import same_ids

MAX_NUMBERS = 1_300_000  # queries' and keys' numbers that a page of 5 MB can hold
MAX_SCORES = 1 << 24  # weights of all heads together: 64 MB in float32
MAX_SHOWN = 512  # tokens that a page shows with ease
DEFAULT_SHOWN = 128


@dataclass(frozen=True)
class Text:
    """The tokens looked at, where they are from (a sentence for people), and what was left out of them (or "")."""

    ids: list[int]
    source: str
    note: str = ""


@dataclass(frozen=True)
class Validation:
    """The tokens that losses are measured on, or None and why not. `note` is something to tell in either case."""

    tokens: Tokens | None
    path: str
    note: str = ""


def most_tokens(config: ModelConfig) -> int:
    """How many tokens of a text are shown: the context, unless the page would become too large."""
    each = config.n_layer * (config.n_head + (config.n_kv_head or config.n_head)) * config.each_head
    square = math.isqrt(MAX_SCORES // max(1, config.n_layer * config.n_head))
    return max(1, min(config.block_size, MAX_SHOWN, MAX_NUMBERS // max(1, each), square))


def given_text(checkpoint: Checkpoint, prompt: str, where: str) -> Text:
    """The newest tokens of a prompt, as many as are shown. UserError, naming `where`, for one that cannot be read."""
    if not prompt:
        raise UserError(f"{where}: the text is empty; there is nothing to look at")
    try:
        ids: list[int] = checkpoint.tokenizer.encode(prompt).tolist()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    config, most = checkpoint.config.model, most_tokens(checkpoint.config.model)
    if len(ids) <= most:
        return Text(ids, f"the text of {where}")
    why = f"the context is {most:,}" if most == config.block_size else f"a page shows {most:,} of this model"
    return Text(ids[-most:], f"the text of {where}", f"The text has {len(ids):,} tokens and {why}: its newest count.")


def default_text(checkpoint: Checkpoint, model: GPT, validation: Validation) -> Text:
    """The beginning of the validation text, from a new line on if one is near; else a text that the model writes."""
    n = min(most_tokens(checkpoint.config.model), DEFAULT_SHOWN)
    if validation.tokens is not None:
        ids: list[int] = validation.tokens[: n + 500].tolist()
        pieces = checkpoint.tokenizer.token_bytes()
        starts = (i + 1 for i, id in enumerate(ids[:500]) if pieces[id].endswith(b"\n\n" if n > 1 else b"\n"))
        doubles = (i + 1 for i in range(1, min(500, len(ids))) if pieces[ids[i]] == pieces[ids[i - 1]] == b"\n")
        first = next(doubles, next(starts, 0))
        return Text(ids[first : first + n] or ids[:n], f"the beginning of the validation text of {validation.path}")
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(0)
    start_BP = torch.zeros(1, 1, dtype=torch.long, device=device)
    written = [int(id_B) for id_B, _ in generate(model, start_BP, n, Sampling(0.8), generator=generator)]
    return Text(written, "a text that the model wrote itself, at temperature 0.8")


def validation_text(checkpoint: Checkpoint, data: Path | None) -> Validation:
    """The validation split of `data` (a dataset folder, or a text file taken whole), or of what the model learned from.

    Raises UserError where `data` is named and cannot serve. Where it is not, and nothing serves, there is none: a
    checkpoint from elsewhere may name any path, and only a dataset that fits it is read from there.
    """
    path = data if data is not None else Path(checkpoint.config.data.path)
    if data is not None and not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        tokens, note = _read_file(checkpoint, path) if data is not None and path.is_file() else _read(checkpoint, path)
    except UserError as error:
        if data is not None:
            raise
        return Validation(None, str(path), f"no validation text at hand ({error})")
    if len(tokens) < 2:
        if data is not None:
            raise UserError(f"{path}: {len(tokens)} token(s) to measure on; at least 2 are needed")
        return Validation(None, str(path), f"no validation text at hand ({path} holds {len(tokens)} tokens of it)")
    return Validation(tokens, str(path), note)


def _read_file(checkpoint: Checkpoint, path: Path) -> tuple[Tokens, str]:
    try:
        return checkpoint.tokenizer.encode(path.read_bytes().decode("utf-8-sig")), ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read(checkpoint: Checkpoint, path: Path) -> tuple[Tokens, str]:
    dataset = Dataset(path)
    if not same_ids(dataset.meta.tokenizer, checkpoint.tokenizer.to_json()):
        raise UserError(f"{path}: prepared with another tokenizer than the model's")
    require_known_tokens(dataset.val, checkpoint.tokenizer.vocab_size, path)
    same = dataset.meta.fingerprint == checkpoint.header.dataset_fingerprint
    return dataset.val, "" if same else f"{path} is not the data that this model was trained on"
