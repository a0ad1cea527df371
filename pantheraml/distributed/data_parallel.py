"""torch's DistributedDataParallel as trainers here set it, and the same reduction where a rank has no backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.errors import ConfigError

# Weights that an error names.
_NAMED = 3


def buffers_stay() -> dict[str, bool]:
    """What DDP's constructor takes to leave buffers alone in forwards, by the name that this torch has for it."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}


def averaging_in(dtype: torch.dtype) -> Callable[..., Future[Tensor]]:
    """A hook of DDP that averages gradients over all ranks, sent and added up in ``dtype``; they keep their own."""

    # Without annotations: torch compares them with classes, and here they are text.
    def average(state, bucket):  # pyright: ignore[reportMissingParameterType]
        gradients = bucket.buffer()
        # Divided before the sum, so that numbers of a small range do not overflow.
        sent = gradients.to(dtype, copy=True).div_(dist.get_world_size())
        done = cast(dist.Work, dist.all_reduce(sent, async_op=True))
        return done.get_future().then(lambda _: gradients.copy_(sent))

    return average


def wrap_module(module: nn.Module, config: MultiGPUConfig) -> DistributedDataParallel:
    """``module``, whose gradients are averaged over all ranks; each begins with the first one's weights.

    Args:
        module: on the device of this rank.
        config: its ``find_unused_parameters`` and ``reduce_dtype`` count.
    """
    settings: dict[str, Any] = buffers_stay()
    wrapped = DistributedDataParallel(
        module,
        find_unused_parameters=config.find_unused_parameters,
        gradient_as_bucket_view=True,  # nothing is copied in or out
        **settings,
    )
    if config.reduce_dtype is not None:
        wrapped.register_comm_hook(None, averaging_in(getattr(torch, config.reduce_dtype)))
    return wrapped


def check_gradients(model: DistributedDataParallel, trained: list[nn.Parameter]) -> None:
    """Refuse a step in which a trained weight took no part, unless DDP looks for such ones.

    DDP waits for its gradient, reduces nothing of what is in a bucket with it, and says so in the next forward: a step
    too late.

    Raises:
        ConfigError: some have no gradient.
    """
    if model.find_unused_parameters or all(p.grad is not None for p in trained):
        return
    left = [name for name, p in model.module.named_parameters() if p.requires_grad and p.grad is None]
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    raise ConfigError(
        got=f"A step gave no gradient to trained weights: {', '.join(left[:_NAMED])}{more}.",
        need="Ranks reduce the gradients of all trained weights together, and would wait for these.",
        fix="Write MultiGPUConfig(find_unused_parameters=True), or freeze them.",
    )


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over all ranks without DDP, where some ranks have none; one that no rank has stays None."""
    trained = list(parameters)
    is_there = torch.tensor(
        [p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device
    )
    dist.all_reduce(is_there, dist.ReduceOp.MAX)
    sent: list[Any] = []
    for parameter, somewhere in zip(trained, is_there.tolist(), strict=True):
        if somewhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            sent.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in sent:
        work.wait()
