"""Frozen weights that share their input, one below the other, with LoRA's factors in the margins.

    [ W_1 | s B_1       ]
    [ W_2 |       s B_2 ]        (N + E, K + E): N rows of weights, K columns, E >= the sum of ranks, a multiple of 64
    [ A_1 |             ]
    [ A_2 |             ]

With x widened by ``t = x A^T`` the product of the upper rows is ``y = x W^T + s t B^T``, and with dy widened by
``i = s dy B`` the product of the left columns is ``dX = dy W + i A``. So LoRA's share of every wide product costs 64
more columns of an inner dimension of thousands: 5 to 36 us where the product of its own, or an addend inside the next
elementwise kernel, took 40 to 230 us (one H200, 8,192 tokens; decision 0002).

16-bit weights move into such a buffer once, and the layers' Parameters become views of it. 4-bit weights are unpacked
into one that all layers share, or, in layers that are to stay unpacked, into one of their own.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pantheraml.kernels.place_factors import Table
from pantheraml.kernels.rms_norm import RMSNorm, rms_norm_into
from pantheraml.models.fused.adapter_inputs import AdapterInputs, transposed_product
from pantheraml.models.fused.projection import Projection
from pantheraml.models.fused.slots import Slot, layout, margin_of, ones_of, placements, slots

# Tensor cores take the inner dimension in steps of 64; narrower margins were measured slower.
_STEP = 64


class Product(NamedTuple):
    """``y`` (T, N), and ``t = x A^T`` (T, E), contiguous, which the gradients of B need; None without LoRA."""

    y: Tensor
    t: Tensor | None


class Buffer:
    """The memory of a stack, whose weights and factors it holds, and which state of 4-bit weights was unpacked."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.weights: tuple[Tensor, ...] = ()
        self.unpacked: object = None
        self.factors: object = None
        self.layout: object = None
        self.ones: Tensor | None = None


# Buffers for unpacked weights, shared by all layers of the same sizes on a device: they hold one layer at a time.
_shared: WeakValueDictionary[tuple[object, ...], Buffer] = WeakValueDictionary()


class Stack:
    """The weights of projections that read the same input.

    Held by a layer for as long as it lives; what changes from call to call (adapters, their scales) is given as
    ``projections``, always of the same linears.

    Attributes:
        keeps_unpacked: whether 4-bit weights get a buffer of their own and are unpacked once.
    """

    keeps_unpacked = False

    def __init__(self) -> None:
        self._buffer: Buffer | None = None
        self._table = Table()

    @torch.inference_mode(False)  # memory that an evaluation asks for serves training too
    def bind(self, projections: tuple[Projection, ...]) -> BoundStack:
        """The stack as it computes with these adapters."""
        margin = margin_of(projections, _STEP)
        if projections[0].is_packed and self.keeps_unpacked:
            self._buffer = _own_buffer(projections, margin, self._buffer)
        elif projections[0].is_packed:
            self._buffer = _shared_buffer(projections, margin)
        elif self._buffer is None or not _holds(self._buffer, projections, margin):
            self._buffer = _move_in(projections, margin)
        return BoundStack(self._buffer, self._table, projections, margin)

    @property
    def is_trained(self) -> bool:
        """Whether weights that are trained lie here."""
        return self._buffer is not None and any(weight.requires_grad for weight in self._buffer.weights)

    def release(self) -> None:
        """Give each Parameter memory of its own again."""
        buffer, self._buffer = self._buffer, None
        for weight in () if buffer is None else buffer.weights:
            if buffer is not None and _lies_in(weight, buffer.matrix):
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)


def _sizes(projections: tuple[Projection, ...]) -> tuple[int, int]:
    return sum(p.features for p in projections), projections[0].linear.in_features


def _lies_in(weight: Tensor, matrix: Tensor) -> bool:
    return weight.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()


def _holds(buffer: Buffer, projections: tuple[Projection, ...], margin: int) -> bool:
    """Whether the buffer is wide enough, and the Parameters are views of it still (``model.to`` moves them)."""
    matrix = buffer.matrix
    at, row_bytes = matrix.data_ptr(), matrix.stride(0) * matrix.itemsize
    for projection in projections:
        if projection.linear.weight.data_ptr() != at or projection.dtype != matrix.dtype:
            return False
        at += projection.features * row_bytes
    return matrix.shape[1] - projections[0].linear.in_features >= margin


