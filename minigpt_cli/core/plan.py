"""What a training run takes, by arithmetic alone: memory per device, operations, time. Allocates nothing.

Memory is counted as the code uses it: what autograd keeps of `layers.py`, `kernels.py` and `lm_loss`, what the update
in `optim.py` needs, what DDP and FSDP add. `tests/memory.py` sets it beside real steps; docs/scaling.md has the table.
Not counted: CUDA's own context, workspaces of libraries, fragmentation, and what compiling saves.

Letters: C width, A width of all queries, K of all keys, F of the feed-forward, V rows of the head, T context, R tokens
of a micro batch; s bytes of a number in the precision of matrix products.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from minigpt_cli.core.config import Config, ModelConfig
from minigpt_cli.core.dataset import RESIDENT_BYTES
from minigpt_cli.core.kernels import attention_blocks
from minigpt_cli.core.layers import default_mlp_width
from minigpt_cli.core.model import GPT, WHOLE_LOGITS, empty_model
from minigpt_cli.core.optim import in_batches
from minigpt_cli.core.runtime import Runtime

FP32 = 4  # bytes

CUBLAS_WORKSPACE = (32 << 20) + 16384  # of each thread and stream on an H100 or newer; 8.5 MB on older GPUs


@dataclass(frozen=True)
class Setting:
    """Where and how a run computes: the kind of device, the precision of matrix products, who shares the work."""

    kind: str = "cuda"  # cuda | cpu
    precision: str = "bf16"
    ranks: int = 1
    parallel: str = "none"  # none | ddp | fsdp
    recompute: bool = False  # runtime.checkpoint_activations

    @property
    def s(self) -> int:
        return FP32 if self.precision == "fp32" else 2

    @property
    def shares(self) -> int:
        """Into how many slices a weight is cut."""
        return self.ranks if self.parallel == "fsdp" else 1

    @property
    def stream(self) -> int:
        """Bytes of a number in the residual stream."""
        return 2 if self.precision == "bf16" else FP32


def setting_of(runtime: Runtime) -> Setting:
    """The setting of a run on this machine."""
    return Setting(
        "cpu" if runtime.device.type == "cpu" else "cuda", runtime.precision, runtime.world.size, runtime.parallel,
        runtime.checkpoint_activations,
    )  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part, and the most that is there at once: not all parts are, `moment` says when."""

    parts: dict[str, int]
    peak: int
    moment: str


