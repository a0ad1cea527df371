"""accelerate's hold on DeepSpeed's engine, in which the passes of a step and the step itself are apart.

As they are made, the backward of a step's last pass reduces gradients and takes the step, and stage 2 cuts gradients in
every pass. Here passes only add gradients up, whole, on each rank; they are reduced, in the order of weights, and used
when every pass has been done. So a step can be repeated until then, and ranks may have different numbers of passes.

    HeldEngine          stages 1 and 2: ZeRO's optimizer reduces to the ranks that step each part
    UnshardedEngine     stage 0: the optimizer is a plain one of torch, in front of which is put what ZeRO's does
    CutEngine           passes reduce as they are made, see ``zero_passes``; only the step is apart
    EngineReduction     any of them, as a step that may be repeated sees it
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DeepSpeedEngineWrapper
from torch import Tensor

from pantheraml.distributed.strategies.held_reduction import Reduction
from pantheraml.distributed.strategies.summed_passes import StandIn


class HeldEngine(DeepSpeedEngineWrapper):
    """accelerate's, whose passes exchange nothing.

    Args:
        engine: DeepSpeed's, of stage 1 or 2.

    Attributes:
        waits: whether somebody else asks for the step; else it follows the last pass.
        is_last: where it waits, whether the pass at hand is a step's last one.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.waits = self.is_last = False

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """The backward of a pass, and behind the last one of a step the step, unless that waits."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=False)
        with self._kept_whole():
            self.engine.backward(loss, **kwargs)
        if sync_gradients and not self.waits:
            self.take_step()

    def take_step(self) -> None:
        """Reduce what passes have added up, and let the optimizer use it; all ranks do so together."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=True)
        self._reduce()
        self._step()

    def forget(self) -> None:
        """A pass has ended in an error, here or on another rank: for the engine none is on its way any more."""
        if self.engine.zero_optimization():
            self.engine.optimizer.exit_backward()  # nothing, if there was none on its way
        for timer in self.engine.timers.get_timers().values():  # some run, and refuse to be started again
            timer.reset()

    @contextmanager
    def _kept_whole(self) -> Iterator[None]:
        """A block in which gradients are neither reduced nor cut: ``coalesce_grad_reduction`` of the engine, which
        reduces when it is left, even by an error.
        """
        self.engine.inside_no_sync_ctxt = self.engine.optimizer._coalesce_grad_reduction = True
        try:
            yield
        finally:
            self.engine.inside_no_sync_ctxt = self.engine.optimizer._coalesce_grad_reduction = False

    def _reduce(self) -> None:
        with self.engine.coalesce_grad_reduction():
            pass  # it reduces what is there

    def _step(self) -> None:
        self.engine.step()


class UnshardedEngine(HeldEngine):
    """accelerate's at stage 0, with the norm of the gradient; a step whose gradient is not finite is left out.

    Args:
        engine: DeepSpeed's.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._norm = torch.zeros(())

    def get_global_grad_norm(self) -> float:
        """Of the gradient of all ranks, before it was clipped."""
        return self._norm.item()

    @contextmanager
    def _kept_whole(self) -> Iterator[None]:
        with self.engine.no_sync():
            yield

    def _reduce(self) -> None:
        self.engine.allreduce_gradients()

    def _step(self) -> None:
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self._norm.isfinite():
            self.engine.step()
        else:
            self.engine.zero_grad()


class CutEngine(HeldEngine):
    """accelerate's, whose passes leave on each rank its share of what is reduced.

    Args:
        engine: DeepSpeed's, of stages 1 to 3.
    """

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """The backward of a pass, and behind the last one of a step the step, unless that waits."""
        is_last = self.is_last if self.waits else sync_gradients
        self.engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        self.engine.backward(loss, **kwargs)
        if is_last and not self.waits:
            self.take_step()

    def take_step(self) -> None:
        """Let the optimizer use what has been reduced; all ranks do so together."""
        self._step()


class EngineReduction(Reduction):
    """DeepSpeed reduces, and takes its step, once every rank has done all its passes.

    Args:
        engine: as accelerate calls it.
    """

    def __init__(self, engine: HeldEngine) -> None:
        self._engine = engine

    @contextmanager
    def around(self, *, is_last: bool, stand_in: StandIn | None = None) -> Iterator[None]:
        """Gradients are added up."""
        del stand_in
        self._engine.waits, self._engine.is_last = True, is_last
        try:
            yield
        finally:
            self._engine.waits = False

    def undo(self) -> None:
        """The engine forgets the passes."""
        self._engine.forget()

    def finish(self) -> None:
        """With the means of all ranks DeepSpeed takes its step at once."""
        self._engine.take_step()
