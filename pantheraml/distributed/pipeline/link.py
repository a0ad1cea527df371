"""Copies between the devices of one process that nobody waits for but who needs them.

``tensor.to(device)`` makes the stream that computes on the source wait until everything launched on the target so far
is done. Between stages of a pipeline that would put the one behind the other; so copies run on streams of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Link:
    """The way from one device to another.

    Args:
        source: where tensors come from.
        target: where they go; may be the same.
    """

    def __init__(self, source: torch.device, target: torch.device) -> None:
        self.source, self.target = source, target
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if source != target and source.type == target.type == "cuda":
            self._streams = torch.cuda.Stream(source), torch.cuda.Stream(target)

    def send(self, tensor: Tensor) -> Parcel:
        """Start copying ``tensor`` once it is computed; it may be dropped at once."""
        if self._streams is None:
            return Parcel(tensor.to(self.target), None)
        leaving, coming = self._streams
        leaving.wait_stream(torch.cuda.current_stream(self.source))
        # Memory of the stream that the copy arrives on: it waits for nothing that the target computes.
        with torch.cuda.stream(coming), torch.cuda.stream(leaving):
            copy = tensor.to(self.target, non_blocking=True)
        tensor.record_stream(leaving)
        return Parcel(copy, coming.record_event())


class Parcel:
    """A tensor on its way."""

    def __init__(self, tensor: Tensor, arrived: torch.Event | None) -> None:
        self._tensor, self._arrived = tensor, arrived

    def open(self) -> Tensor:
        """The tensor; what is launched on its device from here on waits for it, the host does not."""
        if self._arrived is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._arrived)
            self._tensor.record_stream(stream)
        return self._tensor
