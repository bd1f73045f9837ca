"""A checkpoint -> a folder that transformers loads with no code of ours. It appears whole, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from minigpt_cli.core.checkpoint import MODEL, Checkpoint
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import names_in
from minigpt_cli.core.folders import clear_leftovers, locked, published
from minigpt_cli.extras.huggingface import vocabulary, weights
from minigpt_cli.extras.huggingface.architectures import ARCHITECTURES
from minigpt_cli.extras.huggingface.card import model_card
from minigpt_cli.extras.huggingface.read import WHOLE
from minigpt_cli.extras.huggingface.settings import choose, not_carried, settings_of

FILES = {WHOLE, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}


def write(
    checkpoint: Checkpoint, folder: Path, *, force: bool = False, note: Callable[[str], None] = lambda message: None
) -> str:
    """Export to `folder`, and return the name of the architecture. `note` is told what it cannot hold.

    UserError, before anything is written, where no architecture expresses the model or the folder may not be replaced.
    """
    folder = Path(os.path.realpath(folder))
    check_folder(folder, force)
    config, vocab_size = checkpoint.config.model, checkpoint.tokenizer.vocab_size
    kind = choose(config)
    architecture = ARCHITECTURES[kind]
    tensors = weights.pack(kind, config, checkpoint.part(MODEL), vocab_size)
    if lost := not_carried(kind, config):
        note(f"{architecture.name} has no such rates of dropout, which only training would use: {', '.join(lost)}")
    end = checkpoint.tokenizer.end_of_text  # where there is none, a text has no special beginning or end
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    settings = {
        "architectures": [architecture.name], "model_type": kind, "vocab_size": vocab_size, "torch_dtype": "float32",
    } | special | settings_of(kind, config)  # fmt: skip
    documents: dict[str, Any] = {
        "config.json": settings, "generation_config.json": special,
        "tokenizer.json": vocabulary.document_of(checkpoint.tokenizer),
        "tokenizer_config.json": vocabulary.settings_of(checkpoint.tokenizer, config.block_size),
    }  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, "another minigpt export is writing it"):
        clear_leftovers(folder)
        check_folder(folder, force)
        with published(folder) as new:
            plain = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
            save_file(plain, new / WHOLE, metadata={"format": "pt"})
            for name, document in documents.items():
                (new / name).write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
            (new / WHOLE).chmod((new / "config.json").stat().st_mode & 0o777)  # safetensors made it for the owner alone
            (new / "README.md").write_text(model_card(checkpoint, folder.name, architecture.name), encoding="utf-8")
            for path in new.iterdir():
                _flush(path)
    return architecture.name


def check_folder(folder: Path, force: bool) -> None:
    """UserError where `folder` may not become an export."""
    try:
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise UserError(f"{folder}: exists and is no folder; name another")
        names = names_in(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    if names - FILES or (names and "config.json" not in names):
        raise UserError(f"{folder}: this folder holds other files and is never replaced; name another")
    if names and not force:
        raise UserError(f"{folder}: already holds a model; replace it with --force, or name another folder")


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
