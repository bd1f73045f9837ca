"""One self-contained safetensors file: written whole or not at all, checked when read. No pickle.

The file format is safetensors: 8 bytes of header length, a JSON header, raw tensors. Its metadata holds one JSON
document of ours (`minigpt`) and that document's own sha256 (`minigpt_sha256`).
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt_cli import __version__
from minigpt_cli.core import tokenizer as tokenizers
from minigpt_cli.core.config import Config, parse_config
from minigpt_cli.core.errors import CheckpointError, MinigptError, UserError
from minigpt_cli.core.files import MAX_JSON_BYTES, atomic_write, bounded_json, too_much_json
from minigpt_cli.core.model import GPT, empty_model
from minigpt_cli.core.shell import command_line

FORMAT_VERSION = 1
SHARDED = ".sharded"  # how the name of a folder ends that holds a checkpoint in parts (shards.py)
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of tensor names
EMBEDDING, HEAD = MODEL + "token_embedding.weight", MODEL + "head.weight"  # one matrix with `tie_weights`


class Progress(BaseModel):
    """Where a run stands: all that resuming needs besides tensors."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    step: Count = 0  # optimizer steps done
    tokens_seen: Count = 0
    seconds: float = 0.0  # wall time of training, over all its sessions
    best_loss: float | None = None
    best_step: Count = 0
    patience_loss: float | None = None  # the best of the evaluations that eval_interval asked for
    worse: Count = 0  # of those, how many since
    val_loss: float | None = None  # of the last evaluation
    evaluated_at: Count = 0
    loss_sum: float = 0.0  # of the steps since the last log
    logged_at: Count = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool | None = None  # whether blocks were compiled; None in checkpoints that do not say
    scaler: dict[str, int | float] = {}  # the state of fp16's loss scaling
    data_step: Count = 0  # the step at which a resumed run changed to the data that it has now
    data_tokens: Count = 0  # `tokens_seen` at that step

    def on_other_data(self) -> Progress:
        """The same run on other data from here: losses on the old data say nothing about it."""
        fresh = {key: Progress.model_fields[key].default for key in
                 ("best_loss", "best_step", "patience_loss", "worse", "val_loss", "evaluated_at")}  # fmt: skip
        return self.model_copy(update={**fresh, "data_step": self.step, "data_tokens": self.tokens_seen})

    def sequences(self, block_size: int) -> int:
        """How many windows of the present data were seen."""
        return (self.tokens_seen - self.data_tokens) // block_size


class Origin(BaseModel):
    """Which weights a fine-tuned model began with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # of the file or folder
    step: Count
    dataset_fingerprint: str  # of the data that it was trained on


class Header(BaseModel):
    """The JSON document in a checkpoint's metadata: all that is known of the model besides its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    step: Count
    tokens_seen: Count
    val_loss: float | None  # at this step, or None if it was not evaluated here
    dataset_fingerprint: str
    weights: Literal["trained", "averaged"] = "trained"  # what `model.*` holds; averaged: by train.ema
    initialised_from: Origin | None = None
    progress: Progress
    versions: dict[str, str]
    checksums: dict[str, str]  # tensor name -> sha256 of its bytes


@dataclass(frozen=True)
class Checkpoint:
    """A loaded and verified checkpoint. `tensors` still carry their prefixes; they live on the CPU."""

    path: Path
    header: Header
    config: Config
    tokenizer: tokenizers.Tokenizer
    tensors: dict[str, Tensor]

    def model(self, device: torch.device | str = "cpu") -> GPT:
        """The model with its weights, on `device`. The file's shapes were compared with its config when it was read."""
        model = empty_model(self.config.model, self.tokenizer.vocab_size)
        model.load_state_dict(self.part(MODEL), assign=True)
        if self.config.model.tie_weights:
            model.head.weight = model.token_embedding.weight
        return model.requires_grad_(True).to(device)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with `prefix`, without it."""
        return {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def library_versions() -> dict[str, str]:
    return {"minigpt": __version__, "torch": torch.__version__, "python": platform.python_version()}


def stored_once(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a file holds of `tensors`: where the `config` of its header ties a matrix, that once, as the embedding."""
    tied = config.get("model", {}).get("tie_weights", False)
    return {name: tensor for name, tensor in tensors.items() if not (tied and name == HEAD)}


