"""What the adapters of a stack read, x itself or x with values dropped, and the narrow products that follow from it.

    t_j  = d_j(x) A_j^T                  dX += d_j(i_j A_j)                  dA_j = i_j^T d_j(x)

d_j is the dropout in front of adapter j, a mask and a factor; i = s dy B. Without dropout one product serves all
adapters, and dX takes i A from the margin of the wide product; so it is the backward alone that dropout makes slower.

A mask is a function of a seed, drawn for each adapter and call of the layer, and of the row and column
(``keyed_dropout``); where it is known of which samples the rows are (``sample_dropout``), of the step's seed and of
those. Whoever computes some rows again, or rows of a part, gets the same mask: nothing is kept for it.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from pantheraml.kernels.keyed_dropout import add_dropped, draw_seeds, dropped
from pantheraml.models.fused.projection import Projection
from pantheraml.models.fused.slots import Slot, slots
from pantheraml.models.token_keys import current_keys


class AdapterInputs:
    """The inputs of the adapters of one call.

    Args:
        projections: those of the stack; where one drops, seeds are drawn from torch's generator for the CPU.

    Attributes:
        places: of the adapter of each projection, or None where it has none.
        drop: whether one of them drops.
        seeds: of the masks, by index of the projection.
    """

    def __init__(self, projections: tuple[Projection, ...]) -> None:
        self._slots = slots(projections)
        at = {slot.index: slot for slot in self._slots}
        self.places = [at.get(index) for index in range(len(projections))]
        self._first_row = 0
        self._keys: Tensor | None = None
        dropping = [slot.index for slot in self._slots if slot.projection.dropout]
        self.drop = bool(dropping)
        self.seeds = self._seeds(projections, dropping) if dropping else {}

    def _seeds(self, projections: tuple[Projection, ...], dropping: list[int]) -> dict[int, int]:
        known, numbers = current_keys(), [projections[index].number for index in dropping]
        if known is None or None in numbers:
            return dict(zip(dropping, draw_seeds(len(dropping)), strict=True))
        self._keys = known.keys
        return {
            index: known.seed_of(number)
            for index, number in zip(dropping, numbers, strict=True)
            if number is not None
        }

    def at(self, row: int) -> AdapterInputs:
        """The inputs of rows that begin at ``row`` of the layer's."""
        part = copy(self)
        part._first_row = row
        return part

    def product(self, x: Tensor, a_t: Tensor, ones: Tensor | None) -> Tensor:
        """t (T, E) of x (T, K), a turned (K, E) and the ones of biases (E,)."""
        if not self.drop:
            return torch.mm(x, a_t) if ones is None else torch.addmm(ones, x, a_t)
        t = x.new_zeros(x.shape[0], a_t.shape[1])
        if ones is not None:
            t += ones
        for slot in self._slots:
            torch.mm(self._read(slot, x), a_t[:, slot.ranks], out=t[:, slot.ranks])
        return t

    def add_input_gradient(self, dx: Tensor, inner: Tensor, a: Tensor) -> Tensor:
        """``dX += d_j(i_j A_j)`` for every adapter; dx (T, K), inner (T, E), a (E, K); returns dx."""
        for slot in self._slots:
            share = torch.mm(inner[:, slot.ranks], a[slot.ranks])
            seed, p = self.seeds.get(slot.index), slot.projection.dropout
            if seed is None:
                dx += share
            else:
                add_dropped(dx, share, p, seed, self._first_row, keys=self._keys_of(dx))
        return dx

    def gradients_of_a(self, inner: Tensor, x: Tensor) -> list[Tensor]:
        """dA (R, K) of each adapter in float32, of inner (T, E) and x (T, K) as in the product."""
        if not self.drop:
            whole = transposed_product(inner, x)
            return [whole[slot.ranks] for slot in self._slots]
        return [transposed_product(inner[:, slot.ranks], self._read(slot, x)) for slot in self._slots]

    def _read(self, slot: Slot, x: Tensor) -> Tensor:
        seed = self.seeds.get(slot.index)
        if seed is None:
            return x
        return dropped(x, slot.projection.dropout, seed, self._first_row, keys=self._keys_of(x))

    def _keys_of(self, x: Tensor) -> Tensor | None:
        """The keys of the rows of x (T, K), which begin at this part's first row."""
        if self._keys is None:
            return None
        self._keys = self._keys.to(
            x.device, non_blocking=True
        )  # of a split model whose stages compute in turn
        return self._keys[self._first_row : self._first_row + x.shape[0]]


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` in float32; left (T, M), right (T, N), summed over T in float32."""
    if left.device.type == "cuda" and left.dtype != torch.float32:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T @ right