def _move_in(projections: tuple[Projection, ...], margin: int) -> Buffer:
    rows, cols = _sizes(projections)
    first = projections[0].linear.weight
    buffer = Buffer(first.new_empty(rows + margin, cols + margin))
    at = 0
    for projection in projections:
        place = buffer.matrix[at : at + projection.features, :cols]
        place.copy_(projection.linear.weight.detach())
        projection.linear.weight.data = place
        at += projection.features
    buffer.weights = tuple(projection.linear.weight for projection in projections)
    return buffer


def _own_buffer(projections: tuple[Projection, ...], margin: int, buffer: Buffer | None) -> Buffer:
    """``buffer`` where that is for these weights, at this margin, alone; else a new one."""
    rows, cols = _sizes(projections)
    first = projections[0].linear.weight
    kind = (rows + margin, cols + margin), projections[0].dtype, first.device
    if buffer is not None and buffer not in _shared.values():
        matrix = buffer.matrix
        if (tuple(matrix.shape), matrix.dtype, matrix.device) == kind:
            return buffer
    return Buffer(torch.empty(kind[0], dtype=kind[1], device=kind[2]))


def _shared_buffer(projections: tuple[Projection, ...], margin: int) -> Buffer:
    rows, cols = _sizes(projections)
    device, dtype = projections[0].linear.weight.device, projections[0].dtype
    key = (device, dtype, rows, cols, margin)
    buffer = _shared.get(key)
    if buffer is None:
        buffer = Buffer(torch.empty(rows + margin, cols + margin, dtype=dtype, device=device))
        _shared[key] = buffer
    return buffer


