"""Starting a run from the weights of another: what the two must agree in, and what its tensors become."""

from __future__ import annotations

import torch.nn.functional as F

from minigpt_cli.core.checkpoint import MODEL, Checkpoint, Origin, Progress
from minigpt_cli.core.config import Config, ModelConfig, parse_section
from minigpt_cli.core.dataset import Dataset
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.model import empty_model
from minigpt_cli.core.shell import command_line
from minigpt_cli.core.tokenizer import same_ids

DROPOUTS = ("dropout", "dropout_attn", "dropout_proj", "dropout_mlp")
FREE = (*DROPOUTS, "block_size", "vocab_multiple")  # what another run of the same weights may choose anew


def with_model_of(config: Config, source: ModelConfig, where: str) -> Config:
    """`config` with the model whose weights `where` holds.

    What `config` itself says of the model must be true of that model, except for dropout, which is the new run's to
    choose, a shorter context, and padding. What it does not say comes from there. Raises UserError.
    """
    said = config.model.model_fields_set
    own = {key: value for key, value in config.model.model_dump().items() if key in said}
    if wrong := {k: v for k, v in own.items() if k not in FREE and v != getattr(source, k)}:
        shown = ", ".join(f"model.{k}: {v}, there {getattr(source, k)}" for k, v in list(wrong.items())[:3])
        raise UserError(
            f"the config describes another model than {where} ({shown}); --init-from brings its own model: "
            "use a config without those keys, such as --config finetune"
        )
    if own.get("block_size", 1) > source.block_size:
        raise UserError(
            f"model.block_size {own['block_size']} is more than the {source.block_size} tokens of context that {where} "
            "has learned; choose no more"
        )
    kept = source.model_dump() | {key: own[key] for key in FREE if key in own}
    if any(key in own for key in DROPOUTS):  # together they are one choice
        kept |= {key: own.get(key, ModelConfig.model_fields[key].default) for key in DROPOUTS}
    return config.model_copy(update={"model": parse_section(ModelConfig, kept, where)})


def require_tokenizer_of(source: Checkpoint, dataset: Dataset) -> None:
    """Raises UserError unless the dataset's tokens are those that `source` knows."""
    if not same_ids(dataset.meta.tokenizer, source.tokenizer.to_json()):
        raise UserError(
            f"{dataset.folder} was prepared with another tokenizer than {source.path} has; prepare the text for it: "
            f"{command_line(['minigpt', 'prepare', 'TEXT', '--out', 'DIR', '--tokenizer', source.path])}"
        )


def starting_point(source: Checkpoint, config: Config) -> Checkpoint:
    """What a run with `config` begins with at its step 0: the weights of `source`, and nothing else of its history.

    Of learned positions only those of the new context stay; rows that pad the vocabulary come and go.
    """
    shapes = empty_model(config.model, source.tokenizer.vocab_size).state_dict()
    tensors = {}
    for name, target in shapes.items():
        weight = source.tensors[MODEL + name].float()
        rows = [0, 0] * (weight.ndim - 1) + [0, len(target) - len(weight)]  # to come at the end; to go, if negative
        tensors[MODEL + name] = F.pad(weight, rows)
    origin = Origin(
        name=source.path.name, step=source.header.step, dataset_fingerprint=source.header.dataset_fingerprint
    )
    header = source.header.model_copy(
        update={"config": config.model_dump(), "step": 0, "tokens_seen": 0, "val_loss": None, "weights": "trained",
                "progress": Progress(), "initialised_from": origin, "checksums": {}}
    )  # fmt: skip
    return Checkpoint(source.path, header, config, source.tokenizer, tensors)
