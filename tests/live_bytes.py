"""How many bytes of tensors there are at once."""

from __future__ import annotations

import weakref
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators have made and that are still there; not what a file is mapped to."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._seen = WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and not func.is_view:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage):
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size):
        self.now -= size
