"""DeepSpeed's engine at stage 0, whose optimizer is a plain one of torch: nobody knows the norm of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DeepSpeedEngineWrapper
from torch import Tensor


class UnshardedEngine(DeepSpeedEngineWrapper):
    """accelerate's, with the norm of the gradient; a step whose gradient is not finite is left out.

    Args:
        engine: DeepSpeed's.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._norm = torch.zeros(())

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """The backward of a pass, and with the last one of a step the optimizer's step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if not sync_gradients:
            return
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self._norm.isfinite():
            self.engine.step()
        else:
            self.engine.zero_grad()

    def get_global_grad_norm(self) -> float:
        """Of the gradient of all ranks, before it was clipped."""
        return self._norm.item()