def plan_memory(config: Config, vocab_size: int, setting: Setting, n_tokens: int = 0) -> Memory:
    """What training takes on each device. A micro batch is `train.micro_batch_size` sequences, or the rank's share.

    `n_tokens` of training text lie on a GPU, too, while they are not too many. Raises UserError where the ranks cannot
    share the batch.
    """
    model = empty_model(config.model, vocab_size)
    accumulates = config.train.pieces(setting.ranks) > 1
    R = config.train.batch_size // (setting.ranks * config.train.pieces(setting.ranks)) * config.model.block_size
    s, shares = setting.s, setting.shares
    everything = sum(p.numel() for p in model.parameters())
    hidden = sum(p.numel() for p, _ in model.hidden_matrices()) if config.train.optimizer == "muon" else 0
    head = model.head.weight.numel()
    block = sum(p.numel() for p in model.blocks[0].parameters()) if len(model.blocks) else 0
    root = everything - block * len(model.blocks)

    weights = FP32 * -(-everything // shares)
    optimizer = FP32 * -(-(2 * everything - hidden) // shares)  # Muon has one momentum, Adam two moments
    average = weights if config.train.ema is not None else 0
    gradients, unsliced = weights, 0
    if setting.parallel == "fsdp":  # a block's gradients whole, until they are added up; all blocks', while gathering
        unsliced = FP32 * everything if accumulates else (s + FP32) * (root + block)
    always_there = accumulates or setting.parallel == "ddp"  # DDP's buckets are the gradients, and stay
    if setting.parallel == "fsdp":
        gathered = s * (root + 2 * block)  # one at work, the next on its way
    elif s < FP32:  # autocast's copies of matrices
        matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        gathered = s * (head + block if setting.recompute else matrices)
    else:
        gathered = 0
    each, ends = _kept_by_block(config.model, setting), _kept_outside(config.model, setting)
    kept = R * (config.model.n_layer * each + ends)
    if setting.recompute:
        kept = R * (max(0, config.model.n_layer - 1) * setting.stream * config.model.n_embd + each + ends)
    logits = R * model.head.out_features * s
    padded, capped = model.head.out_features > vocab_size, config.model.logit_softcap is not None
    loss = _loss(R * model.head.out_features, s, padded=padded, capped=capped)
    working = R * _working(config.model, setting)
    update = _update(model, setting) if hidden else 0

    text = FP32 * n_tokens if setting.kind == "cuda" and FP32 * n_tokens <= RESIDENT_BYTES else 0

    libraries = 0
    if setting.kind == "cuda":  # forward and backward run in a thread each; a recording has a stream of its own
        recorded = setting.ranks == 1 and not setting.recompute and not accumulates
        libraries = CUBLAS_WORKSPACE * (4 if recorded else 2)

    base = weights + optimizer + average + text + libraries + (gradients if always_there else 0)
    forward, after = base + gathered + kept, base + (0 if always_there else gradients)
    grad = (s if setting.parallel == "fsdp" else FP32) * head  # of the head; as a slice's whole in 16 bits
    cast = s * head if s < FP32 else grad  # the same, before autocast makes it float32
    twice = grad * (2 * config.model.tie_weights + always_there)  # of head and embedding, and their sum
    moments = {
        "the loss": forward + loss,
        "backward through the head": forward + logits + max(logits + cast, grad) + unsliced,
        "backward through the blocks": forward + logits + working + grad + unsliced,
        "the end of backward": after + logits + twice + unsliced,
        "the update": after + update,
    }
    moment = max(moments, key=lambda name: moments[name])
    parts = {
        "weights": weights, "gradients": gradients + unsliced, "optimizer": optimizer, "average": average,
        "gathered": gathered, "activations": kept, "logits and loss": loss, "working memory": working, "update": update,
        "training text": text, "cuBLAS": libraries,
    }  # fmt: skip
    return Memory({name: n for name, n in parts.items() if n}, moments[moment], moment)


def _kept_by_block(config: ModelConfig, setting: Setting) -> int:
    """Bytes per token that one block keeps for its backward pass: every number once, whoever keeps it."""
    s, cpu, half = setting.s, setting.kind == "cpu", setting.s < FP32
    C, H, Hkv = config.n_embd, config.n_head, config.n_kv_head or config.n_head
    A, K = H * config.each_head, Hkv * config.each_head
    F = config.mlp_width or default_mlp_width(config)
    kept = 2 * (_kept_by_norm(config, setting, C) + s * C)  # the norms, and what goes into both first matrices
    if config.qk_norm and config.norm != "none":
        kept += _kept_by_norm(config, setting, A + K, H + Hkv)
    if cpu:  # q, k and v copied, the weights of attention, their mask, the result in two layouts
        blocks = attention_blocks(config.block_size, torch.bfloat16 if half else torch.float32)
        attended = s * H * sum((j - i) * j for i, j in blocks) // config.block_size
        kept += 3 * s * A + attended * (2 if _rate(config, "dropout_attn") else 1) + s * A
        if config.qk_norm and (config.norm == "layernorm" or (config.norm == "rmsnorm" and not half)):
            kept += s * (A + 2 * K)
    else:  # the packed projection, of which v is a part, q and k anew if they were changed; result and log-sum-exp
        kept += s * (A + 2 * K) + (s * (A + K) if config.qk_norm or config.position == "rope" else 0)
        kept += s * A + FP32 * H
    kept += s * F * {"relu": 1, "swiglu": 4}.get(config.mlp, 2)
    masks = sum(1 for place in ("dropout_proj", "dropout_mlp") if _rate(config, place))
    return kept + masks * C * (s if cpu else 1)


def _kept_by_norm(config: ModelConfig, setting: Setting, width: int, n: int = 1) -> int:
    """What n norms over together `width` numbers keep besides their result: their input, and a statistic or two."""
    if config.norm == "none":
        return 0
    if setting.kind == "cpu" and config.norm == "layernorm":
        return (0 if n > 1 else setting.s * width) + 2 * FP32 * n  # of several, the input is the packed projection
    if setting.kind == "cpu":
        return (1 if n > 1 and setting.s == FP32 else 2) * FP32 * width + FP32 * n  # not fused: the quotient, too
    return (0 if n > 1 else setting.stream * width) + 2 * FP32 * n


def _kept_outside(config: ModelConfig, setting: Setting) -> int:
    """The ids of inputs and targets, and what goes into the head."""
    return 2 * 8 + _kept_by_norm(config, setting, config.n_embd) + setting.s * config.n_embd


def _loss(n: int, s: int, *, padded: bool, capped: bool) -> int:
    """Bytes that n logits and the way to the loss and back to their gradient take."""
    logits = s * n * (2 if capped else 1)  # what was bent is kept, too
    if n <= WHOLE_LOGITS:  # in float32: the log-probabilities, and two gradients
        return logits + 3 * FP32 * n
    chunk = FP32 * WHOLE_LOGITS
    return logits + s * n + max(chunk, s * n if padded or capped else 0)  # the gradient, and once more: unbent, wider


def _working(config: ModelConfig, setting: Setting) -> int:
    """What the way back through one block needs for a moment, per token: gradients of what was widest."""
    F = config.mlp_width or default_mlp_width(config)
    wide = 1 if config.mlp.startswith("gelu") else 2  # gelu's result goes before its gradient comes
    return setting.s * wide * F + 2 * setting.stream * config.n_embd


def _update(model: GPT, setting: Setting) -> int:
    """What Muon's step needs: gradients and the look ahead again, and five times the most matrices that are alike."""
    matrices, most = model.hidden_matrices(), 0
    u = 2 if setting.precision == "bf16" else FP32
    for few in in_batches([p for p, _ in matrices]):
        alike: Counter[torch.Size] = Counter()
        for p, rows in (matrices[i] for i in few):
            alike.update({part.shape: part.numel() for part in p.split(rows)})
        whole = FP32 * sum(matrices[i][0].numel() for i in few) if setting.shares > 1 else 0
        most = max(most, 5 * u * max(alike.values()) + whole)
    return 2 * FP32 * sum(p.numel() for p, _ in matrices) // setting.shares + most


def _rate(config: ModelConfig, place: str) -> float:
    own = getattr(config, place)
    return config.dropout if own is None else own


@dataclass(frozen=True)
class Effort:
    """What a run asks of its devices. FLOPs are those of matrix products, as `GPT.flops_per_token` counts them."""

    flops_per_token: int
    recomputed: int  # FLOPs per token that are done twice, to keep fewer activations
    tokens: int  # over the whole run
    tokens_per_second: float
    seconds: float  # of training steps alone: evaluations and checkpoints come on top
    device_hours: float


def plan_effort(config: Config, vocab_size: int, setting: Setting, flops_per_second: float) -> Effort:
    """How long it takes where each device does `flops_per_second` (a share of its peak) of useful work."""
    model = empty_model(config.model, vocab_size)
    flops = model.flops_per_token()
    blocks = flops - 3 * 2 * model.head.weight.numel()
    recomputed = blocks // 3 if setting.recompute else 0  # the forward pass is a third
    tokens = config.train.steps * config.train.batch_size * config.model.block_size
    speed = setting.ranks * flops_per_second / (flops + recomputed)
    seconds = tokens / speed
    return Effort(flops, recomputed, tokens, speed, seconds, setting.ranks * seconds / 3600)
