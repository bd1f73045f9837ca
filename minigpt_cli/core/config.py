"""Settings: typed, frozen and validated, from YAML and `--set`. Owns every key's name, default and bounds.

Precedence: defaults < file < `--set section.key=value` < named flags (which arrive here as further overrides).
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.plain_yaml import Plain, dump_yaml, parse_yaml

MAX_CONFIG_BYTES = 100_000

Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1 << 40)]


class Section(BaseModel):
    """A group of settings: immutable, no unknown keys, no silent conversions (a string is not a number).

    Only what was written without quotes, in YAML or after `--set`, is read by the type of its setting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_plain(cls, document: Any) -> Any:
        if isinstance(document, Plain):
            return document.value()
        if not isinstance(document, dict):
            return document
        return {
            key: _read_as(cls.model_fields[key].annotation, value) if key in cls.model_fields else value
            for key, value in document.items()
        }


def _read_as(annotation: Any, value: Any) -> Any:
    """What was written plain, as a setting of this type understands it: text stays text, a count may be 1e4."""
    if not isinstance(value, Plain):
        return value
    kinds, read = _kinds(annotation), value.value()
    if kinds == {str} and value:
        return str(value)
    if isinstance(read, float) and int in kinds and float not in kinds and abs(read) <= 1 << 53 and read.is_integer():
        return int(read)
    return read


