"""Tensors kept in pinned host memory between a layer's forward and its backward.

Copies run on a stream of their own, beside the computation. Backwards come in the reverse order of forwards, so taking
one layer's tensors starts the copy of the two before it: two sets are on their way while one is in use.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor

# Host memory is pinned in pieces of this size: torch rounds each request up to a power of two.
_CHUNK = 64 * 2**20
_AHEAD = 2


class HostStore:
    """The tensors of one model's layers, in the order of their forwards.

    Args:
        device: the GPU they come from; on a CPU tensors stay where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[Tensor] = []
        self._held: list[ref[Kept]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model has a store of its own; what lies in one belongs to a step in progress.
        return HostStore, (self._device,)

    def put(self, *tensors: Tensor) -> Kept:
        """Start copying ``tensors`` to the host; their GPU memory is reused once the copies are done."""
        kept = Kept(self, tensors)
        self._held.append(ref(kept))
        return kept

    def take_chunks(self, count: int) -> list[Tensor]:
        """``count`` pieces of pinned memory."""
        chunks = [self._free.pop() for _ in range(min(count, len(self._free)))]
        chunks += [
            torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(count - len(chunks))
        ]
        return chunks

    def give_back(self, kept: Kept, chunks: list[Tensor]) -> None:
        """Reuse the memory of what was fetched or dropped."""
        self._free += chunks
        self._held = [other for other in self._held if other() not in (None, kept)]

    def fetch_before(self, kept: Kept) -> None:
        """Start bringing back what was put just before ``kept``."""
        held = [other() for other in self._held]
        if kept in held:
            at = held.index(kept)
            for other in reversed(held[max(0, at - _AHEAD) : at]):
                if other is not None:
                    other.fetch()

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream of the copies, None on a CPU."""
        return self._stream


class Kept:
    """One set of tensors in the store; ``get`` brings them back, once."""

    def __init__(self, store: HostStore, tensors: tuple[Tensor, ...]) -> None:
        self._store = store
        self._specs = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        self._chunks: list[list[Tensor]] = []
        self._back: list[Tensor] | None = None
        self._ready: torch.cuda.Event | None = None
        stream = store.stream
        if stream is None:
            self._back = list(tensors)
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for tensor in tensors:
                data = tensor.contiguous().view(-1).view(torch.uint8)
                chunks = store.take_chunks(-(-data.numel() // _CHUNK))
                for chunk, piece in zip(chunks, data.split(_CHUNK), strict=True):
                    chunk[: piece.numel()].copy_(piece, non_blocking=True)
                tensor.record_stream(stream)
                self._chunks.append(chunks)

    def fetch(self) -> None:
        """Start the copies back, if they have not been started."""
        stream = self._store.stream
        if self._back is not None or stream is None:
            return
        with torch.cuda.stream(stream):
            self._back = []
            for (shape, dtype, device), chunks in zip(self._specs, self._chunks, strict=True):
                tensor = torch.empty(shape, dtype=dtype, device=device)
                for chunk, piece in zip(chunks, tensor.view(-1).view(torch.uint8).split(_CHUNK), strict=True):
                    piece.copy_(chunk[: piece.numel()], non_blocking=True)
                self._back.append(tensor)
            self._ready = torch.cuda.Event()
            self._ready.record(stream)

    def get(self) -> list[Tensor]:
        """The tensors on their device, in order; the copies of earlier ones are started."""
        self.fetch()
        self._store.fetch_before(self)
        tensors, self._back = self._back, None
        assert tensors is not None, "taken once already"
        if self._ready is not None:
            current = torch.cuda.current_stream(tensors[0].device)
            current.wait_event(self._ready)
            for tensor in tensors:
                tensor.record_stream(current)
            # The chunks may be written again as soon as these copies are done, which the next copies out wait for:
            # they run on the same stream.
            self._ready = None
        self._store.give_back(self, [chunk for chunks in self._chunks for chunk in chunks])
        self._chunks = []
        return tensors

    def __del__(self) -> None:
        # A graph that is dropped without a backward gives its memory back too.
        if self._chunks:
            self._store.give_back(self, [chunk for chunks in self._chunks for chunk in chunks])
