"""Checkpoints too large for one host: a folder to which every rank writes what it holds. Owns that folder's format.

PyTorch's distributed checkpoint (DCP) writes one safetensors file a rank, with the place of each slice in its header,
and reads them with any number of ranks. Beside them `header.json` holds what `checkpoint.Header` holds in a single
file, with the sha256 of every file. No pickle. A folder is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from minigpt_cli.core import tokenizer as tokenizers
from minigpt_cli.core.checkpoint import (
    MODEL,
    Checkpoint,
    Header,
    library_versions,
    stored_once,
    with_tied_head,
)
from minigpt_cli.core.config import parse_config
from minigpt_cli.core.errors import CheckpointError, MinigptError, UserError
from minigpt_cli.core.files import MAX_JSON_BYTES, TEMPORARY, atomic_write, bounded_json, fsync_file, fsync_folder
from minigpt_cli.core.world import World

HEADER = "header.json"


def save(folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], world: World) -> None:
    """Write a sharded checkpoint to `folder`, replacing one of that name. Every rank must take part, on the same disk.

    `header` holds the fields of `Header` but `checksums` and `versions`. Where one rank cannot write, all raise
    MinigptError; on any failure what was written is removed.
    """
    unfinished = folder.with_name(f"{TEMPORARY}{folder.name}")
    try:
        _write(unfinished, folder, tensors, header, world)
    except BaseException:
        if world.leads:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write(
    unfinished: Path, folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], world: World
) -> None:
    import torch.distributed.checkpoint as dcp  # half a second, which most runs need not spend

    if world.leads:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    world.any(False)  # the folder is there
    writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
    tensors = stored_once(tensors, header["config"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # of one process, which is as meant
        try:
            dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)
        except dcp.CheckpointException as error:  # on every rank alike; no Exception, so nobody else would catch it
            reason = next(iter(error.failures.values()))[0]
            full = getattr(reason, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else getattr(reason, "strerror", None) or reason
            raise world.everyones(MinigptError(f"{folder}: not written: {what}")) from None
    ours = {file.name: _durable_sha256(file) for file in unfinished.glob(f"shard-{world.rank + 1:05d}-*")}
    sums = {name: sha for text in world.texts(json.dumps(ours)) for name, sha in json.loads(text).items()}
    if world.leads:
        _write_header(unfinished, header, sums)
        if folder.exists():  # of the same step, and damaged or of another session
            replaced = folder.with_name(f"{TEMPORARY}old-{folder.name}")
            folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(folder)
        fsync_folder(folder.parent)
    world.any(False)  # it is whole


def replace_header(folder: Path, header: Mapping[str, Any], world: World) -> None:
    """Give a sharded checkpoint, whose tensors stay, another header. Every rank must take part."""
    if world.leads:
        _write_header(folder, header, read_header(folder).checksums)
    world.any(False)  # it is there


def _write_header(folder: Path, header: Mapping[str, Any], checksums: dict[str, str]) -> None:
    document = Header(**header, versions=library_versions(), checksums=checksums).model_dump_json()
    signed = {"minigpt": document, "minigpt_sha256": hashlib.sha256(document.encode()).hexdigest()}
    with atomic_write(folder / HEADER) as file:
        file.write(json.dumps(signed).encode("ascii"))


def read_header(folder: Path) -> Header:
    """The verified header. Raises UserError where there is no such folder, CheckpointError where it is damaged."""
    try:
        with open(folder / HEADER, "rb") as file:
            signed = bounded_json(file.read(MAX_JSON_BYTES + 1))
        document = signed["minigpt"]
        if hashlib.sha256(document.encode()).hexdigest() != signed["minigpt_sha256"]:
            raise CheckpointError(f"{folder}: damaged: the header does not match its checksum")
        return Header.model_validate_json(document)
    except FileNotFoundError:
        raise UserError(f"{folder}: no sharded checkpoint: it has no {HEADER}") from None
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder}: damaged: its {HEADER} cannot be read") from None


def open_sharded(folder: Path, *, check: bool = True) -> Checkpoint:
    """The checkpoint without its tensors, which `load` fetches; `check`: every file must match its checksum.

    Raises as `read_header` does.
    """
    header = read_header(folder)
    for name, sha256 in header.checksums.items() if check else ():
        file = folder / Path(name).name
        if not file.is_file() or _durable_sha256(file) != sha256:
            raise CheckpointError(f"{folder}: damaged: {name} does not match its checksum")
    try:
        config, tokenizer = parse_config(header.config, str(folder)), tokenizers.from_json(header.tokenizer)
    except UserError as error:
        raise CheckpointError(f"{folder}: damaged: {error}") from None
    return Checkpoint(folder, header, config, tokenizer, {})


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Name -> whole shape of every tensor in the folder."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: entry.size for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}


def load(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill the tensors of `into`, whole or sliced as they are, from the folder. Every rank must take part.

    Raises CheckpointError where one is missing or of another shape.
    """
    import torch.distributed.checkpoint as dcp

    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
            dcp.load(into, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    except (dcp.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: damaged, or of another model: {error}") from None


def gathered(folder: Path) -> Checkpoint:
    """The checkpoint with its weights whole in memory, and nothing else: what a single file for sampling holds."""
    saved = open_sharded(folder)
    weights = {name: torch.empty(shape) for name, shape in shapes(folder).items() if name.startswith(MODEL)}
    weights = stored_once(weights, saved.header.config)  # folders of older versions hold a tied matrix twice
    load(folder, weights)
    return Checkpoint(folder, saved.header, saved.config, saved.tokenizer, with_tied_head(weights, saved.config))


def _durable_sha256(file: Path) -> str:
    """The file's sha256, once it is on the disk."""
    fsync_file(file)
    with open(file, "rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