def with_tied_head(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """What was loaded, with a tied head under its own name too: it shares the embedding's memory."""
    return tensors | {HEAD: tensors[EMBEDDING]} if config.model.tie_weights else tensors


def require_storable(tokenizer: dict[str, Any]) -> None:
    """Raises UserError if a tokenizer is too large for a header: better before the first step than after it."""
    document = json.dumps(json.dumps(tokenizer, ensure_ascii=False), ensure_ascii=False).encode()
    if (reason := too_much_json(document + b" " * 1_000_000)) is not None:  # the rest of the header, generously
        raise UserError(f"this tokenizer is too large for a checkpoint ({reason}); use a smaller --vocab-size")


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a checkpoint to `path`: to a temporary name, fsynced, renamed, folder fsynced.

    `header` holds the fields of `Header` but `checksums` and `versions`, which are made here. Until the rename, the
    file that was at `path` stays as it was; on any failure the temporary is removed and the error raised.
    """
    tensors = stored_once(tensors, header["config"])
    arrays = {name: _raw_bytes(tensor) for name, tensor in tensors.items()}
    checksums = {name: hashlib.sha256(array).hexdigest() for name, array in arrays.items()}
    document = Header(**header, versions=library_versions(), checksums=checksums).model_dump_json()
    layout: dict[str, Any] = {
        "__metadata__": {"minigpt": document, "minigpt_sha256": hashlib.sha256(document.encode()).hexdigest()}
    }
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(arrays[name])
        layout[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(layout, ensure_ascii=False).encode()
    if (reason := too_much_json(head)) is not None:
        raise MinigptError(f"{path}: not written, it could not be read again: its header is {reason}")
    head += b" " * (-len(head) % 8)  # tensors begin at a multiple of 8
    with atomic_write(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for array in arrays.values():
            file.write(array)


def load(path: str | Path, *, weights_only: bool = False) -> Checkpoint:
    """Read and verify a checkpoint: sizes before memory, the header's checksum, every tensor's checksum.

    `weights_only` verifies the optimizer's tensors too, but leaves them in the file. Raises UserError if there is no
    such file, CheckpointError if it is damaged, not ours or made by a newer minigpt. No code from the file can run.
    """
    known, prefix = peek(path), MODEL if weights_only else ""
    tied = known.config.model.tie_weights
    tensors = {
        name: tensor.clone()  # out of the map: the file may be replaced
        for name, tensor in _verified(known)
        if name.startswith(prefix) and not (tied and name == HEAD)
    }
    return replace(known, tensors=with_tied_head(tensors, known.config))


def peek(path: str | Path) -> Checkpoint:
    """What a checkpoint says of itself, cheap whatever its size: no tensor is read. Raises as `load` does."""
    path = Path(path)
    header = read_header(path)
    try:
        return Checkpoint(
            path, header, parse_config(header.config, str(path)), tokenizers.from_json(header.tokenizer), {}
        )
    except UserError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def verify(known: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Verify every tensor of a file that was peeked at, one after the other; `progress` counts bytes.

    Raises as `load` does, naming the first tensor that is damaged. The file is read through a memory map, whose pages
    the system takes back when it needs them: the largest tensor must fit, not the file.
    """
    done, total = 0, known.path.stat().st_size
    for _, tensor in _verified(known):
        done += tensor.nbytes
        progress(done, total)


def read_header(path: Path) -> Header:
    """The verified header alone: cheap, whatever the size of the file. Raises as `load` does."""
    try:
        size = path.stat().st_size
        if path.suffix == SHARDED and path.is_dir():
            export = command_line(["minigpt", "export", "--ckpt", path, "--to", "file", "OUT"])
            raise UserError(f"{path}: in parts; make one file of it: {export}")
        if not path.is_file():
            raise UserError(f"{path}: not a file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 16 or not 2 <= length <= size - 8:
                raise CheckpointError(f"{path}: not a checkpoint: {_what_is_it(path, size)}")
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: not a checkpoint of ours: a header of {length:,} bytes")
            layout = bounded_json(file.read(length))
        metadata = layout["__metadata__"]
        document = metadata["minigpt"]
        if hashlib.sha256(document.encode()).hexdigest() != metadata["minigpt_sha256"]:
            raise CheckpointError(f"{path}: damaged: the header does not match its checksum")
        fields = json.loads(document)
        if fields["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: made by a newer minigpt ({fields['format_version']}); update minigpt to read it"
            )
        return Header.model_validate(fields)
    except MinigptError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged: {error.errors()[0]['msg']}") from None
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: a safetensors file, but not a minigpt checkpoint") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not a checkpoint: {_what_is_it(path, size)}") from None


def _what_is_it(path: Path, size: int) -> str:
    if size == 0:
        return "the file is empty"
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it is a pickle (a .pt file?), which minigpt never opens"
    return "cut short, or not a safetensors file"


def _model_shapes(known: Checkpoint) -> dict[str, list[int]]:
    """Name -> shape of the weights that its config must have, without allocating them."""
    config, n_tensors = known.config.model, len(known.header.checksums)
    if config.n_layer > n_tensors:  # so that a lie about depth costs nothing
        raise ValueError(f"its config has {config.n_layer} layers, but there are {n_tensors} tensors")
    return {name: list(t.shape) for name, t in empty_model(config, known.tokenizer.vocab_size).state_dict().items()}


def _verified(known: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Name and content of every tensor, in the file's memory map, once it fits the config and its checksum."""
    try:
        header, shapes = known.header, _model_shapes(known)
        with safe_open(known.path, framework="pt") as file:  # checks that the offsets agree with the file's size
            names = set(file.keys())
            weights, found = {MODEL + name for name in shapes}, {n for n in names if n.startswith(MODEL)}
            if known.config.model.tie_weights and HEAD in found:  # files of older versions hold a tied matrix twice
                if header.checksums.get(HEAD) != header.checksums.get(EMBEDDING):
                    raise ValueError("its config ties head and embedding, but they differ")
            elif known.config.model.tie_weights:
                weights.discard(HEAD)
            if names != set(header.checksums) or found != weights:
                raise ValueError("its tensors are not the ones that its header and its config name")
            for name in sorted(names):
                _require_fit(name, file.get_slice(name), shapes)
                tensor = file.get_tensor(name)
                if hashlib.sha256(_raw_bytes(tensor)).hexdigest() != header.checksums[name]:
                    raise ValueError(f"the tensor {name} does not match its checksum")
                yield name, tensor
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{known.path}: damaged: {error}") from None


def _require_fit(name: str, found: Any, shapes: dict[str, list[int]]) -> None:
    """ValueError for a tensor of another shape than the config gives it; an optimizer's may also be a scalar."""
    shape, dtype, of_model = found.get_shape(), found.get_dtype(), name.startswith(MODEL)
    weight = name.removeprefix(MODEL) if of_model else name.removeprefix(OPTIMIZER).rpartition(".")[0]
    if shape not in [shapes.get(weight)] + ([] if of_model else [[]]) or dtype not in ("F32", "BF16", "F16"):
        raise ValueError(f"the tensor {name} ({dtype} {shape}) does not fit the config")


def _raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, little-endian, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if math.prod(tensor.shape) else memoryview(b"")
