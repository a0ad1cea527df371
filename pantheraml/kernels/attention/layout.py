"""How documents lie in the rows of a batch, and the masks that keep them apart.

Documents are given by position ids that restart: where ``position[i] != position[i - 1] + 1`` a document
begins, and so does every row. Kernels for packed rows read ``cu_seqlens``; the others are given a mask of
shape (B, 1, S, S).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

F = TypeVar("F", bound=Callable[..., Any])


class Layout:
    """How the documents of one batch lie in its rows; masks are built once, when asked for.

    Attributes:
        shape: (B, S).
        cu_seqlens: where documents begin among the B * S tokens and, last, B * S: (documents + 1,) int32 on
            the device; None when every row is one document.
        max_seqlen: tokens of the longest document.
    """

    def __init__(
        self, shape: tuple[int, int], device: torch.device, cu_seqlens: Tensor | None, max_seqlen: int
    ):
        self.shape, self.device = shape, device
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None = None) -> Tensor:
        """True where a token may look: (B, 1, S, S) bool, (1, 1, S, S) without documents.

        Args:
            window: how many tokens back it may look, itself included; None for all.
        """
        if window not in self._masks:
            rows, length = self.shape
            back = torch.arange(length, device=self.device)
            back = back[:, None] - back[None, :]
            mask = back >= 0 if window is None else (back >= 0) & (back < window)
            mask = mask[None]
            if self.cu_seqlens is not None:
                token = torch.arange(rows * length, device=self.device, dtype=torch.int32)
                document = torch.bucketize(token, self.cu_seqlens[1:], right=True).view(rows, length)
                mask = mask & (document[:, :, None] == document[:, None, :])
            self._masks[window] = mask[:, None]
        return self._masks[window]


# One layout per batch: every layer is called with the same tensor of positions.
_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def eagerly(function: F) -> F:
    """Keep ``function`` out of compiled graphs; ``torch.compiler.disable`` with the signature kept."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


@eagerly
def read_layout(
    shape: tuple[int, int],
    device: torch.device,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Layout:
    """The layout of a batch of ``shape`` (B, S).

    Args:
        shape: rows and tokens per row.
        device: where masks and offsets are wanted.
        position_ids: (B, S) or (1, S) integers; None means every row is one document. Reading them waits
            for the device, once per batch.
        cu_seqlens: the document offsets, if a collator of one row has them already; no waiting then.
        max_seqlen: given together with ``cu_seqlens``.
    """
    given = shape[0] == 1 and cu_seqlens is not None and max_seqlen is not None
    source = cu_seqlens if given else position_ids
    if source is None or source.ndim != (1 if given else 2):
        return Layout(shape, device, None, shape[1])
    # A tensor made under inference_mode does not count its changes, so it is read each time.
    version = None if source.is_inference() else source._version
    kept = _layouts.get(source)
    if kept is not None and version is not None and kept[:2] == (version, shape):
        return kept[2]
    if cu_seqlens is not None and max_seqlen is not None and given:
        offsets, longest = cu_seqlens.clone(), max_seqlen  # a kept layout must not keep its own key alive
    else:
        offsets, longest = _find_documents(source.expand(shape))
    if offsets.numel() > shape[0] + 1:
        layout = Layout(shape, device, offsets.to(device=device, dtype=torch.int32), longest)
    else:
        layout = Layout(shape, device, None, shape[1])
    _layouts[source] = (version, shape, layout)
    return layout


def known_positions(rows: int, length: int, device: torch.device) -> Tensor:
    """Positions (1, ``length``) of a batch whose rows are one document each; ``read_layout`` knows that without a look.

    Args:
        rows: of the batch that they are for.
        length: tokens of each row.
        device: where the batch is.
    """
    positions = torch.arange(length, device=device)[None]
    _layouts[positions] = (positions._version, (rows, length), Layout((rows, length), device, None, length))
    return positions


def _find_documents(positions: Tensor) -> tuple[Tensor, int]:
    """Document offsets among the tokens of ``positions`` (B, S), on the CPU, and the longest length."""
    begins = torch.ones(positions.shape, dtype=torch.bool, device=positions.device)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = begins.flatten().cpu().nonzero().flatten()
    offsets = torch.cat([starts, torch.tensor([positions.numel()])])
    return offsets, int(offsets.diff().max()) if positions.numel() else 0
