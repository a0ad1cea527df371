"""Tensors of which every rank holds a share, and what a rank holds of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import TensorMeta

# The name it has from torch 2.13 on.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` as one process would hold it; gathered from all ranks, which have to ask for it together."""
    if not isinstance(tensor, DTensor):
        return tensor
    share = local(tensor).to(tensor.device_mesh.device_type)  # NCCL sends what is on GPUs
    if tensor.itemsize > 1:
        return joined(share, tensor).full_tensor()
    return joined(share.view(torch.uint8), tensor).full_tensor().view(tensor.dtype)  # gloo knows no FP8


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """``model.state_dict()`` as one process would have it, in host memory; every rank has to ask for it.

    Args:
        model: whose weights ranks share out.
        keep: whether this rank wants it; the others take part, and get nothing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = whole(tensor)
        if keep:
            found[name] = value.detach().to("cpu", copy=True)
    return found


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The share of ``tensor``, which every rank has whole, that this rank holds of a tensor ``like`` it."""
    if not isinstance(like, DTensor):
        return tensor
    return joined(cut(tensor, like).to(local(like).device, copy=True), like)


def cut(tensor: Tensor, like: DTensor) -> Tensor:
    """A view of the part of ``tensor`` that this rank holds of ``like``; nothing is sent."""
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            mesh = like.device_mesh
            tensor = chunk(tensor, mesh.size(axis), mesh.get_local_rank(axis), placement.dim)
    return tensor


def chunk(tensor: Tensor, ranks: int, rank: int, dim: int = 0) -> Tensor:
    """A view of the part of ``tensor`` that is ``rank``'s of so many ``ranks``; those of the last may be empty."""
    parts = tensor.chunk(ranks, dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)


def joined(share: Tensor, like: DTensor) -> DTensor:
    """The tensor of which this rank holds ``share``, as ``like`` is shared out; the share stays on its device."""
    if (
        share.device.type != like.device_mesh.device_type
    ):  # from_local would bring it from host memory to the GPU
        about = replace(like._spec, tensor_meta=TensorMeta(like.shape, like.stride(), share.dtype))
        return DTensor(share, about, requires_grad=False)
    return DTensor.from_local(
        share, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def room_for(shape: torch.Size, dtype: torch.dtype, weight: Tensor) -> Tensor:
    """Memory for a tensor of ``weight``, whole of ``shape``: for this rank's share of it where it is as large."""
    if shape != weight.shape:
        return torch.empty(shape, dtype=dtype)
    share = torch.empty_like(local(weight), dtype=dtype, requires_grad=False)
    return joined(share, weight) if isinstance(weight, DTensor) else share


def share_bytes(tensor: Tensor) -> int:
    """About what each rank holds of ``tensor``; the same number on all of them."""
    cuts = 1
    if isinstance(tensor, DTensor):
        cuts = math.prod(
            tensor.device_mesh.size(axis)
            for axis, placed in enumerate(tensor.placements)
            if placed.is_shard()
        )
    return -(-tensor.numel() * tensor.itemsize // cuts)


def keep_share(weight: Any, kept_on: torch.device, ranks: int, rank: int) -> None:
    """Let a Parameter hold the share of ``rank`` alone, on ``kept_on``; it knows the shape of the whole."""
    values = weight.data.as_subclass(Tensor)
    weight.whole_shape = values.shape
    weight.data = chunk(values, ranks, rank).to(kept_on, copy=True)


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of ``weight``, or of what it is a rank's share of."""
    return getattr(weight, "whole_shape", weight.shape)


def is_share(weight: Tensor) -> bool:
    """Whether ``weight`` is a rank's share already, to be taken up by ``shard_model``."""
    return whole_shape(weight) != weight.shape


class Bytes:
    """Gathers tensors as the bytes they are: gloo knows no FP8."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is gathered."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """As torch's own, of any dtype."""
        there, here = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        return _all_gather(there, here, group=group, async_op=async_op)
