"""The README.md of an exported model: what it is, in numbers that were measured. Text from a header is never markup."""

from __future__ import annotations

import math
import re
from pathlib import Path

from minigpt_cli.core.checkpoint import Checkpoint
from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.dataset import Dataset, require_known_tokens
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.evaluate import text_size
from minigpt_cli.core.model import empty_model
from minigpt_cli.core.plain_yaml import dump_yaml
from minigpt_cli.core.tokenizer import BpeTokenizer

# What can mean something in Markdown or HTML, or make a link of an address; escaped, each is plain text.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#+=!|~&:/@$-]|(?<=www)\.)", re.IGNORECASE)
LONGEST = 120  # characters of a name from a header


def model_card(checkpoint: Checkpoint, name: str, architecture: str) -> str:
    """Markdown. Numbers that are not known are left out, and the licence is the user's to choose."""
    header, config, tokenizer = checkpoint.header, checkpoint.config.model, checkpoint.tokenizer
    data = _dataset(checkpoint)
    parameters = empty_model(config, tokenizer.vocab_size).parameter_counts()["total"]
    rows = [
        ("parameters", f"{parameters:,}"),
        ("context", f"{config.block_size:,} tokens"),
        ("vocabulary", f"{tokenizer.vocab_size:,} ({tokenizer.kind})"),
        ("architecture", plain(architecture)),
    ]
    if header.step:
        rows.append(("trained", f"{header.step:,} steps, {header.tokens_seen:,} tokens"))
        rows.append(("data", plain(_data_name(checkpoint, data))))
    if header.val_loss is not None and math.isfinite(header.val_loss):
        rows.append(("validation loss", f"{header.val_loss:.4f} nats per token"))
        if header.val_loss < 700:
            rows.append(("perplexity", f"{math.exp(header.val_loss):,.3f} per token"))
        if (n_bytes := _bytes_per_token(checkpoint, data)) is not None:
            rows.append(("bits per byte", f"{header.val_loss / math.log(2) / n_bytes:.4f}"))
    if header.weights == "averaged":
        rows.append(("weights", "averaged over training steps"))
    made_with = ", ".join(f"{library} {version}" for library, version in sorted(header.versions.items()))
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    options = dump_yaml({"model": _options(config)})
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- minigpt
---

# {plain(name)}

A small GPT made with minigpt.

| | |
| --- | --- |
{table}

Made with {plain(made_with)}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")
ids = tokenizer("{_example(checkpoint)}", return_tensors="pt").input_ids
ids = model.generate(ids, max_new_tokens={min(100, max(1, config.block_size // 2))}, do_sample=True, top_k=0)
print(tokenizer.decode(ids[0]))
```

The tokenizer puts nothing around a text, and reads special tokens in it as plain text.{_of_the_vocabulary(checkpoint)}

## What it was trained with

```yaml
{options.strip()}
```

## Limits

It continues text in the manner of its training data, and knows nothing else: do not take what it says for true.

## Licence

Not stated. Whoever publishes this model chooses one, and minds the rights in the text that it learned from.
"""


def plain(text: str) -> str:
    """`text` from elsewhere as Markdown that shows exactly that text, on one line."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return _MARKUP.sub(r"\\\1", shown[:LONGEST] + ("..." if len(shown) > LONGEST else ""))


def _dataset(checkpoint: Checkpoint) -> Dataset | None:
    """The data it was trained on, where that still lies where it lay."""
    try:
        dataset = Dataset(Path(checkpoint.config.data.path))
        require_known_tokens(dataset.val, checkpoint.tokenizer.vocab_size, dataset.folder)
    except (UserError, OSError):
        return None
    return dataset if dataset.meta.fingerprint == checkpoint.header.dataset_fingerprint else None


def _data_name(checkpoint: Checkpoint, data: Dataset | None) -> str:
    inputs = data.meta.inputs if data is not None else []
    names = ", ".join(f"{entry.name} (sha256 {entry.sha256[:12]})" for entry in inputs[:3])
    return names + (f" and {len(inputs) - 3} more" if len(inputs) > 3 else "") or checkpoint.config.data.path


def _bytes_per_token(checkpoint: Checkpoint, data: Dataset | None) -> float | None:
    """Of what the validation loss was measured on: from the dataset, or where every token has as many."""
    if data is not None:
        return text_size(data.val, checkpoint.tokenizer)[1] / (len(data.val) - 1)
    sizes = {len(piece) for piece in checkpoint.tokenizer.token_bytes()}
    return float(sizes.pop()) if len(sizes) == 1 and 0 not in sizes else None


def _example(checkpoint: Checkpoint) -> str:
    """A prompt that the tokenizer knows."""
    known = b"".join(checkpoint.tokenizer.token_bytes())
    return next((word for word in ("Once upon a time", "The ", "A", "a", "0") if set(word.encode()) <= set(known)), "")


def _of_the_vocabulary(checkpoint: Checkpoint) -> str:
    if isinstance(checkpoint.tokenizer, BpeTokenizer) or checkpoint.tokenizer.kind == "byte":
        return ""
    return " It knows the characters of its training text, and refuses others with an error."


def _options(config: ModelConfig) -> dict[str, object]:
    return {name: value for name, value in config.model_dump().items() if value is not None}
