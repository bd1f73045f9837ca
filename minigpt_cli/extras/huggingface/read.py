"""A folder of Hugging Face's, on this machine, -> a checkpoint of ours in memory. No pickle, no code from the folder.

Sizes come before memory: what config.json says is compared with the headers of the files before a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minigpt_cli.core import checkpoint as checkpoints
from minigpt_cli.core.config import Config, ModelConfig, parse_section
from minigpt_cli.core.errors import CheckpointError, UserError
from minigpt_cli.core.files import MAX_JSON_BYTES, bounded_json
from minigpt_cli.core.model import empty_model
from minigpt_cli.core.tokenizer import Tokenizer, read_tokenizer_document
from minigpt_cli.extras.huggingface import vocabulary, weights
from minigpt_cli.extras.huggingface.architectures import ARCHITECTURES
from minigpt_cli.extras.huggingface.settings import options_of

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FINGERPRINT = "imported"  # no dataset has it
DTYPES = ("F32", "BF16", "F16")
# What old versions saved beside the weights: masks and tables that follow from the config.
_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
Note = Callable[[str], None]


def read(path: Path, *, block_size: int | None = None, note: Note = lambda message: None) -> checkpoints.Checkpoint:
    """The model and tokenizer in `path`: a folder, or a .safetensors file beside its config.json and tokenizer.json.

    Weights become float32. `block_size` keeps only so much of the context. `note` is told what is not carried over.
    UserError for what cannot be imported, naming what stands in the way; CheckpointError for files that are damaged.
    """
    path = Path(path)
    files = _weight_files(path)
    folder = path.parent if path.is_file() else path
    config_file = folder / "config.json"
    theirs = _json(config_file)
    if not isinstance(theirs, dict):
        raise UserError(f"{config_file}: not a JSON object")
    if theirs.get("quantization_config"):
        raise UserError(f"{config_file}: quantized weights cannot be imported; import the model they were made from")
    kind, config = options_of(theirs, str(config_file))
    _tell_ignored(kind, theirs, note)
    tokenizer = _tokenizer(folder, theirs.get("eos_token_id"), note)
    rows = theirs.get("vocab_size")
    if not isinstance(rows, int) or not tokenizer.vocab_size <= rows <= 1 << 24:
        raise UserError(
            f"{config_file}: vocab_size {str(rows)[:20]}, but the tokenizer has {tokenizer.vocab_size:,} tokens"
        )
    if rows > tokenizer.vocab_size:
        note(f"{rows - tokenizer.vocab_size:,} rows of its vocabulary stand for no token, and are left out")
    tensors = _weights(kind, config, rows, files, folder)
    config, tensors = _cut(config, tensors, tokenizer.vocab_size, block_size)
    header = checkpoints.Header(
        config=Config(model=config).model_dump(), tokenizer=tokenizer.to_json(), step=0, tokens_seen=0, val_loss=None,
        dataset_fingerprint=FINGERPRINT, progress=checkpoints.Progress(), versions=checkpoints.library_versions(),
        checksums={},
    )  # fmt: skip
    prefixed = {checkpoints.MODEL + name: tensor for name, tensor in tensors.items()}
    return checkpoints.Checkpoint(path, header, Config(model=config), tokenizer, prefixed)


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model, every one a plain name in its folder."""
    try:
        if path.is_file():
            if path.suffix != ".safetensors":
                raise UserError(f"{path}: give a folder, or a .safetensors file beside its config.json")
            return [path]
        if not path.is_dir():
            raise UserError(f"{path}: no such file or folder")
        if (path / WHOLE).is_file():
            return [path / WHOLE]
        if (path / INDEX).is_file():
            index = _json(path / INDEX)
            shards = index.get("weight_map") if isinstance(index, dict) else None
            names = set(shards.values()) if isinstance(shards, dict) and _all_strings(shards.values()) else {""}
            if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
                raise UserError(f"{path / INDEX}: its weight_map does not name safetensors files of this folder")
            return [path / name for name in sorted(names)]
        if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
            raise UserError(
                f"{path}: its weights are a pickle, which can run any code; minigpt never opens one.\nConvert them "
                "where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) in transformers"
            )
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    raise UserError(f"{path}: no {WHOLE} and no {INDEX} in it")


