"""`minigpt info`: what a checkpoint is, where it comes from, and whether it is whole; the same of folders."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt_cli.commands.console import Debug, command, duration, note, print_table, progress_bar, safe, size
from minigpt_cli.core.errors import CheckpointError, MinigptError, UserError

if TYPE_CHECKING:
    from minigpt_cli.core.checkpoint import Checkpoint
    from minigpt_cli.core.config import ModelConfig
    from minigpt_cli.core.dataset import DatasetMeta


def info(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint, a run folder, or a dataset folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Tell what a checkpoint is: model, parameters, tokenizer, data, steps, loss, versions; and whether it is whole.

    Every tensor is compared with the checksum that was written with it. A damaged file is said to be, with the name of
    the tensor, and the exit code is 1. Of a run folder, every checkpoint is looked at; of a dataset folder, its counts.

    Example: minigpt info checkpoints/best.safetensors
    """
    if not path.is_dir() or path.suffix == ".sharded":  # which is a checkpoint too, and told how to be read
        _show_checkpoint(path, as_json)
    elif (path / "meta.json").exists():
        _show_dataset(path, as_json)
    elif files := sorted(path.glob("*.safetensors")):
        _show_run(path, files, as_json)
    elif parts := sorted(path.glob("*.sharded")):
        _show_checkpoint(parts[-1], as_json)
    else:
        raise UserError(f"{path}: a folder with neither checkpoints (*.safetensors) nor a dataset (meta.json) in it")


def _show_checkpoint(path: Path, as_json: bool) -> None:
    from minigpt_cli.core.checkpoint import peek

    known = peek(path)
    facts = _facts(known)
    if not as_json:
        print_table(str(path), _rows(known, facts))
    _verify(known)
    if as_json:
        print(json.dumps(facts | {"verified": True}))
    else:
        print(f"All {facts['tensors']:,} tensors match their checksums.")


def _verify(known: Checkpoint) -> None:
    from minigpt_cli.core.checkpoint import verify

    with progress_bar(f"verifying {known.path.name}", total=None, unit="bytes") as bar:
        verify(known, lambda done, total: bar.update(bar.task_ids[0], completed=done, total=total))


def _facts(known: Checkpoint) -> dict[str, Any]:
    """What the header tells, and what follows from it."""
    from minigpt_cli.core.model import empty_model

    header, tokenizer = known.header, known.tokenizer
    parameters = empty_model(known.config.model, tokenizer.vocab_size).parameter_counts()
    data = _data_of(known)
    loss = header.val_loss
    return {
        "file": str(known.path), "bytes": known.path.stat().st_size, "tensors": len(header.checksums),
        "step": header.step, "max_iters": known.config.train.max_iters, "tokens_seen": header.tokens_seen,
        "epochs": (header.tokens_seen - header.progress.data_tokens) / data.train.tokens if data is not None else None,
        "seconds": header.progress.seconds, "val_loss": loss,
        "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
        "bits_per_byte": _bits_per_byte(known, data), "weights": header.weights,
        "optimizer": any(name.startswith("optimizer.") for name in header.checksums),
        "precision": header.progress.precision, "parameters": parameters,
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size},
        "initialised_from": header.initialised_from.model_dump() if header.initialised_from is not None else None,
        "dataset_fingerprint": header.dataset_fingerprint, "versions": header.versions, "config": header.config,
    }  # fmt: skip


def _data_of(known: Checkpoint) -> DatasetMeta | None:
    """The meta.json of the data that it was trained on, where that still lies where it lay."""
    from minigpt_cli.core.dataset import Dataset

    with suppress(UserError):
        meta = Dataset(known.config.data.path).meta
        return meta if meta.fingerprint == known.header.dataset_fingerprint else None
    return None


def _bits_per_byte(known: Checkpoint, data: DatasetMeta | None) -> float | None:
    """The validation loss over the bytes that it is about: known where each token is a byte, or the data is at hand."""
    loss, pieces = known.header.val_loss, known.tokenizer.token_bytes()
    if loss is None:
        return None
    if all(len(piece) == 1 for piece in pieces):
        return loss / math.log(2)
    if data is None:
        return None
    from minigpt_cli.core.dataset import Dataset

    val = Dataset(known.config.data.path).val
    first = sum(len(pieces[token]) for token in val[:1].tolist() if token < len(pieces))  # which is not predicted
    return loss * (data.val.tokens - 1) / math.log(2) / max(1, data.val.bytes - first)


