"""`minigpt export`: a checkpoint -> what other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minigpt_cli.commands.console import Debug, note, safe
from minigpt_cli.core.errors import UserError


def export(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    ckpt: Annotated[Path, typer.Option("--ckpt", help="A checkpoint: last.safetensors or best.safetensors of a run.")],
    to: Annotated[str, typer.Option("--to", metavar="hf", help="hf: a folder for Hugging Face's transformers.")] = "hf",
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is already there.")] = False,
    debug: Debug = False,
) -> None:
    """Take a model elsewhere: write it as a folder that transformers loads, with no code of minigpt's.

    The model becomes the architecture that is the same function (GPT-2, Llama, Qwen3, StableLM, ...), the tokenizer a
    tokenizer.json with the same ids; a README.md (model card) says what it is. A model that no architecture expresses
    is refused, and the option that stands in the way is named.

    Example: minigpt export --ckpt checkpoints/best.safetensors --to hf exported
    """
    if to != "hf":
        raise UserError(f"--to {to}: hf")
    from minigpt_cli.core.checkpoint import load
    from minigpt_cli.extras.huggingface.write import check_folder, write

    check_folder(out, force)  # before a large file is read
    architecture = write(load(ckpt, weights_only=True), out, force=force, note=note)
    print(safe(f"Wrote {out}: {architecture}, for AutoModelForCausalLM.from_pretrained and AutoTokenizer"))
