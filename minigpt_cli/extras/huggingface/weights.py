"""Our tensors -> theirs, and theirs -> ours, by the names and forms in `architectures`. Reads and writes no file.

Between the two stand parts: our modules with what is packed into one taken apart (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minigpt_cli.core.config import ModelConfig
from minigpt_cli.core.errors import UserError
from minigpt_cli.extras.huggingface.architectures import ARCHITECTURES, Architecture, Module
from minigpt_cli.extras.huggingface.settings import resolved

Tensors = dict[str, Tensor]
LARGEST_MISS = 1e-5  # of a logit, that folding the head's bias may cost


def pack(kind: str, config: ModelConfig, ours: Tensors, vocab_size: int) -> Tensors:
    """All weights of their model. `ours` may lie on the meta device: then this tells names and shapes.

    Rows of the embedding and the head beyond `vocab_size` are left out: they stand for no token.
    """
    architecture = ARCHITECTURES[kind]
    parts = _take_apart(config, ours, vocab_size)
    if "head.bias" in parts:
        parts = _fold_head_bias(parts, architecture)
    if not architecture.shares_keys:
        parts = {name: _for_every_head(name, tensor, config) for name, tensor in parts.items()}
    if config.position == "none" and "learned" in architecture.can["position"]:
        parts["position_embedding.weight"] = ours["token_embedding.weight"].new_zeros(config.block_size, config.n_embd)
    theirs: Tensors = {}
    for name, module, members in _modules(architecture, config, parts):
        weights = [parts[f"{member}.weight"] for member in members]
        theirs[f"{name}.weight"] = module.form.pack(torch.cat(weights), config)
        if _has_bias(module, config):
            zeros = [weight.new_zeros(weight.shape[0]) for weight in weights]
            biases = [parts.get(f"{m}.bias", zero) for m, zero in zip(members, zeros, strict=True)]
            theirs[f"{name}.bias"] = module.form.pack(torch.cat(biases), config)
    return theirs


def unpack(kind: str, config: ModelConfig, theirs: Tensors, ours: Tensors) -> Tensors:
    """Our weights from theirs. `ours` has the names and shapes wanted (on the meta device). Inverse of `pack`.

    UserError where their model holds something that ours has no place for: a bias that is not zero, heads that differ.
    """
    architecture = ARCHITECTURES[kind]
    wanted = _take_apart(config, ours, vocab_size=ours["token_embedding.weight"].shape[0])
    parts: Tensors = {}
    for name, module, members in _modules(architecture, config, wanted):
        rows = [len(wanted[f"{member}.weight"]) for member in members]
        for ending in ("weight", "bias") if _has_bias(module, config) else ("weight",):
            pieces = module.form.unpack(theirs[f"{name}.{ending}"], config).split(rows)
            for member, piece in zip(members, pieces, strict=True):
                part = f"{member}.{ending}"
                if part in parts and not torch.equal(parts[part], piece):
                    raise UserError(f"{name}.{ending} differs from head to head, and minigpt has one for all heads")
                if part not in wanted and piece.any():
                    raise UserError(f"{name}.{ending} is not zero, and minigpt's model has no such bias")
                parts[part] = piece
    return {name: _put_together(name, parts, wanted) for name in ours}


def _modules(
    architecture: Architecture, config: ModelConfig, parts: Tensors
) -> Iterator[tuple[str, Module, tuple[str, ...]]]:
    """(their name, module, the names of its parts), for each module that this model has."""
    for template, module in architecture.modules.items():
        for i in range(config.n_layer if "{i}" in template else 1):
            members = tuple(part.replace("{i}", str(i)) for part in module.ours)
            if f"{members[0]}.weight" not in parts:
                continue
            heads = config.n_head if members[0].endswith("norm_q") else config.n_kv_head or config.n_head
            for h in range(heads if "{h}" in template else 1):
                yield template.replace("{i}", str(i)).replace("{h}", str(h)), module, members


def _has_bias(module: Module, config: ModelConfig) -> bool:
    return module.biased if isinstance(module.biased, bool) else any(getattr(config, o) for o in module.biased)


def _take_apart(config: ModelConfig, ours: Tensors, vocab_size: int) -> Tensors:
    """Our tensors, with q, k, v and gate, up each on its own; a tied head is not there."""
    widths = resolved(config)
    D, width = widths["head_width"], widths["mlp_width"]
    qkv = {"q": config.n_head * D, "k": widths["n_kv_head"] * D, "v": widths["n_kv_head"] * D}
    split = {"qkv": qkv} | ({"up": {"gate": width, "up": width}} if config.mlp == "swiglu" else {})
    parts: Tensors = {}
    for name, tensor in ours.items():
        module, _, ending = name.rpartition(".")
        place, _, last = module.rpartition(".")
        if name == "head.weight" and config.tie_weights:
            continue
        if module in ("token_embedding", "head"):
            parts[name] = tensor[:vocab_size]
        elif last in split:
            pieces = tensor.split(list(split[last].values()))
            parts |= {f"{place}.{part}.{ending}": piece for part, piece in zip(split[last], pieces, strict=True)}
        else:
            parts[name] = tensor
    return parts


def _put_together(name: str, parts: Tensors, wanted: Tensors) -> Tensor:
    """One of our tensors from its parts."""
    module, _, ending = name.rpartition(".")
    place, _, last = module.rpartition(".")
    if name == "head.weight" and name not in wanted:
        return parts["token_embedding.weight"]
    if last == "qkv":
        return torch.cat([parts[f"{place}.{part}.{ending}"] for part in "qkv"])
    if f"{place}.gate.{ending}" in parts and last == "up":
        return torch.cat([parts[f"{place}.{part}.{ending}"] for part in ("gate", "up")])
    return parts[name]


def _for_every_head(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Keys and values that heads share, written out for each of them."""
    if name.rpartition(".")[0].rpartition(".")[2] not in ("k", "v"):
        return tensor
    shared = tensor.unflatten(0, (config.n_kv_head or config.n_head, config.each_head))
    return shared.repeat_interleave(config.n_head // shared.shape[0], dim=0).flatten(0, 1)


def _fold_head_bias(parts: Tensors, architecture: Architecture) -> Tensors:
    """The head's bias b, which their model has not, as a shift d of the final norm's bias: W d = b, so that
    W (y + d) = W y + b. UserError where no d does that: in general, more tokens than the model is wide."""
    parts = dict(parts)
    b_V = parts.pop("head.bias").double()
    W_VC = parts.get("head.weight", parts["token_embedding.weight"]).double()
    norm = parts.get("norm.bias", parts["norm.weight"].new_zeros(W_VC.shape[1])).double()
    d_C = torch.linalg.lstsq(W_VC, b_V, driver="gelsd").solution
    parts["norm.bias"] = (norm + d_C).float()
    miss = (W_VC @ (parts["norm.bias"].double() - norm) - b_V).abs().max().item()
    if not miss <= LARGEST_MISS:
        raise UserError(
            f"model.bias_head: {architecture.name} has no bias in its head, and this one's cannot be folded into the "
            f"final norm's ({W_VC.shape[0]:,} tokens, a width of {W_VC.shape[1]:,}: it misses a logit by {miss:.1g}); "
            "train with --set model.bias_head=false"
        )
    return parts
