"""`minigpt export`: a checkpoint -> what other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minigpt_cli.commands.console import Debug, check_new_file, note, safe
from minigpt_cli.core.errors import UserError


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; with --to gguf, the file.")],
    ckpt: Annotated[Path, typer.Option("--ckpt", help="A checkpoint: last.safetensors or best.safetensors of a run.")],
    to: Annotated[
        str, typer.Option("--to", metavar="hf|gguf", help="hf: Hugging Face's transformers; gguf: llama.cpp.")
    ] = "hf",
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is already there.")] = False,
    debug: Debug = False,
) -> None:
    """Take a model elsewhere, in a form that needs no code of minigpt's.

    hf makes a folder for transformers: the model as the architecture that is the same function (GPT-2, Llama, Qwen3,
    StableLM, ...), the tokenizer with the same ids, and a README.md (model card). gguf makes one file for llama.cpp and
    what is built on it. What cannot be the same there is refused, and the option that stands in the way is named.

    Example: minigpt export --ckpt checkpoints/best.safetensors --to hf exported

    Example: minigpt export --ckpt checkpoints/best.safetensors --to gguf model.gguf
    """
    if to not in ("hf", "gguf"):
        raise UserError(f"--to {to}: hf or gguf")
    from minigpt_cli.core.checkpoint import load
    from minigpt_cli.extras.huggingface.write import check_folder, write

    if to == "hf":
        check_folder(out, force)  # before a large file is read
        architecture = write(load(ckpt, weights_only=True), out, force=force, note=note)
        print(safe(f"Wrote {out}: {architecture}, for AutoModelForCausalLM.from_pretrained and AutoTokenizer"))
        return
    from minigpt_cli.extras.gguf import write_gguf

    check_new_file(out, force, ckpt)
    checkpoint = load(ckpt, weights_only=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(safe(f"Wrote {out}: {write_gguf(checkpoint, out)} for llama.cpp, in float32"))
