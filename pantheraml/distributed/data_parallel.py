"""torch's DistributedDataParallel as trainers here set it, and the same reduction where a rank has no backward."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
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


class Averages:
    """Averages buckets of DDP over all ranks, and remembers those of a step.

    NCCL keeps a bucket until somebody waits for the work on it, or a thread that looks every now and then has seen its
    end; that DDP waits for a future of it does not count. After the first step DDP lays its buckets out anew, beside
    the first ones if those are still kept: all gradients twice.

    Args:
        dtype: what gradients are sent and added up in; None for their own, which they have afterwards in any case.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._started: list[tuple[dist.Work, Future[Tensor]]] = []

    @property
    def count(self) -> int:
        """Buckets that have been begun, in the same order on all ranks."""
        return len(self._started)

    def start(self, bucket: Any) -> Future[Tensor]:
        """Begin one; a future of its gradients."""
        gradients = bucket.buffer()
        sent = gradients if self._dtype is None else gradients.to(self._dtype, copy=True)
        # Divided before the sum, so that numbers of a small range do not overflow.
        work = cast(dist.Work, dist.all_reduce(sent.mul_(1 / dist.get_world_size()), async_op=True))
        future = work.get_future()
        done = future.then(lambda _: gradients if sent is gradients else gradients.copy_(sent))
        self._started.append((work, done))
        return done

    def forget(self) -> None:
        """Let what is queued from now on wait for those that are on their way, and NCCL let go of their buckets."""
        for work, done in self._started:
            done.wait()
            work.wait()
        self._started.clear()


def average_buckets(model: DistributedDataParallel, dtype: torch.dtype | None = None) -> Averages:
    """Let DDP reduce by ``Averages``, which let go of buckets before DDP may lay them out anew, in a forward."""
    averages = Averages(dtype)

    # Without annotations: torch compares them with classes, and here they are text.
    def average(state, bucket):  # pyright: ignore[reportMissingParameterType]
        return averages.start(bucket)

    model.register_comm_hook(None, average)
    model.register_forward_pre_hook(lambda *_: averages.forget())
    return averages


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
    average_buckets(wrapped, None if config.reduce_dtype is None else getattr(torch, config.reduce_dtype))
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
