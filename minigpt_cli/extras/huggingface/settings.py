"""A config of ours <-> an architecture of transformers and its config.json, by the table in `architectures`."""

from __future__ import annotations

from typing import Any

from minigpt_cli.core.config import ModelConfig, parse_section
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.layers import default_mlp_width, norm_eps
from minigpt_cli.extras.huggingface.architectures import ANYTHING, ARCHITECTURES, BIASES, Architecture

DROPOUTS = ("dropout_attn", "dropout_proj", "dropout_mlp")
OPTIONS = ("position", "norm", "qk_norm", "mlp", "head_width", *BIASES, "bias_head", "tie_weights", "logit_softcap")
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2", "swiglu": "silu"}
OURS_BY_ACTIVATION = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh",
                                                                               "swish": "swiglu"}  # fmt: skip


def choose(config: ModelConfig) -> str:
    """The model_type of the architecture that is this config's function. UserError, naming what stands in the way."""
    misses = {kind: _misses(config, there) for kind, there in ARCHITECTURES.items() if not there.only_read}
    nearest = min(misses, key=lambda kind: len(misses[kind]))  # the first of the best
    if not misses[nearest]:
        return nearest
    reasons = " and ".join(f"model.{option}={value}" for option, value in misses[nearest].items())
    raise UserError(
        f"no architecture of transformers is the same function as this model; the nearest, "
        f"{ARCHITECTURES[nearest].name}, cannot have {reasons}"
    )


def _misses(config: ModelConfig, architecture: Architecture) -> dict[str, str]:
    """Option -> value, for each that the architecture does not have, as a user writes them."""
    values = {option: getattr(config, option) for option in OPTIONS}
    if config.each_head * config.n_head == config.n_embd:
        values["head_width"] = None
    wrong = {o: v for o, v in values.items() if (can := architecture.can.get(o, ANYTHING)) != ANYTHING and v not in can}
    return {option: str(value).lower() for option, value in wrong.items()}


def resolved(config: ModelConfig) -> dict[str, Any]:
    """Every option, those that depend on others as a number."""
    values = config.model_dump() | {
        "n_kv_head": config.n_kv_head or config.n_head, "head_width": config.each_head, "norm_eps": norm_eps(config),
        "mlp_width": config.mlp_width or default_mlp_width(config),
    }  # fmt: skip
    return values | {name: config.dropout if values[name] is None else values[name] for name in DROPOUTS}


def settings_of(kind: str, config: ModelConfig) -> dict[str, Any]:
    """What a config.json of this model_type says of our config."""
    architecture, ours = ARCHITECTURES[kind], resolved(config)
    ours["mlp"] = (ACTIVATIONS | architecture.activations)[config.mlp]
    settings = {key: ours[options[-1]] for key, options in architecture.settings.items()}
    settings |= {key: any(ours[o] for o in options) for key, options in architecture.flags.items()}
    settings |= dict.fromkeys(architecture.ignored, 0.0)
    if "rope" in architecture.can["position"]:
        # Written twice: transformers 5 reads the second, older versions the first.
        rotary = {"rope_theta": config.rope_base}
        if architecture.rotates_part is not None:
            rotary["partial_rotary_factor"] = 1.0
        settings |= rotary | {"rope_parameters": {"rope_type": "default"} | rotary}
    for key, value in architecture.constants.items():
        settings[key] = value * config.n_layer if isinstance(value, list) else value
    return settings


def not_carried(kind: str, config: ModelConfig) -> list[str]:
    """Those of our dropout rates for which the architecture has another or none, as a user writes them."""
    ours = resolved(config)
    carried = {option: ours[options[-1]] for options in ARCHITECTURES[kind].settings.values() for option in options}
    return [f"{name} {ours[name]:g}" for name in DROPOUTS if ours[name] != carried.get(name, 0.0)]