def _all_strings(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _json(path: Path, read_it: Callable[[Path], Any] | None = None) -> Any:
    """A JSON document of the folder, under the bounds of ours."""
    try:
        if read_it is not None:
            return read_it(path)
        with path.open("rb") as file:
            return bounded_json(file.read(MAX_JSON_BYTES + 1))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path.parent}: there is no {path.name} in it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        what = str(error) if "of JSON" in str(error) or "JSON of" in str(error) else "not a JSON document"
        raise UserError(f"{path}: {what}") from None


def _tell_ignored(kind: str, theirs: dict[str, Any], note: Note) -> None:
    architecture = ARCHITECTURES[kind]
    for key, what in architecture.ignored.items():
        if value := theirs.get(key, architecture.absent.get(key)):
            note(f"{key} {str(value)[:20]} ({what}) is left out: minigpt has none, and only training would use it")


def read_tokenizer(folder: Path, note: Note = lambda message: None) -> Tokenizer:
    """The tokenizer of such a folder alone. Raises as `read` does."""
    theirs = _json(folder / "config.json")
    return _tokenizer(folder, theirs.get("eos_token_id") if isinstance(theirs, dict) else None, note)


def _tokenizer(folder: Path, end: object, note: Note) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: there is no tokenizer.json in it; transformers writes one: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    document = _json(path, read_tokenizer_document)
    try:
        tokenizer, notes = vocabulary.tokenizer_of(document, end)
        checkpoints.require_storable(tokenizer.to_json())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for message in notes:
        note(message)
    return tokenizer


def _weights(kind: str, config: ModelConfig, rows: int, files: list[Path], folder: Path) -> weights.Tensors:
    """Our tensors, by our names, from their files."""
    headers = {file: _tensor_header(file) for file in files}
    found = {name: (file, *entry) for file, header in headers.items() for name, entry in header.items()}
    if config.n_layer > len(found):  # so that a lie about depth costs nothing
        raise UserError(f"{folder}: its config.json has {config.n_layer} layers, and there are {len(found)} tensors")
    ours = dict(empty_model(config, rows).state_dict())
    with torch.device("meta"):
        expected = weights.pack(kind, config, ours, rows)
    base = next(iter(ARCHITECTURES[kind].modules)).partition(".")[0] + "."
    names = {name: name if name in found else name.removeprefix(base) for name in expected}  # some were saved without
    if missing := [name for name in expected if names[name] not in found]:
        raise UserError(f"{folder}: {missing[0]} is missing, which config.json makes a part of this {kind} model")
    surplus = set(found) - set(names.values()) - ({"lm_head.weight"} if config.tie_weights else set())
    if unknown := sorted(name for name in surplus if not _BUFFERS.search(name)):
        raise UserError(f"{folder}: a {kind} model as minigpt has it has no place for {unknown[0][:80]}")
    for name, tensor in expected.items():
        file, dtype, shape = found[names[name]]
        if shape != list(tensor.shape) or dtype not in DTYPES:
            raise UserError(
                f"{file}: {name} is {dtype} {shape}, and config.json makes it {list(tensor.shape)} "
                f"({', '.join(DTYPES)} can be read)"
            )
    theirs: weights.Tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in (name for name in expected if found[names[name]][0] == file):
                    theirs[name] = opened.get_tensor(names[name]).to(torch.float32, copy=True)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file}: damaged: {error}") from None
    try:
        return weights.unpack(kind, config, theirs, ours)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _tensor_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of a safetensors file, under the bounds of our own headers."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
                raise CheckpointError(f"{path}: not a safetensors file, or cut short")
            layout = bounded_json(file.read(length))
        return {name: (entry["dtype"], entry["shape"]) for name, entry in layout.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: not a safetensors file, or damaged") from None


def _cut(
    config: ModelConfig, tensors: weights.Tensors, vocab_size: int, block_size: int | None
) -> tuple[ModelConfig, weights.Tensors]:
    """Without the rows that stand for no token, and with as much of the context as was asked for."""
    for name in ("token_embedding.weight", "head.weight"):
        tensors[name] = tensors[name][:vocab_size]
    if block_size is None:
        return config, tensors
    if not 1 <= block_size <= config.block_size:
        raise UserError(f"--block-size {block_size}: this model's context is 1 to {config.block_size:,} tokens")
    if "position_embedding.weight" in tensors:
        tensors["position_embedding.weight"] = tensors["position_embedding.weight"][:block_size]
    return parse_section(ModelConfig, config.model_dump() | {"block_size": block_size}, "--block-size"), tensors
