"""`minigpt export`: a checkpoint -> what other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt_cli.commands.console import Debug, check_new_file, find_checkpoint, note, safe
from minigpt_cli.commands.options import CKPT, among
from minigpt_cli.core.errors import UserError

if TYPE_CHECKING:
    from minigpt_cli.core.checkpoint import Checkpoint


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; with --to gguf or file, the file.")],
    ckpt: Annotated[Path, CKPT],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="hf|gguf|file",
            autocompletion=among("hf", "gguf", "file"),
            help="hf: Hugging Face's transformers; gguf: llama.cpp; file: minigpt.",
        ),
    ] = "hf",
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is already there.")] = False,
    debug: Debug = False,
) -> None:
    """Take a model elsewhere, in a form that needs no code of minigpt's.

    hf makes a folder for transformers: the model as the architecture that is the same function (GPT-2, Llama, Qwen3,
    StableLM, ...), the tokenizer with the same ids, and a README.md (model card). gguf makes one file for llama.cpp and
    what is built on it. What cannot be the same there is refused, and the option that stands in the way is named.

    file makes one checkpoint of minigpt's own, without the optimizer's state: of a sharded one, whose folder it joins,
    or of last.safetensors, to a third of the size.

    Example: minigpt export --ckpt checkpoints/best.safetensors --to hf exported

    Example: minigpt export --ckpt checkpoints/best.safetensors --to gguf model.gguf
    """
    if to not in ("hf", "gguf", "file"):
        raise UserError(f"--to {to}: hf, gguf or file")
    ckpt = find_checkpoint(ckpt)
    from minigpt_cli.core.checkpoint import save
    from minigpt_cli.extras.huggingface.write import check_folder, write

    if to == "hf":
        check_folder(out, force)  # before a large file is read
        architecture = write(_weights(ckpt), out, force=force, note=note)
        print(safe(f"Wrote {out}: {architecture}, for AutoModelForCausalLM.from_pretrained and AutoTokenizer"))
        return
    from minigpt_cli.extras.gguf import write_gguf

    check_new_file(out, force, ckpt)
    checkpoint = _weights(ckpt)
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "file":
        save(out, checkpoint.tensors, checkpoint.header.model_dump(exclude={"versions", "checksums"}))
        print(safe(f"Wrote {out}: the weights of step {checkpoint.header.step:,}"))
    else:
        print(safe(f"Wrote {out}: {write_gguf(checkpoint, out)} for llama.cpp, in float32"))


def _weights(ckpt: Path) -> Checkpoint:
    """A checkpoint without the optimizer's state, in one file or in parts."""
    from minigpt_cli.core.checkpoint import SHARDED, load
    from minigpt_cli.core.shards import gathered

    return gathered(ckpt) if ckpt.suffix == SHARDED and ckpt.is_dir() else load(ckpt, weights_only=True)