class BoundStack:
    """A stack with the adapters of one call. ``x`` is (T, K) or widened (T, K + E), ``dy`` (T, N) or (T, N + E)."""

    def __init__(
        self, buffer: Buffer, table: Table, projections: tuple[Projection, ...], margin: int
    ) -> None:
        self._buffer, self._table, self.projections, self.margin = buffer, table, projections, margin
        self.inputs = AdapterInputs(projections)
        self.rows, self.cols = _sizes(projections)
        self.room = margin  # columns that a widened tensor has beside its own

    def at(self, row: int) -> BoundStack:
        """The stack for a part of the layer's input that begins at ``row``."""
        if not self.inputs.drop:
            return self
        part = copy(self)
        part.inputs = self.inputs.at(row)
        return part

    def widened(self, like: Tensor, width: int) -> Tensor:
        """An empty (T, width + E) beside ``like`` (T, …): its first ``width`` columns are the caller's to fill."""
        return like.new_empty(like.shape[0], width + self.room)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Product:
        """``x W^T + bias`` with LoRA's share; a widened x is completed, and takes no bias."""
        matrix = self._matrix()
        weight, wide = matrix[: self.rows, : self.cols], x.shape[1] > self.cols
        if not self.margin:
            return Product(x @ weight.T if bias is None else torch.addmm(bias, x, weight.T), None)
        a, b = self._margins(matrix)
        t = self.inputs.product(x[:, : self.cols], a, self._buffer.ones)
        if wide:
            x[:, self.cols :] = t
            return Product(x @ matrix[: self.rows, : self.cols + self.margin].T, t)
        # The narrow product first and the wide one added to it: adding inside a product is nearly free.
        y = torch.mm(t, b.T) if bias is None else torch.addmm(bias, t, b.T)
        return Product(y.addmm_(x, weight.T), t)

    def widened_product(self, x: Tensor) -> Product:
        """``product`` of a widened x, itself widened: y (T, N + E), whose margin is to be filled."""
        if not self.margin:
            return self.product(x)
        matrix = self._matrix()
        t = self.inputs.product(x[:, : self.cols], self._margins(matrix)[0], self._buffer.ones)
        x[:, self.cols :] = t
        y = self.widened(x, self.rows)
        torch.mm(x, matrix[: self.rows, : self.cols + self.margin].T, out=y[:, : self.rows])
        return Product(y, t)

    def product_of_norm(self, x: Tensor, norm: RMSNorm) -> Product:
        """``product`` of the norm of x (T, K)."""
        h = self.widened(x, self.cols)
        rms_norm_into(h[:, : self.cols], x, norm)
        return self.product(h)

    def input_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """dX (T, K) with LoRA's share, and ``i = s dy B`` (T, E); a widened dy is completed."""
        matrix = self._matrix()
        weight, wide = matrix[: self.rows, : self.cols], dy.shape[1] > self.rows
        if not self.margin:
            return dy @ weight, None
        a, b = self._margins(matrix)
        if self.inputs.drop:
            dy = dy[:, : self.rows]
            inner = dy @ b
            return self.inputs.add_input_gradient(dy @ weight, inner, a), inner
        if wide:
            inner = dy[:, self.rows :]
            torch.mm(dy[:, : self.rows], b, out=inner)
            return dy @ matrix[: self.rows + self.margin, : self.cols], inner
        inner = dy @ b
        return torch.mm(inner, a).addmm_(dy, weight), inner

    def thin(self, x: Tensor) -> Tensor | None:
        """``t = x A^T`` (T, E) alone; None without LoRA."""
        if not self.margin:
            return None
        a, _ = self._margins(self._matrix())
        return self.inputs.product(x[:, : self.cols], a, self._buffer.ones)

    def inner(self, dy: Tensor) -> Tensor | None:
        """``i = s dy B`` alone, where no gradient of x is wanted."""
        return dy[:, : self.rows] @ self._margins(self._matrix())[1] if self.margin else None

    def factor_gradients(
        self, dy: Tensor, inner: Tensor | None, x: Tensor, t: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients in the order of ``factors``; x (T, K) as in the product."""
        found: list[list[Tensor | None]] = [[None] * len(p.factors) for p in self.projections]
        if inner is not None and t is not None:
            das = self.inputs.gradients_of_a(inner, x[:, : self.cols])
            for slot, da in zip(slots(self.projections), das, strict=True):
                found[slot.index] = _of_adapter(slot, da, dy[:, slot.rows], t[:, slot.ranks])
        return [gradient for of_one in found for gradient in of_one]

    def _margins(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The factors, (E, K) and (N, E); E may be less than the buffer has room for."""
        right = slice(self.cols, self.cols + self.margin)
        return matrix[self.rows : self.rows + self.margin, : self.cols], matrix[: self.rows, right]

    def _matrix(self) -> Tensor:
        """The buffer with this stack's weights and factors in it."""
        buffer = self._buffer
        if self.projections[0].is_packed:
            self._unpack(buffer)
        if self.margin and buffer.factors is not self.projections:
            self._place_factors()
        return buffer.matrix

    def _unpack(self, buffer: Buffer) -> None:
        """Write 4-bit weights to the buffer, unless just these, as they are now, lie there."""
        weights = tuple(projection.linear.weight for projection in self.projections)
        state = tuple((id(weight), weight.data_ptr(), _version(weight)) for weight in weights)
        if buffer.unpacked == state:
            return
        row = 0
        for projection in self.projections:
            projection.unpack_into(buffer.matrix[row : row + projection.features, : self.cols])
            row += projection.features
        buffer.weights, buffer.unpacked, buffer.factors = weights, state, None

    def _place_factors(self) -> None:
        buffer = self._buffer
        wanted = self.margin, layout(self.projections)
        a, b = self._margins(buffer.matrix)
        if buffer.layout != wanted:
            a.zero_()
            b.zero_()
            buffer.ones = ones_of(self.projections, a)
            buffer.layout = wanted
        self._table.write(placements(self.projections, a, b))
        # This very tuple, made anew at every call: factors may change in ways that no version counter sees.
        buffer.factors = self.projections


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _of_adapter(slot: Slot, da: Tensor, dy: Tensor, t: Tensor) -> list[Tensor | None]:
    """Gradients of A, B and bias of one adapter; dy (T, N) and t (T, R) are its own."""
    scale, bias = slot.projection.scale, slot.projection.lora_bias
    db = transposed_product(dy, t)
    db = db if scale == 1.0 else db * scale
    dbias = None if bias is None else (dy.sum(0, dtype=db.dtype) * scale).to(bias.dtype)
    return [da.to(slot.a.dtype), db.to(slot.b.dtype), dbias]
