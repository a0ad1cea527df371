"""Tensors kept in pinned host memory between a layer's forward and its backward.

Copies run on a stream of their own, beside the computation; a few sets of tensors are on their way at a time, and the
computation waits for the oldest of them before it goes on. So GPU memory is given back in an order that the host knows:
it belongs to the stream that computes, which has waited for the copy. (Handing it from stream to stream instead leaves
it with the allocator until the host happens to see that a copy is done; the host is many layers ahead by then, and
half of what was offloaded was measured to be still there.)
"""

from __future__ import annotations

from collections import deque
from typing import Any
from weakref import ref

import torch
from torch import Tensor

# Host memory is pinned in pieces of this size: torch rounds each request up to a power of two.
_CHUNK = 64 * 2**20
# Sets on their way to the host while a forward goes on, and on their way back while a backward does. (The last ones of
# a forward are still here when its backward begins, and are not copied back.)
_LEAVING, _COMING = 1, 1


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
        self._leaving: deque[ref[Kept]] = deque()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model has a store of its own; what lies in one belongs to a step in progress.
        return HostStore, (self._device,)

    def put(self, *tensors: Tensor) -> Kept:
        """Start copying ``tensors`` to the host; their GPU memory is free once those put a little later are."""
        kept = Kept(self, tensors)
        self._held.append(ref(kept))
        if self._stream is not None:
            self._leaving.append(ref(kept))
            while len(self._leaving) > _LEAVING:
                oldest = self._leaving.popleft()()
                if oldest is not None:
                    oldest.leave()
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
        """Start bringing back what was put just before ``kept``: backwards come in the reverse order of forwards."""
        held = [other() for other in self._held]
        if kept in held:
            at = held.index(kept)
            for other in reversed(held[max(0, at - _COMING) : at]):
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
        # What is on the GPU now: before it left, or since it is coming back.
        self._here: list[Tensor] | None = list(tensors)
        self._copied: torch.cuda.Event | None = None
        stream = store.stream
        if stream is None:
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for tensor in tensors:
                data = tensor.contiguous().view(-1).view(torch.uint8)
                chunks = store.take_chunks(-(-data.numel() // _CHUNK))
                for chunk, piece in zip(chunks, data.split(_CHUNK), strict=True):
                    chunk[: piece.numel()].copy_(piece, non_blocking=True)
                self._chunks.append(chunks)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)

    def leave(self) -> None:
        """Give the GPU memory back; what is computed from here on waits for the copy."""
        self._wait()
        self._here = None

    def fetch(self) -> None:
        """Start the copies back, unless the tensors are here."""
        stream = self._store.stream
        if self._here is not None or stream is None:
            return
        # Memory of the computing stream, which may be in use by what was launched before now.
        self._here = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self._specs]
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for tensor, chunks in zip(self._here, self._chunks, strict=True):
                for chunk, piece in zip(chunks, tensor.view(-1).view(torch.uint8).split(_CHUNK), strict=True):
                    piece.copy_(chunk[: piece.numel()], non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)

    def get(self) -> list[Tensor]:
        """The tensors on their device, in order; the copies of earlier ones are started."""
        assert self._here is not None or self._chunks, "taken once already"
        self.fetch()
        self._store.fetch_before(self)
        self._wait()
        tensors, self._here = self._here or [], None
        # The next copies into these chunks run on the same stream, so after the ones out of them.
        self._release()
        return tensors

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._copied_on).wait_event(self._copied)
            self._copied = None

    @property
    def _copied_on(self) -> torch.device:
        return self._specs[0][2]

    def _release(self) -> None:
        chunks, self._chunks = self._chunks, []
        self._store.give_back(self, [chunk for part in chunks for chunk in part])

    def __del__(self) -> None:
        # A graph that is dropped without a backward gives its memory back too.
        if self._chunks:
            self._wait()
            self._release()
