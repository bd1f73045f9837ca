"""Which architecture of transformers is the same function as which of our configs: a table, which `settings` and
`weights` read in both directions.

An architecture is data: the options it can express, the names of its settings and of its weights. What a table cannot
say, whether two forward passes agree, the tests ask transformers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minigpt_cli.core.config import ModelConfig

Values = tuple[Any, ...]
BIASES = ("bias", "bias_qkv")
ANYTHING: Values = ()


@dataclass(frozen=True)
class Form:
    """How their tensor is made of ours (stacked by rows, where they hold several in one), and ours of theirs."""

    pack: Callable[[Tensor, ModelConfig], Tensor]
    unpack: Callable[[Tensor, ModelConfig], Tensor]


def _swap_heads(x: Tensor, outer: int, inner: int, width: int) -> Tensor:
    """Rows in the order (outer, inner, width) -> (inner, outer, width)."""
    return x.reshape(outer, inner, width, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


AS_IT_IS = Form(lambda x, c: x, lambda x, c: x)
TRANSPOSED = Form(lambda x, c: x.t(), lambda x, c: x.t())  # GPT-2's Conv1D; a vector stays a vector
HEAD_BY_HEAD = Form(  # q, k and v of one head, then of the next
    lambda x, c: _swap_heads(x, 3, c.n_head, c.each_head), lambda x, c: _swap_heads(x, c.n_head, 3, c.each_head)
)
LESS_ONE = Form(lambda x, c: x - 1, lambda x, c: x + 1)  # gains that are added to one
SCALED = Form(lambda x, c: x / c.n_embd**0.5, lambda x, c: x * c.n_embd**0.5)  # embeddings that are multiplied back


@dataclass(frozen=True)
class Module:
    """One of their modules: of which of ours it is made, and which of our options give it a bias.

    `{i}` in a name is the layer; `{h}` the head, where every head has a copy.
    """

    ours: tuple[str, ...]
    biased: tuple[str, ...] | bool = False
    form: Form = AS_IT_IS


@dataclass(frozen=True)
class Architecture:
    """`can` maps an option of ours to the values it may have here: any, if it is not named or ANYTHING.

    `settings`: their key -> our options. `constants`: their key -> the value it must have. `absent`: what a key that is
    missing in a config.json means. `flags`: their key -> those of our options that need it; `biases` the way back.
    """

    name: str
    can: dict[str, Values]
    modules: dict[str, Module]
    settings: Mapping[str, tuple[str, ...]]
    constants: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, Any] = field(default_factory=dict)
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: dict[str, str | bool] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)  # ours -> theirs, where it is not the usual name
    shares_keys: bool = True  # knows n_kv_head; else keys and values are written out for every head
    rotates_part: float | None = None  # the share of a head that turns by default, if there is such a setting
    ignored: dict[str, str] = field(default_factory=dict)  # their key, whose effect is not carried over -> what it is
    only_read: bool = False  # what it can is said by another too; transformers may give it a tokenizer of its own

    @property
    def norms_have_biases(self) -> bool:
        return self.can["norm"] == ("layernorm",)


def _modules(names: Mapping[str, str], biased: Mapping[str, tuple[str, ...] | bool]) -> dict[str, Module]:
    """Their name -> Module, for those that are one of ours as it is."""
    return {theirs: Module((ours,), biased.get(ours.rpartition(".")[2], False)) for theirs, ours in names.items()}


# Most are named as Llama's.
_OUTSIDE = {"model.embed_tokens": "token_embedding", "model.norm": "norm", "lm_head": "head"}
_ATTENTION = {f"model.layers.{{i}}.self_attn.{x}_proj": f"blocks.{{i}}.attn.{x}" for x in "qkv"} | {
    "model.layers.{i}.self_attn.o_proj": "blocks.{i}.attn.proj"
}
_NORMS = {
    "model.layers.{i}.input_layernorm": "blocks.{i}.norm_attn",
    "model.layers.{i}.post_attention_layernorm": "blocks.{i}.norm_mlp",
}
_PLAIN = {f"model.layers.{{i}}.mlp.{x}_proj": f"blocks.{{i}}.mlp.{x}" for x in ("up", "down")}
_GATED = {"model.layers.{i}.mlp.gate_proj": "blocks.{i}.mlp.gate"} | _PLAIN
_QK_NORMS = {f"model.layers.{{i}}.self_attn.{x}_norm": f"blocks.{{i}}.attn.norm_{x}" for x in "qk"}
_LLAMA = _OUTSIDE | _ATTENTION | _NORMS
_ALL_NORMS: dict[str, tuple[str, ...] | bool] = {"norm": True, "norm_attn": True, "norm_mlp": True}


def _linear(attention: tuple[str, ...] | bool, mlp: tuple[str, ...] | bool) -> dict[str, tuple[str, ...] | bool]:
    return dict.fromkeys(("q", "k", "v", "proj"), attention) | dict.fromkeys(("gate", "up", "down"), mlp)


_SIZES = {
    "num_hidden_layers": ("n_layer",), "num_attention_heads": ("n_head",), "hidden_size": ("n_embd",),
    "max_position_embeddings": ("block_size",), "num_key_value_heads": ("n_kv_head",),
    "intermediate_size": ("mlp_width",), "tie_word_embeddings": ("tie_weights",), "hidden_act": ("mlp",),
    "attention_dropout": ("dropout_attn",),
}  # fmt: skip
_RMS = _SIZES | {"rms_norm_eps": ("norm_eps",), "head_dim": ("head_width",)}
_UNGATED = ("relu", "gelu", "gelu_tanh", "relu2")
_RMS_CAN: dict[str, Values] = {
    "position": ("rope",), "norm": ("rmsnorm",), "qk_norm": (False,), "mlp": ("swiglu",), "bias_head": (False,),
    "logit_softcap": (None,),
}  # fmt: skip
_LAYER_CAN: dict[str, Values] = {
    "position": ("rope",), "norm": ("layernorm",), "mlp": _UNGATED, "logit_softcap": (None,), "head_width": (None,),
}  # fmt: skip
_RMS_ABSENT = {"rms_norm_eps": 1e-6, "head_dim": None, "num_key_value_heads": None, "tie_word_embeddings": False,
               "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}  # fmt: skip
_BIASED = _linear(BIASES, ("bias",))
_LLAMA_FLAGS: dict[str, Any] = {
    "flags": {"attention_bias": BIASES, "mlp_bias": ("bias",)},
    "biases": {"bias": "mlp_bias", "bias_qkv": "attention_bias"},
}
_EVERYTHING = _linear(True, True) | _ALL_NORMS | {"norm_q": True, "norm_k": True}
_ALL_BIASES: dict[str, str | bool] = {"bias": True, "bias_qkv": True}

# By model_type. The first that can express a config is the one it is exported as.
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {"position": ("learned", "none"), "norm": ("layernorm",), "qk_norm": (False,), "mlp": _UNGATED,
         "logit_softcap": (None,), "head_width": (None,)},
        _modules({"transformer.wte": "token_embedding", "transformer.wpe": "position_embedding",
                  "transformer.h.{i}.ln_1": "blocks.{i}.norm_attn", "transformer.h.{i}.ln_2": "blocks.{i}.norm_mlp",
                  "transformer.ln_f": "norm", "lm_head": "head"}, _ALL_NORMS)
        | {"transformer.h.{i}.attn.c_attn": Module(tuple(f"blocks.{{i}}.attn.{x}" for x in "qkv"), True, TRANSPOSED)}
        | {f"transformer.h.{{i}}.{theirs}": Module((f"blocks.{{i}}.{ours}",), True, TRANSPOSED)
           for theirs, ours in (("attn.c_proj", "attn.proj"), ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down"))},
        {"n_layer": ("n_layer",), "n_head": ("n_head",), "n_embd": ("n_embd",), "n_positions": ("block_size",),
         "n_inner": ("mlp_width",), "tie_word_embeddings": ("tie_weights",), "activation_function": ("mlp",),
         "layer_norm_epsilon": ("norm_eps",), "attn_pdrop": ("dropout_attn",),
         "resid_pdrop": ("dropout_proj", "dropout_mlp")},
        constants={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        absent={"n_inner": None, "tie_word_embeddings": True, "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
        biases=_ALL_BIASES, activations={"gelu_tanh": "gelu_new"}, shares_keys=False,
        ignored={"embd_pdrop": "dropout of the embeddings"},
    ),
    "llama": Architecture(
        "LlamaForCausalLM", _RMS_CAN, _modules(_LLAMA | _GATED, _BIASED), _RMS, absent=_RMS_ABSENT, **_LLAMA_FLAGS
    ),
    "mistral": Architecture(
        "MistralForCausalLM", _RMS_CAN | {"bias": (False,), "bias_qkv": (False,)}, _modules(_LLAMA | _GATED, {}), _RMS,
        constants={"sliding_window": None}, absent=_RMS_ABSENT | {"sliding_window": 4096},
        biases={"bias": False, "bias_qkv": False}, only_read=True,
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM", _RMS_CAN | {"bias": (False,), "bias_qkv": (True,), "head_width": (None,)},
        _modules(_LLAMA | _GATED, dict.fromkeys("qkv", True)), {k: v for k, v in _RMS.items() if k != "head_dim"},
        constants={"use_sliding_window": False}, absent=_RMS_ABSENT | {"use_sliding_window": False},
        biases={"bias": False, "bias_qkv": True}, only_read=True,
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM", _RMS_CAN | {"qk_norm": (True,), "bias": (False,)},
        _modules(_LLAMA | _GATED | _QK_NORMS, _linear(("bias_qkv",), False)), _RMS,
        constants={"use_sliding_window": False},
        absent=_RMS_ABSENT | {"use_sliding_window": False, "head_dim": 128},
        flags={"attention_bias": ("bias_qkv",)}, biases={"bias": False, "bias_qkv": "attention_bias"},
    ),
    "stablelm": Architecture(
        "StableLmForCausalLM", _LAYER_CAN | {"mlp": ("swiglu",), "bias": (False,)},
        _modules(_LLAMA | _GATED, dict.fromkeys("qkv", ("bias_qkv",)) | _ALL_NORMS)
        | {f"model.layers.{{i}}.self_attn.{x}_layernorm.norms.{{h}}": Module((f"blocks.{{i}}.attn.norm_{x}",))
           for x in "qk"},
        _SIZES | {"layer_norm_eps": ("norm_eps",), "qk_layernorm": ("qk_norm",), "hidden_dropout": ("dropout_mlp",)},
        constants={"use_parallel_residual": False},
        absent=_RMS_ABSENT | {"layer_norm_eps": 1e-5, "qk_layernorm": False, "hidden_dropout": 0.0,
                              "use_qkv_bias": False},
        flags={"use_qkv_bias": ("bias_qkv",)}, biases={"bias": False, "bias_qkv": "use_qkv_bias"}, rotates_part=0.25,
    ),
    "starcoder2": Architecture(
        "Starcoder2ForCausalLM", _LAYER_CAN | {"qk_norm": (False,)},
        _modules(_LLAMA | {"model.layers.{i}.mlp.c_fc": "blocks.{i}.mlp.up",
                           "model.layers.{i}.mlp.c_proj": "blocks.{i}.mlp.down"}, _linear(BIASES, BIASES) | _ALL_NORMS),
        _SIZES | {"norm_epsilon": ("norm_eps",), "residual_dropout": ("dropout_proj", "dropout_mlp")},
        constants={"sliding_window": None},
        absent=_RMS_ABSENT | {"norm_epsilon": 1e-5, "residual_dropout": 0.0, "use_bias": True,
                              "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "embedding_dropout": 0.0},
        flags={"use_bias": BIASES}, biases={"bias": "use_bias", "bias_qkv": "use_bias"},
        ignored={"embedding_dropout": "dropout of the embeddings"},
    ),
    "persimmon": Architecture(
        "PersimmonForCausalLM", _LAYER_CAN,
        _modules({"model.embed_tokens": "token_embedding", "model.final_layernorm": "norm", "lm_head": "head",
                  "model.layers.{i}.self_attn.dense": "blocks.{i}.attn.proj",
                  "model.layers.{i}.mlp.dense_h_to_4h": "blocks.{i}.mlp.up",
                  "model.layers.{i}.mlp.dense_4h_to_h": "blocks.{i}.mlp.down",
                  "model.layers.{i}.self_attn.q_layernorm": "blocks.{i}.attn.norm_q",
                  "model.layers.{i}.self_attn.k_layernorm": "blocks.{i}.attn.norm_k"} | _NORMS, _EVERYTHING)
        | {"model.layers.{i}.self_attn.query_key_value":
           Module(tuple(f"blocks.{{i}}.attn.{x}" for x in "qkv"), True, HEAD_BY_HEAD)},
        {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
        | {"layer_norm_eps": ("norm_eps",), "qk_layernorm": ("qk_norm",), "hidden_dropout": ("dropout_mlp",)},
        absent=_RMS_ABSENT | {"layer_norm_eps": 1e-5, "qk_layernorm": True, "hidden_dropout": 0.0,
                              "hidden_act": "relu2"},
        biases=_ALL_BIASES, shares_keys=False, rotates_part=0.5,
    ),
    "arcee": Architecture(
        "ArceeForCausalLM", _RMS_CAN | {"mlp": _UNGATED}, _modules(_LLAMA | _PLAIN, _BIASED), _RMS,
        absent=_RMS_ABSENT | {"rms_norm_eps": 1e-5, "hidden_act": "relu2"}, **_LLAMA_FLAGS,
    ),
    "apertus": Architecture(
        "ApertusForCausalLM",
        _RMS_CAN | {"mlp": _UNGATED, "qk_norm": (True,), "bias": (False,), "head_width": (None,)},
        _modules(_OUTSIDE | _ATTENTION | _PLAIN | _QK_NORMS
                 | {"model.layers.{i}.attention_layernorm": "blocks.{i}.norm_attn",
                    "model.layers.{i}.feedforward_layernorm": "blocks.{i}.norm_mlp"}, _linear(("bias_qkv",), False)),
        {k: v for k, v in _RMS.items() if k != "head_dim"},
        absent=_RMS_ABSENT | {"rms_norm_eps": 1e-5, "hidden_act": "xielu"},
        flags={"attention_bias": ("bias_qkv",)}, biases={"bias": False, "bias_qkv": "attention_bias"},
    ),
    "vaultgemma": Architecture(
        "VaultGemmaForCausalLM",
        _RMS_CAN | {"logit_softcap": ANYTHING, "bias": (False,), "bias_qkv": (False,), "tie_weights": (False,)},
        _modules({"lm_head": "head"} | _ATTENTION | _GATED, {})
        | {"model.embed_tokens": Module(("token_embedding",), form=SCALED)}
        | {theirs: Module((ours,), form=LESS_ONE) for theirs, ours in (
            ("model.norm", "norm"), ("model.layers.{i}.input_layernorm", "blocks.{i}.norm_attn"),
            ("model.layers.{i}.pre_feedforward_layernorm", "blocks.{i}.norm_mlp"))},
        {k: v for k, v in _RMS.items() if k != "hidden_act"}
        | {"hidden_activation": ("mlp",), "query_pre_attn_scalar": ("head_width",),
           "final_logit_softcapping": ("logit_softcap",), "sliding_window": ("block_size",)},  # which no layer has
        constants={"attn_logit_softcapping": None, "attention_bias": False, "layer_types": ["full_attention"]},
        absent=_RMS_ABSENT | {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
                              "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
                              "tie_word_embeddings": True, "layer_types": ["sliding_attention"]},
        biases={"bias": False, "bias_qkv": False},
    ),
}  # fmt: skip