def _kinds(annotation: Any) -> set[Any]:
    """The types that a setting may have; a choice of words is text."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(choice) for choice in parts}
    if origin is Annotated:
        return _kinds(parts[0])
    return set().union(*map(_kinds, parts)) if origin in (Union, UnionType) else {annotation}


class DataConfig(Section):
    path: str = "data/input"  # the folder that `minigpt prepare` made
    sampling: Literal["random", "epoch"] = "random"  # random windows (the seed's way), or each window once an epoch


class ModelConfig(Section):
    n_layer: Annotated[int, Field(ge=0, le=1000)] = 6
    n_head: Annotated[int, Field(ge=1, le=1024)] = 6
    n_embd: Annotated[int, Field(ge=1, le=65536)] = 384
    block_size: Annotated[int, Field(ge=1, le=1 << 20)] = 256  # the context window, in tokens
    dropout: Probability = 0.0  # everywhere below, unless that place has its own
    dropout_attn: Probability | None = None  # on the attention weights
    dropout_proj: Probability | None = None  # on attention's output projection
    dropout_mlp: Probability | None = None  # on the feed-forward's output
    position: Literal["learned", "rope", "none"] = "learned"
    rope_base: Annotated[float, Field(ge=1)] = 10000.0  # rotary wavelengths go up to 2 pi times this
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    norm_eps: Annotated[float, Field(gt=0, le=1)] | None = None  # null: 1e-5 for layernorm, 1e-6 for rmsnorm
    qk_norm: bool = False  # queries and keys get a norm of the same kind, over the width of a head
    n_kv_head: Annotated[int, Field(ge=1, le=1024)] | None = None  # heads of keys and values; null: n_head
    head_width: Annotated[int, Field(ge=1, le=65536)] | None = None  # of one head; null: n_embd / n_head
    mlp: Literal["relu", "gelu", "gelu_tanh", "relu2", "swiglu"] = "relu"  # gelu_tanh: as GPT-2 approximates gelu
    mlp_width: Annotated[int, Field(ge=1, le=1 << 20)] | None = None  # null: 4 n_embd, for swiglu two thirds of that
    bias: bool = True  # in the norms, attention's output projection and the feed-forward
    bias_qkv: bool = False
    bias_head: bool = True
    tie_weights: bool = False  # the head shares the token embedding's matrix
    vocab_multiple: Annotated[int, Field(ge=1, le=1024)] = 1  # embedding and head get unused rows, up to a multiple
    logit_softcap: Annotated[float, Field(gt=0)] | None = None  # logits are bent so that they stay within +/- this
    init: Literal["normal", "gpt2", "torch"] = "normal"  # N(0, 0.02), zero biases; as GPT-2; or PyTorch's defaults
    zero_init: bool = False  # what attention and feed-forward add to the residual stream begins as nothing

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.n_layer and self.head_width is None and self.n_embd % self.n_head:
            below = self.n_embd // self.n_head * self.n_head
            near = " or ".join(str(n) for n in (below, below + self.n_head) if n)
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; nearest n_embd: {near}")
        if self.n_layer and self.position == "rope" and self.each_head % 2:
            whence = "" if self.head_width else "n_embd / n_head = "
            raise ValueError(f"rope turns pairs: the head width {whence}{self.each_head} is odd")
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            divisors = ", ".join(str(n) for n in range(1, self.n_head + 1) if self.n_head % n == 0)
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}; try {divisors}")
        return self

    @property
    def each_head(self) -> int:
        """The width of one head: `head_width`, once it is a number."""
        return self.head_width or self.n_embd // self.n_head


class TrainConfig(Section):
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1337
    batch_size: Annotated[int, Field(ge=1, le=1 << 20)] = 64  # sequences per step, over all devices
    micro_batch_size: Count | None = None  # sequences per device and forward pass; null: as many as batch_size
    max_iters: Count | Literal["auto"] = 5000  # auto: as many as the tokens and the parameters ask for
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    patience: Count | None = None  # stop after so many evaluations without a better one
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW for all else
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4  # AdamW's
    muon_learning_rate: Annotated[float, Field(gt=0)] = 0.02  # follows the same schedule
    warmup_iters: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    cooldown: Annotated[float, Field(gt=0, le=1)] = 0.2  # with wsd: the part of the steps in which the rate falls
    lr_decay_iters: Count | None = None  # where the schedule reaches min_lr; null: max_iters
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] | Literal["auto"] = 0.01  # auto: more, the more parameters per token
    decay: Literal["matrices", "all"] = "matrices"  # what weight decay applies to
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    grad_clip: Annotated[float, Field(gt=0)] | None = None  # largest global gradient norm
    ema: Probability | None = None  # judge and keep a moving average of the weights, with this decay a step
    log_interval: Count = 10
    eval_interval: Count = 500
    checkpoint_interval: Count = 500
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = 10.0  # save after so many minutes too; null: never
    sample_interval: Count | None = None
    keep: Annotated[int, Field(ge=0)] = 0  # numbered snapshots to keep beside `last` and `best`

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            divisors = sorted(d for i in range(1, math.isqrt(self.batch_size) + 1) if self.batch_size % i == 0
                              for d in {i, self.batch_size // i})  # fmt: skip
            below, above = max(d for d in divisors if d < micro), min((d for d in divisors if d > micro), default=0)
            near = " or ".join(str(d) for d in (below, above) if d)
            raise ValueError(f"batch_size {self.batch_size} cannot be split into micro batches of {micro}; try {near}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr:g} is above learning_rate {self.learning_rate:g}")
        return self

    @property
    def steps(self) -> int:
        """`max_iters`, once it is a number."""
        assert self.max_iters != "auto", "resolve the config first"
        return self.max_iters

    @property
    def decay_strength(self) -> float:
        """`weight_decay`, once it is a number."""
        assert self.weight_decay != "auto", "resolve the config first"
        return self.weight_decay

    @property
    def accumulation(self) -> int:
        """Forward and backward passes per optimizer step, on a single device."""
        return self.pieces(1)

    def pieces(self, ranks: int) -> int:
        """Forward and backward passes per optimizer step on each of so many devices, which share the batch.

        Raises UserError where it cannot be shared in equal parts.
        """
        at_once = ranks * (self.micro_batch_size or 1)
        if self.batch_size % at_once:
            below, above = self.batch_size // at_once * at_once, -(-self.batch_size // at_once) * at_once
            raise UserError(
                f"train.batch_size {self.batch_size} cannot be shared by {ranks} ranks in micro batches of "
                f"{self.micro_batch_size or 1}; try {f'{below} or ' if below else ''}{above}"
            )
        return self.batch_size // at_once if self.micro_batch_size else 1


class RuntimeConfig(Section):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$")] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto"] | bool = "auto"  # torch.compile for training; decode.c for decoding on a CPU
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"  # under torchrun: copies of the model, or slices
    checkpoints: Literal["file", "sharded"] = "file"  # gathered in one file; or a folder with a part from every rank
    checkpoint_activations: bool = False  # compute each block again on the way back, instead of keeping its insides
    deterministic: bool = False  # bit-for-bit repeatable on CUDA too; slower there, free on the CPU


class Config(Section):
    """The whole of it; `Config()` is what the defaults give."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    out_dir: Annotated[str, Field(min_length=1)] = "checkpoints"

    def to_yaml(self) -> str:
        """The resolved settings, every key spelled out. `load_config` reads it back to an equal object."""
        return dump_yaml(self.model_dump())


def load_config(config: str | None, overrides: Sequence[tuple[str, Any]] = ()) -> Config:
    """Read a YAML file, or the name of a config shipped with the package, and put `overrides` on top.

    `overrides` are pairs of a dotted key and a value, later ones win. Raises UserError naming the key and the remedy.
    """
    document = {} if config is None else _read(_find(config))
    merged = copy.deepcopy(document)
    for key, value in overrides:
        _assign(merged, key, value)
    try:
        return parse_config(merged, config or "--set")
    except UserError:
        if config is None or not overrides:
            raise
        parse_config(document, config)  # raises if the file itself is at fault; if not,
        return parse_config(merged, "--set")  # what was put on top of it is


