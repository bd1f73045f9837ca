"""`minigpt import`: a model of Hugging Face's, on this machine -> a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minigpt_cli.commands.console import Debug, check_new_file, command, note, safe
from minigpt_cli.core.errors import UserError


def import_model(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE",
            help="A folder with config.json, tokenizer.json and safetensors weights, or its .safetensors file.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="CKPT", help="The checkpoint to make.")],
    block_size: Annotated[
        int | None, typer.Option("--block-size", metavar="N", help="Keep only N tokens of its context. [default: all]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is already there.")] = False,
    debug: Debug = False,
) -> None:
    """Come in with a model: turn a folder of Hugging Face's into a checkpoint that sample, eval and inspect read.

    GPT-2, Llama, Mistral, Qwen2, Qwen3, StableLM, StarCoder2 and a few more, with byte-level BPE tokenizers. Nothing is
    downloaded, no pickle is opened, no code of the folder runs. What cannot be the same model here is refused, and what
    stands in the way is named. Weights become float32.

    Example: minigpt import path/to/gpt2 --out checkpoints/gpt2.safetensors
    """  # fmt: skip
    check_new_file(out, force, path)
    from minigpt_cli.core import checkpoint
    from minigpt_cli.core.model import empty_model
    from minigpt_cli.extras.huggingface.read import read

    found = read(path, block_size=block_size, note=note)
    if out.exists() and not force:  # it came meanwhile
        raise UserError(f"{out} exists; --force replaces it")
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out, found.tensors, found.header.model_dump(exclude={"versions", "checksums"}))
    tokens = found.tokenizer.vocab_size
    parameters = empty_model(found.config.model, tokens).parameter_counts()["total"]
    context = found.config.model.block_size
    print(safe(f"Wrote {out}: {parameters:,} parameters, {tokens:,} tokens, a context of {context:,}"))
    print(safe(f"Next: {command('sample', '--ckpt', out)}"))
