"""`decode.c` for a model: hands it weights and cache, and takes the logits. The structures are the C file's.

Shapes: B streams, V vocabulary.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_float, c_int, c_int64, c_void_p
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minigpt_cli.core.compiler import decode_library
from minigpt_cli.core.layers import KVCache, Place, norm_eps
from minigpt_cli.core.model import GPT, Block

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MOST_STREAMS = {"fp32": 32, "bf16": 16}  # of more, PyTorch's matrix products make the better use
MOST_STREAMS_OF_COPIES = 64  # where PyTorch's products are in float32, for want of instructions for bf16
NORMS = ("none", "layernorm", "rmsnorm")  # in the order of the C file's enumerations
MLPS = ("relu", "gelu", "gelu_tanh", "relu2", "swiglu")


class _Affine(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Block(ctypes.Structure):
    _fields_ = [(name, _Affine) for name in ("norm_attn", "qkv", "norm_q", "norm_k", "proj", "norm_mlp", "up", "down")]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("n_layer", "tokens", "C", "H", "G", "D", "S", "F", "V", "norm", "mlp", "rope")),
        ("rope_base", c_double), ("norm_eps", c_float), ("logit_softcap", c_float),
        ("token_embedding", c_void_p), ("position_embedding", c_void_p),
        ("norm_last", _Affine), ("head", _Affine), ("blocks", c_void_p),
    ]  # fmt: skip


class NativeStep:
    """A model's forward pass for one new token of each stream. Its weights must stay where they are.

    It reads the model's own weights or, where these are not of `dtype`, copies of them. Keys and values in the cache
    are of `dtype` too. Raises MinigptError where there is no such library (`decode_library`), TypeError for weights of
    other dtypes than `PRECISIONS`, or of several, and for blocks that are not `Block`s.
    """

    def __init__(self, model: GPT, dtype: torch.dtype | None = None) -> None:
        config, weights = model.config, {p.dtype for p in model.parameters()}
        if len(weights) != 1 or not weights <= PRECISIONS.keys():
            raise TypeError(f"weights of {weights}")
        own = weights.pop()
        self.dtype = dtype or own
        self.vocab_size = model.vocab_size
        self.precision = PRECISIONS[self.dtype]
        self.most_streams = MOST_STREAMS[self.precision] if self.dtype == own else MOST_STREAMS_OF_COPIES
        self._library = decode_library(self.precision)
        self._library.scratch.restype = c_int64
        # What the pointers point to.
        self._kept: dict[Tensor, Tensor] = {p: p.detach().to(self.dtype) for p in model.parameters()}
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        if len(blocks) != len(model.blocks):
            raise TypeError("blocks of a kind of their own")
        heads = (config.n_head, config.n_kv_head or config.n_head, config.each_head) if blocks else (0, 0, 0)
        self._blocks = (_Block * len(blocks))(*(
            _Block(*map(self._affine, (
                block.norm_attn, block.attn.qkv, block.attn.norm_q, block.attn.norm_k, block.attn.proj,
                block.norm_mlp, block.mlp.up, block.mlp.down,
            )))
            for block in blocks
        ))  # fmt: skip
        self._caches: WeakKeyDictionary[KVCache, tuple[ctypes.Array[c_void_p], Tensor]] = WeakKeyDictionary()
        position = model.position_embedding
        self._model = _Model(
            len(blocks), model.token_embedding.num_embeddings, config.n_embd, *heads, config.block_size,
            blocks[0].mlp.down.in_features if blocks else 0, model.vocab_size,
            NORMS.index(config.norm), MLPS.index(config.mlp), config.position == "rope",
            config.rope_base, norm_eps(config), config.logit_softcap or 0.0,
            self._pointer(model.token_embedding.weight), self._pointer(position.weight if position else None),
            self._affine(model.norm), self._affine(model.head), ctypes.cast(self._blocks, c_void_p),
        )  # fmt: skip

    def takes(self, streams: int) -> bool:
        """Whether it computes so many at once. Then the result does not depend on the number of threads."""
        return streams <= self.most_streams

    def __call__(self, ids_B1: Tensor, cache: KVCache, start: int | Place) -> Tensor | None:
        """Logits (B, 1, V) in float32; keys and values go into the cache, behind `start` others. None, and nothing
        done, where there are so many streams that the model's own forward pass is faster.

        Raises IndexError for a token or a position that the model does not have.
        """
        B, threads = len(ids_B1), torch.get_num_threads()
        if not self.takes(B):
            return None
        if cache.batch != B:
            raise ValueError(f"{B} new tokens, but a cache of {cache.batch} streams")
        if cache not in self._caches:
            self._caches[cache] = self._buffers(cache)
        layers, memory = self._caches[cache]
        if (wanted := self._library.scratch(byref(self._model), c_int64(B), c_int64(threads))) > len(memory):
            layers, memory = self._caches[cache] = layers, _floats(wanted)
        ids_B1 = ids_B1.to("cpu", torch.int64).contiguous()
        if isinstance(start, Place):
            lengths_B = start.position.to("cpu", torch.int64).contiguous()
            if len(lengths_B) != B:
                raise ValueError(f"{B} new tokens, but {len(lengths_B)} positions")
            lengths: object = c_void_p(lengths_B.data_ptr())
        else:
            lengths = (c_int64 * B)(*[start] * B)
        logits_B1V = _floats(B, 1, self.vocab_size)
        if self._library.step(
            byref(self._model), layers, c_int64(B), c_void_p(ids_B1.data_ptr()), lengths,
            c_void_p(logits_B1V.data_ptr()), c_void_p(memory.data_ptr()), c_int(threads),
        ):  # fmt: skip
            raise IndexError("a token or a position that the model does not have")
        return logits_B1V

    def _buffers(self, cache: KVCache) -> tuple[ctypes.Array[c_void_p], Tensor]:
        """Where each layer's keys and values begin; and no working memory yet."""
        parts = [part for layer in cache.layers for part in (layer.k_BHSD, layer.v_BHSD)]
        shape = (cache.batch, self._model.G, self._model.S, self._model.D)
        if len(parts) != 2 * self._model.n_layer or any(
            part.shape != shape or part.dtype != self.dtype or not part.is_contiguous() for part in parts
        ):
            raise ValueError(f"the cache is not {self._model.n_layer} layers of {shape} in {self.dtype}")
        return (c_void_p * len(parts))(*(part.data_ptr() for part in parts)), _floats(0)

    def _affine(self, module: nn.Module | None) -> _Affine:
        """A linear's or a norm's weight and bias; nothing, of a norm that is left out."""
        return _Affine(self._pointer(getattr(module, "weight", None)), self._pointer(getattr(module, "bias", None)))

    def _pointer(self, weight: Tensor | None) -> int | None:
        if weight is None:
            return None
        kept = self._kept[weight]
        assert kept.is_contiguous()
        assert kept.is_cpu
        return kept.data_ptr()


def _floats(*shape: int) -> Tensor:
    """Room for what C writes, whatever PyTorch's defaults are set to."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")