def _rows(known: Checkpoint, facts: dict[str, Any]) -> list[tuple[object, ...]]:
    config, parameters = known.config, dict(facts["parameters"])
    total = parameters.pop("total")
    loss, bits, epochs = facts["val_loss"], facts["bits_per_byte"], facts["epochs"]
    quality = "not measured at this step"
    if loss is not None:
        perplexity = facts["perplexity"]
        quality = f"{loss:.4f} nats per token, perplexity " + (f"{perplexity:,.3f}" if perplexity else "beyond bounds")
        quality += f", {bits:.4f} bits per byte" if bits is not None else ""
    passes = f", {epochs:,.1f} passes over the text" if epochs is not None else ""
    planned = f" of {facts['max_iters']:,}" if isinstance(facts["max_iters"], int) else ""
    averaged = facts["weights"] == "averaged"
    history: list[tuple[object, ...]] = [
        ("data", f"{config.data.path} (fingerprint {facts['dataset_fingerprint'][:12]})"),
        ("trained", f"{facts['step']:,}{planned} steps, {facts['tokens_seen']:,} tokens{passes}"),
        ("time of training", f"{duration(facts['seconds'])}, in {facts['precision']}"),
        ("validation loss", quality),
    ]
    if origin := facts["initialised_from"]:
        history = [("began as", f"{origin['name']}, step {origin['step']:,}"), *history]
    elif not facts["step"]:
        history = [("trained", "elsewhere, before it was imported")]
    return [
        ("holds", ("weights and optimizer: --resume can go on from it" if facts["optimizer"] else "weights only")
         + (", averaged over steps (train.ema)" if averaged else "")),
        ("model", _in_words(config.model)),
        ("parameters", f"{total:,}"),
        *((f"  {part}", f"{count:,}") for part, count in parameters.items() if count),
        ("tokenizer", f"{known.tokenizer.kind}, {known.tokenizer.vocab_size:,} tokens"),
        *history,
        ("made with", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
        ("file", size(facts["bytes"])),
    ]  # fmt: skip


def _in_words(config: ModelConfig) -> str:
    """The shape, and every choice that is not the default."""
    layers, heads = (f"{n} {what}{'s' * (n != 1)}" for n, what in ((config.n_layer, "layer"), (config.n_head, "head")))
    shape = f"{layers}, {heads}, width {config.n_embd}, context {config.block_size}"
    chosen = [
        key if value is True else f"{key} {json.dumps(value) if isinstance(value, bool) else value}"
        for key, value in config
        if key not in ("n_layer", "n_head", "n_embd", "block_size")
        and (value != type(config).model_fields[key].default or key in ("position", "norm", "mlp"))
    ]
    return "; ".join([shape, *chosen])


def _show_run(folder: Path, files: list[Path], as_json: bool) -> None:
    """Every checkpoint of a run; the table comes first, then the failures."""
    from minigpt_cli.core.checkpoint import peek

    found, damaged = [], []
    for path in files:
        try:
            known = peek(path)
            _verify(known)
            found.append(_facts(known) | {"verified": True})
        except CheckpointError as error:
            damaged.append(str(error))
    if as_json:
        print(json.dumps({"folder": str(folder), "checkpoints": found, "damaged": damaged}))
    elif found:
        rows: list[tuple[object, ...]] = []
        for facts in sorted(found, key=lambda facts: facts["step"]):
            loss, holds = facts["val_loss"], "to resume" if facts["optimizer"] else "weights only"
            shown = "" if loss is None else f"{loss:.4f}"
            rows.append((Path(facts["file"]).name, f"{facts['step']:,}", shown, size(facts["bytes"]), holds))
        print_table(f"{folder}: all tensors of these match their checksums", rows,
                    headers=("checkpoint", "step", "validation loss", "size", "holds"))  # fmt: skip
        one = found[-1]["file"]
        print(safe(f"More of one: {command('info', f'./{one}' if one.startswith('-') else one)}"))
    for message in damaged[1:]:
        note(f"minigpt: error: {message}")
    if damaged:
        raise MinigptError(damaged[0])


def _show_dataset(folder: Path, as_json: bool) -> None:
    from minigpt_cli.core.dataset import Dataset
    from minigpt_cli.core.tokenizer import from_json

    meta = Dataset(folder).meta
    tokenizer = from_json(meta.tokenizer)
    facts = meta.model_dump() | {"tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}}
    if as_json:
        print(json.dumps(facts))
        return
    rows: list[tuple[object, ...]] = [
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"),
        *((f"{name} split", f"{split.tokens:,} tokens, {split.characters:,} characters, {split.bytes:,} bytes")
          for name, split in (("training", meta.train), ("validation", meta.val))),
        *(("made from", f"{source.name}, {size(source.bytes)}") for source in meta.inputs[:10]),
        *([("", f"and {len(meta.inputs) - 10:,} files more")] if len(meta.inputs) > 10 else []),
        *([("fetched from", meta.source)] if meta.source else []),
        ("fingerprint", meta.fingerprint),
    ]  # fmt: skip
    print_table(str(folder), rows)
