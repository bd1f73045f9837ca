"""Checkpoints too large for one host: a folder to which every rank writes what it holds. Owns that folder's format.

PyTorch's distributed checkpoint (DCP) writes one safetensors file a rank, with the place of each slice in its header,
and reads them with any number of ranks. Beside them `header.json` holds what `checkpoint.Header` holds in a single
file, with the sha256 of every file. No pickle. A folder is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from minigpt_cli.core import tokenizer as tokenizers
from minigpt_cli.core.checkpoint import MODEL, Checkpoint, Header, library_versions
from minigpt_cli.core.config import parse_config
from minigpt_cli.core.errors import CheckpointError, MinigptError, UserError
from minigpt_cli.core.files import MAX_JSON_BYTES, TEMPORARY, bounded_json, fsync_file, fsync_folder
from minigpt_cli.core.sharding import local
from minigpt_cli.core.world import World

HEADER = "header.json"


def save(folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], world: World) -> None:
    """Write a sharded checkpoint to `folder`, which must not exist. Every rank must take part, and see the same disk.

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
    own: dict[int, str] = {}  # a tied head is written apart: safetensors refuses tensors that share memory
    tensors = {
        name: tensor if own.setdefault(local(tensor).data_ptr(), name) == name else tensor.clone()
        for name, tensor in tensors.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # of one process, which is as meant
        try:
            dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)
        except dcp.CheckpointException as error:  # on every rank alike; no Exception, so nobody else would catch it
            reason = next(iter(error.failures.values()))[0]
            what = getattr(reason, "strerror", None) or reason
            raise world.everyones(MinigptError(f"{folder}: not written: {what}")) from None
    ours = {file.name: _durable_sha256(file) for file in unfinished.glob(f"shard-{world.rank + 1:05d}-*")}
    sums = {name: sha for text in world.texts(json.dumps(ours)) for name, sha in json.loads(text).items()}
    if world.leads:
        document = Header(**header, versions=library_versions(), checksums=sums).model_dump_json()
        signed = {"minigpt": document, "minigpt_sha256": hashlib.sha256(document.encode()).hexdigest()}
        with open(unfinished / HEADER, "x", encoding="ascii") as file:
            json.dump(signed, file)
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(unfinished)
        unfinished.rename(folder)
        fsync_folder(folder.parent)
    world.any(False)  # it is whole


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
    load(folder, weights)
    return Checkpoint(folder, saved.header, saved.config, saved.tokenizer, weights)


def _durable_sha256(file: Path) -> str:
    """The file's sha256, once it is on the disk."""
    fsync_file(file)
    with open(file, "rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
