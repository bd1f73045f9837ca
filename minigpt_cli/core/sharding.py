"""One model on several devices, by PyTorch's own means: copies (DDP) or slices (FSDP2). Knows no GPT and no optimizer.

DDP (Li et al. 2020, arXiv:2006.15704) keeps the whole model on every device and adds up gradients. FSDP2 (Zhao et al.
2023, arXiv:2304.11277) keeps a slice of every weight, gradient and moment, and gathers a block's weights for as long as
they are used. Such a slice is a DTensor: it has the shape of the whole and holds a part.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # half a second to import, for nothing where nothing is sliced
    from torch.distributed.tensor import DTensor


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """What to call instead of `model`, so that after backward every rank has the mean of all ranks' gradients."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype | None) -> None:
    """Slice the weights over all ranks, in place: each of the blocks by itself, then what is left.

    `dtype`: what gathered weights are computed with; gradients are added up in float32 all the same.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of logits that are a view: none is changed
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*blocks, model):
        # The rest too is let go of after each pass: else evaluating would leave it gathered, and old by the next step.
        fully_shard(part, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def without_exchange(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Inside the block a backward pass gathers gradients on each rank for itself: more micro batches follow."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return _unreduced(model) if isinstance(model, FSDPModule) else contextlib.nullcontext()


@contextlib.contextmanager
def _unreduced(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sliced: gathered from all ranks, each of which must ask."""
    return tensor.full_tensor() if _is_sliced(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here, in the same memory."""
    return tensor.to_local() if _is_sliced(tensor) else tensor


def like(tensor: Tensor, model_of_it: Tensor) -> Tensor:
    """A tensor sliced as `model_of_it` is, if it is, and moved to its device. Exchanges nothing."""
    tensor = tensor.to(model_of_it.device)
    if not _is_sliced(model_of_it) or _is_sliced(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, model_of_it.device_mesh, model_of_it.placements, src_data_rank=None)


def _is_sliced(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "placements")