def parse_config(document: object, where: str) -> Config:
    """Plain data (from YAML or a checkpoint's header) -> Config. Raises UserError; `where` names the source."""
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_complaints(error, document)[:3])) from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


SectionT = TypeVar("SectionT", bound=Section)


def parse_section(section: type[SectionT], document: dict[str, Any], where: str) -> SectionT:
    """One section from plain data, for a command that needs no more. Raises UserError."""
    try:
        return section.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_complaints(error, document))) from None


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value` -> (dotted key, the value as it was typed, for the setting to read). Raises UserError."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {text}: write it as section.key=value, for example --set train.max_iters=100")
    return key.strip(), Plain(value)


def config_difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), for every setting in which the two differ."""
    before, after = _flatten(old.model_dump()), _flatten(new.model_dump())
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every config that comes with minigpt, from the wheel or from the repository."""
    package = Path(__file__).parents[1]
    folder = package / "configs"
    return {
        path.stem: path for path in sorted((folder if folder.is_dir() else package.parent / "configs").glob("*.yaml"))
    }


def _find(config: str) -> Path:
    path, shipped = Path(config), shipped_configs()
    try:
        if path.is_file():
            return path
        if config in shipped:
            return shipped[config]
        if path.exists():
            raise UserError(f"{config}: not a file")
    except OSError as error:  # a name too long, a folder that may not be entered
        raise UserError(f"{config}: {error.strerror}") from None
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{config}: no such file, and no config of that name; {hint}shipped: {', '.join(shipped)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes; that is no config")
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    document = parse_yaml(text, str(path))
    if document is None or (isinstance(document, Plain) and document.value() is None):
        document = {}
    if not isinstance(document, dict):
        raise UserError(f"{path}: a config is a mapping of sections (data, model, train, runtime)")
    kinds = {key: field.annotation for key, field in Config.model_fields.items()}
    return {  # of a section that is commented out, the key is left
        key: value for key, value in document.items() if _read_as(kinds.get(key), value) is not None
    }


def _assign(document: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for name in sections:
        inner = document.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {dotted}: {name} is not a section")
        document = inner
    document[key] = value


def _flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _complaints(errors: ValidationError, document: object) -> list[str]:
    """One for each setting: where it may be one thing or another, pydantic has an error for either."""
    by_key: dict[Any, list[Any]] = {}
    for error in errors.errors():
        by_key.setdefault(error["loc"][:2], []).append(error)
    return [_explain(alternatives, document) for alternatives in by_key.values()]


def _explain(errors: list[Any], document: object) -> str:
    """What pydantic has against a setting, in a user's words: the dotted key, what is wrong, the value."""
    error = errors[0]
    if error["type"] == "invalid_key":
        return f"a key must be a word, not {_shown(error['loc'][-1])}"
    loc = [str(part) for part in error["loc"] if str(part) in _known_names() or error["type"] == "extra_forbidden"]
    key, value = _shown(".".join(loc))[1:-1], error["input"]
    shown = _shown(value)
    if error["type"] == "extra_forbidden":
        section = Config.model_fields[loc[0]].annotation if len(loc) > 1 else Config
        names = list(getattr(section, "model_fields", {}))
        near = difflib.get_close_matches(loc[-1], names, n=1)
        elsewhere = [f"{s}.{loc[-1]}" for s in Config.model_fields if loc[-1] in _fields_of(s)]
        hint = (
            f"it belongs at {elsewhere[0]}"
            if elsewhere
            else f"did you mean {near[0]}?"
            if near
            else f"known: {', '.join(names)}"
        )
        return f"unknown key {key}; {hint}"
    if error["type"] == "value_error":  # our own validators, whose message is complete
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key or 'the config'}: expected a section of keys, not {shown}"
    if key == "runtime.device" or (error["loc"] and error["loc"][-1] == "device"):
        return f"{key}: should be auto, cpu, cuda, cuda:N or mps, not {shown}"
    others = [e["msg"].removeprefix("Input should be ") for e in errors[1:]]
    message = " or ".join([error["msg"][0].lower() + error["msg"][1:], *others])
    return f"{key}: {message.removeprefix('input ')}, not {shown}"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python will print
        return "so long a number"
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_of(section: str) -> list[str]:
    return list(getattr(Config.model_fields[section].annotation, "model_fields", {}))


def _known_names() -> set[str]:
    return set(Config.model_fields) | {name for section in Config.model_fields for name in _fields_of(section)}