def options_of(theirs: dict[str, Any], where: str) -> tuple[str, ModelConfig]:
    """The model_type and our config of a config.json. UserError, naming the setting that stands in the way."""
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{where}: model_type {str(kind)[:40]!r} is not among those that can be imported: {known}")
    architecture = ARCHITECTURES[kind]
    said = architecture.absent | theirs
    # What is not among its settings follows from what it is.
    ours: dict[str, Any] = {o: architecture.can[o][0] for o in ("position", "norm", "qk_norm") if o in architecture.can}
    ours |= {"bias_head": False} | dict.fromkeys(DROPOUTS, 0.0)
    for key, options in architecture.settings.items():
        if key not in said:
            raise UserError(f"{where}: it does not say {key}")
        ours |= dict.fromkeys(options, said[key])
    for option, source in architecture.biases.items():
        ours[option] = said.get(source, False) if isinstance(source, str) else source
    ours["mlp"] = OURS_BY_ACTIVATION.get(str(ours["mlp"]), ours["mlp"])
    if ours["position"] == "rope":
        ours["rope_base"] = _rope_base(said, architecture, where)
    ours = {option: value for option, value in ours.items() if value is not None}  # theirs for "the default"
    config = parse_section(ModelConfig, ours, where)
    if misses := _misses(config, architecture):
        raise UserError(f"{where}: a {kind} model with " + ", ".join(f"{o} {v}" for o, v in misses.items())
                        + " cannot be imported")  # fmt: skip
    expected = {key: value for key, value in settings_of(kind, config).items() if key not in architecture.ignored}
    _check_the_rest(said, expected, where)
    return kind, _with_nulls(config)


def _rope_base(said: dict[str, Any], architecture: Architecture, where: str) -> Any:
    """How far the slowest pair turns. UserError for rotations that are scaled, or turn only a part of a head."""
    rotary = said.get("rope_parameters") or said.get("rope_scaling") or {}
    if not isinstance(rotary, dict):
        raise UserError(f"{where}: its rope_parameters are not an object")
    scaling = rotary.get("rope_type", rotary.get("type", "default"))
    if scaling != "default" or any(isinstance(value, dict) for value in rotary.values()):
        raise UserError(f"{where}: rope_scaling {str(scaling)[:40]!r} cannot be imported: minigpt's rotation is plain")
    part = rotary.get("partial_rotary_factor", said.get("partial_rotary_factor", architecture.rotates_part or 1.0))
    if part != 1:
        raise UserError(
            f"{where}: partial_rotary_factor {str(part)[:20]} cannot be imported: minigpt turns whole heads"
        )
    return rotary.get("rope_theta", said.get("rope_theta", 10000.0))


def _check_the_rest(said: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """What a config.json says beyond our options must be what it would say if we had written it."""
    for key, value in expected.items():
        found = said.get(key)
        if key.startswith("rope") or key == "partial_rotary_factor" or found == value:
            continue
        if found is None and key in said and not isinstance(value, bool):  # their word for the default
            continue
        if OURS_BY_ACTIVATION.get(str(found), "") == OURS_BY_ACTIVATION.get(str(value), " "):
            continue
        raise UserError(f"{where}: {key} {str(found)[:40]} cannot be imported (only {str(value)[:40]})")
    kinds = said.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise UserError(f"{where}: layer_types other than full_attention cannot be imported")


def _with_nulls(config: ModelConfig) -> ModelConfig:
    """The same model, with null for whatever null would mean too."""
    default = ModelConfig(norm=config.norm)
    changes: dict[str, Any] = {}
    if config.n_kv_head == config.n_head:
        changes["n_kv_head"] = None
    if config.n_embd % config.n_head == 0 and config.head_width == config.n_embd // config.n_head:
        changes["head_width"] = None
    if config.norm_eps == norm_eps(default):
        changes["norm_eps"] = None
    if config.mlp_width == default_mlp_width(config):
        changes["mlp_width"] = None
    if config.dropout_attn == config.dropout_proj == config.dropout_mlp:
        changes |= {"dropout": config.dropout_attn or 0.0} | dict.fromkeys(DROPOUTS)
    return config.model_copy(update=changes)
