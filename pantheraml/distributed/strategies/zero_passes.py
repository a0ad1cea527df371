"""What ranks exchange in a pass of DeepSpeed's engine where it cuts gradients or weights, such that one may fail in it.

As with FSDP2, a rank that fails goes through the model once more with a few tokens, which makes DeepSpeed ask for the
same exchanges in the same order; those that the others have seen are left out. When all passes are over, every rank
forgets what they have left.

    CutGradients      stages 1 and 2: buckets are reduced within a backward
    GatheredShares    stage 3: weights are gathered, too, by a trace of the modules, see ``gathering``
    ZeroReduction     either of them, as a step that may be repeated sees it

Read in DeepSpeed 0.19.1 and 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pantheraml.distributed.strategies.gathering import Gathering
from pantheraml.distributed.strategies.held_engine import EngineReduction, HeldEngine
from pantheraml.distributed.strategies.launched_exchanges import LaunchedExchanges
from pantheraml.distributed.strategies.summed_passes import StandIn

# A method of ``DeepSpeedZeroOptimizer_Stage3``: one reduction of gradients, of which each rank gets its share.
_SCATTERS = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


class ZeroPasses:
    """The exchanges of a pass, and what it leaves on a rank.

    Args:
        engine: DeepSpeed's; what its optimizer exchanges goes through this object from now on.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer, self._device = engine.optimizer, torch.device(engine.device)
        world = dist.group.WORLD
        assert world is not None
        self._exchanges = LaunchedExchanges([world, self._optimizer.dp_process_group], self._device)

    def begin(self) -> None:
        """A pass begins, or the one that failed does once more."""
        self._exchanges.begin()

    def end(self) -> None:
        """The pass is over."""
        self._exchanges.end()

    def failed(self) -> None:
        """The pass failed on this rank; it begins once more, with what the others have seen left out."""
        raise NotImplementedError

    def forget(self) -> None:
        """The step is repeated on all ranks: what its passes have added up goes."""
        raise NotImplementedError


class CutGradients(ZeroPasses):
    """Stages 1 and 2: a pass reduces gradients, bucket by bucket."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._optimizer.allreduce_bucket = self._exchanges.counted(
            self._optimizer.allreduce_bucket, lambda bucket, *_, **__: self._optimizer.flatten(bucket)
        )

    def failed(self) -> None:
        """What the pass has exchanged is remembered; what it has added up could as well go now."""
        self._exchanges.failed()
        self.forget()

    def forget(self) -> None:
        """As the optimizer is before a step."""
        optimizer = self._optimizer
        _await_device(self._device)
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear()
        optimizer.extra_large_param_to_reduce.clear()
        optimizer._clear_previous_reduced_grads()
        optimizer.params_already_reduced = [False] * len(optimizer.params_already_reduced)
        optimizer._release_ipg_buffers()
        for held in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            held.update(dict.fromkeys(held))  # it is shared with weights, which read gradients of it
        optimizer.micro_step_id = -1  # the next pass does not add to what is in host memory
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        optimizer.zero_grad()


class GatheredShares(ZeroPasses):
    """Stage 3: a pass gathers weights and reduces gradients."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._gathering = Gathering(
            engine.module, self._optimizer.parameter_offload.get_param_coordinator(), self._exchanges
        )
        reduce = getattr(self._optimizer, _SCATTERS)
        setattr(self._optimizer, _SCATTERS, self._exchanges.counted(reduce, self._no_gradients))

    def begin(self) -> None:
        """A pass begins, or the one that failed does once more."""
        super().begin()
        self._gathering.begin()

    def failed(self) -> None:
        """What the pass has exchanged is remembered, what it has gathered and added up goes."""
        self._exchanges.failed()
        _await_device(self._device)
        self._gathering.failed()
        self._forget_gradients()

    def forget(self) -> None:
        """As the optimizer is before a step, with nothing gathered."""
        _await_device(self._device)
        self._gathering.forget()
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        """What has been added up is written over by the next pass, which is the first one then."""
        optimizer = self._optimizer
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()
        optimizer.params_already_reduced.update(dict.fromkeys(optimizer.params_already_reduced, False))
        optimizer.zero_grad()

    def _no_gradients(self, parameters: list[nn.Parameter], *_: Any) -> list[Tensor]:
        """A share of each gradient."""
        dtype = self._optimizer.gradient_accumulation_dtype
        found: list[Any] = list(parameters)
        return [torch.zeros(one.partition_numel(), dtype=dtype, device=one.grad.device) for one in found]


class ZeroReduction(EngineReduction):
    """DeepSpeed exchanges in every pass, and takes its step once every rank has done all of them.

    Args:
        engine: as accelerate calls it.
        passes: its exchanges.
    """

    talks_in_passes = True

    def __init__(self, engine: HeldEngine, passes: ZeroPasses) -> None:
        super().__init__(engine)
        self._passes = passes

    @contextmanager
    def around(self, *, is_last: bool, stand_in: StandIn | None = None) -> Iterator[None]:
        """What is exchanged is counted; its size does not depend on tokens."""
        self._passes.begin()
        with super().around(is_last=is_last, stand_in=stand_in):
            yield
        self._passes.end()

    def pass_failed(self) -> None:
        """The next pass is this one once more, as far as others have not seen it."""
        self._passes.failed()
        super().undo()

    def undo(self) -> None:
        """Every rank has been through all passes: nothing is on its way."""
        super().undo()
        self._passes.forget()


def zero_passes_of(engine: Any) -> ZeroPasses | None:
    """The passes of ``engine``; None where its optimizer is another one than those that are known here."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # Others are made from these, and reduce otherwise.
    if type(engine.optimizer) is DeepSpeedZeroOptimizer:
        return CutGradients(engine)
    known = type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3 and hasattr(engine.optimizer, _SCATTERS)
    return GatheredShares(engine) if known else None


def _await_device(device: torch.device) -> None:
    """Let what is on its way arrive, in streams of DeepSpeed, too; for that nobody needs this rank."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
