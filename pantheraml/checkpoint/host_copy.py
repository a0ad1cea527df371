"""A copy of a state in host memory, for somebody to write while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor


def host_copy(state: Any) -> Any:
    """``state`` as it is now: tensors in host memory, in plain dictionaries, lists and tuples.

    Tensors of a GPU are copied into pinned memory, all before anybody waits; torch keeps such memory for the next copy.
    What is one tensor under two names (tied weights) stays one.

    Args:
        state: nested mappings, lists and tuples with tensors and anything else, which is taken as it is.
    """
    copies = _Copies()
    found = copies.of(state)
    for gpu in copies.gpus:
        torch.cuda.synchronize(gpu)
    return found


class _Copies:
    """The copies made so far, by where the originals lie."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}
        self.gpus = set[torch.device]()  # that are copying

    def of(self, state: Any) -> Any:
        """A copy of ``state``; of GPU tensors one that is on its way."""
        if isinstance(state, Tensor):
            return self._tensor(state)
        if isinstance(state, Mapping):
            return {name: self.of(value) for name, value in cast("Mapping[Any, Any]", state).items()}
        if isinstance(state, list | tuple):
            parts = [self.of(one) for one in cast("list[Any]", state)]
            return tuple(parts) if isinstance(state, tuple) else parts
        return state

    def _tensor(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, torch.nn.Parameter):  # which knows itself how it is copied
            return tensor.detach().to("cpu", copy=True)
        whole = tensor.untyped_storage()
        place = (
            tensor.device,
            whole.data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if not tensor.numel() or place not in self._made:
            if tensor.is_cuda:
                self.gpus.add(tensor.device)
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            self._made[place] = copy.copy_(tensor.detach(), non_blocking=True)
        return self._made[place]
