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
into one that all layers share, or, in layers that are to stay unpacked, into one of their own. 16-bit weights that are
in their places only while their layer is computed, because ranks share them out, are copied into the shared one.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pantheraml.kernels.place_factors import Placement, Table
from pantheraml.kernels.rms_norm import RMSNorm, rms_norm_into
from pantheraml.kernels.stack_rows import stack_rows
from pantheraml.kernels.unpack_table import UnpackTable
from pantheraml.models.fused.adapter_inputs import AdapterInputs, transposed_product
from pantheraml.models.fused.projection import Projection
from pantheraml.models.fused.slots import Slot, layout, margin_of, ones_of, placements

# Tensor cores take the inner dimension in steps of 64; narrower margins were measured slower.
_STEP = 64
# States of a stack's 4-bit weights whose tables are kept: a table costs the host more than a launch.
_KNOWN_PLACES = 8


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
        is_passing: whether 16-bit weights are in their places only while the layer is computed.
    """

    keeps_unpacked = False
    is_passing = False

    def __init__(self) -> None:
        self._buffer: Buffer | None = None
        self._table = Table()

    @torch.inference_mode(False)  # memory that an evaluation asks for serves training too
    def bind(self, projections: tuple[Projection, ...]) -> BoundStack:
        """The stack as it computes with these adapters."""
        margin = margin_of(projections, _STEP)
        if projections[0].is_packed and self.keeps_unpacked:
            self._buffer = _own_buffer(projections, margin, self._buffer)
        elif projections[0].is_packed or self.is_passing:
            self._buffer = _shared_buffer(projections, margin)
        elif self._buffer is None or not _holds(self._buffer, projections, margin):
            self._buffer = _move_in(projections, margin)
        return BoundStack(self._buffer, self._table, projections, margin, is_passing=self.is_passing)

    @property
    def is_trained(self) -> bool:
        """Whether weights that are trained lie here."""
        return self._buffer is not None and any(weight.requires_grad for weight in self._buffer.weights)

    # Margins are part of the weights' memory.
    beside_bytes = missing_bytes = 0

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
    """A stack with the adapters of one call. ``x`` is (T, K) or widened (T, K + E), ``dy`` (T, N) or (T, N + E).

    Its views of the buffer are made once: the host would take longer to cut them than to launch a product.
    """

    def __init__(
        self,
        buffer: Buffer,
        table: Table,
        projections: tuple[Projection, ...],
        margin: int,
        *,
        is_passing: bool = False,
    ) -> None:
        self._buffer, self._table, self.projections, self.margin = buffer, table, projections, margin
        self.inputs = AdapterInputs(projections)
        self.rows, self.cols = _sizes(projections)
        self.room = margin  # columns that a widened tensor has beside its own
        self._packed = projections[0].is_packed
        self._passing = is_passing
        self._layout = margin, layout(projections)
        self._placements: list[Placement] | None = None
        self._state: object = None
        self._unpackings: dict[object, UnpackTable] = {}
        matrix, rows, cols = buffer.matrix, self.rows, self.cols
        self._addresses = [projection.linear.weight.data_ptr() for projection in projections]
        self._weight = matrix[:rows, :cols]
        self._a = matrix[rows : rows + margin, :cols]  # E may be less than the buffer has room for
        self._b = matrix[:rows, cols : cols + margin]
        self._weight_t, self._a_t, self._b_t = self._weight.T, self._a.T, self._b.T
        self._wide_t, self._high = matrix[:rows, : cols + margin].T, matrix[: rows + margin, :cols]
        self.renew()

    def renew(self) -> bool:
        """Begin another call: factors are placed anew, because they may change in ways that no version counter sees.

        False where the stack is to be bound again: masks are those of one call, or 16-bit weights lie elsewhere by now
        (``model.to`` moves them).
        """
        self._call: object = object()
        if self._packed:
            self._state = _state_of(self.projections)
        elif self._passing:
            self._state = self._call
        elif [projection.linear.weight.data_ptr() for projection in self.projections] != self._addresses:
            return False
        return not self.inputs.drop

    @property
    def has_factors(self) -> bool:
        """Whether there are gradients of factors, which need the input of the product."""
        return self.margin > 0

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
        self._make_ready()
        if not self.margin:
            y = torch.mm(x, self._weight_t) if bias is None else torch.addmm(bias, x, self._weight_t)
            return Product(y, None)
        if x.shape[1] > self.cols:
            t = self._complete(x)
            return Product(torch.mm(x, self._wide_t), t)
        t = self.inputs.product(x, self._a_t, self._buffer.ones)
        # The narrow product first and the wide one added to it: adding inside a product is nearly free.
        y = torch.mm(t, self._b_t) if bias is None else torch.addmm(bias, t, self._b_t)
        return Product(y.addmm_(x, self._weight_t), t)

    def widened_product(self, x: Tensor) -> Product:
        """``product`` of a widened x, itself widened: y (T, N + E), whose margin is to be filled."""
        if not self.margin:
            return self.product(x)
        self._make_ready()
        t = self._complete(x)
        y = self.widened(x, self.rows)
        torch.mm(x, self._wide_t, out=y[:, : self.rows])
        return Product(y, t)

    def _complete(self, x: Tensor) -> Tensor:
        """Write t to the margin of x (T, K + E); returns t, in memory of its own since it is kept and x is not."""
        own, margin = x.split_with_sizes((self.cols, self.margin), 1)
        t = self.inputs.product(own, self._a_t, self._buffer.ones)
        margin.copy_(t)
        return t

    def product_of_norm(self, x: Tensor, norm: RMSNorm) -> Product:
        """``product`` of the norm of x (T, K)."""
        h = self.widened(x, self.cols)
        rms_norm_into(h[:, : self.cols] if self.room else h, x, norm)
        return self.product(h)

    def input_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """dX (T, K) with LoRA's share, and ``i = s dy B`` (T, E); a widened dy is completed."""
        self._make_ready()
        if not self.margin:
            return torch.mm(dy, self._weight), None
        if self.inputs.drop:
            dy = dy[:, : self.rows]
            inner = torch.mm(dy, self._b)
            return self.inputs.add_input_gradient(torch.mm(dy, self._weight), inner, self._a), inner
        if dy.shape[1] > self.rows:
            own, inner = dy.split_with_sizes((self.rows, self.margin), 1)
            torch.mm(own, self._b, out=inner)
            return torch.mm(dy, self._high), inner
        inner = torch.mm(dy, self._b)
        return torch.mm(inner, self._a).addmm_(dy, self._weight), inner

    def thin(self, x: Tensor) -> Tensor | None:
        """``t = x A^T`` (T, E) alone; None without LoRA."""
        if not self.margin:
            return None
        self._make_ready()
        return self.inputs.product(x[:, : self.cols], self._a_t, self._buffer.ones)

    def inner(self, dy: Tensor) -> Tensor | None:
        """``i = s dy B`` alone, where no gradient of x is wanted."""
        if not self.margin:
            return None
        self._make_ready()
        return torch.mm(dy[:, : self.rows], self._b)

    def factor_gradients(
        self, dy: Tensor, inner: Tensor | None, x: Tensor, t: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients in the order of ``factors``; x (T, K) as in the product."""
        if inner is None or t is None:
            return [None] * sum(len(p.factors) for p in self.projections)
        das = iter(self.inputs.gradients_of_a(inner, x if x.shape[1] == self.cols else x[:, : self.cols]))
        found: list[Tensor | None] = []
        for projection, slot in zip(self.projections, self.inputs.places, strict=True):
            if slot is None:
                found += [None] * len(projection.factors)
            else:
                found += _of_adapter(slot, next(das), dy[:, slot.rows], t[:, slot.ranks])
        return found

    def _make_ready(self) -> None:
        """Let the buffer hold this stack's weights and factors."""
        buffer = self._buffer
        if self._packed and self._passing:  # gathered again for the backward, they lie elsewhere
            self._state = _state_of(self.projections)
        if (self._packed or self._passing) and buffer.unpacked != self._state:
            self._fill(buffer)
        if self.margin and buffer.factors is not self._call:
            self._place_factors(buffer)

    @torch.no_grad()
    def _fill(self, buffer: Buffer) -> None:
        """Write the weights to the shared buffer, where just these, as they are now, do not lie there."""
        if self._packed:
            self._table_of(self._state).write()
        else:
            stack_rows([projection.linear.weight for projection in self.projections], self._weight)
        buffer.weights = tuple(projection.linear.weight for projection in self.projections)
        buffer.unpacked, buffer.factors = self._state, None

    def _table_of(self, state: object) -> UnpackTable:
        """Where 4-bit weights lie in this state of them, and go to."""
        if state not in self._unpackings:
            if (
                len(self._unpackings) == _KNOWN_PLACES
            ):  # ranks that share weights out gather them to a few places
                self._unpackings.clear()
            places = self._weight.split_with_sizes([projection.features for projection in self.projections])
            self._unpackings[state] = UnpackTable([p.packed for p in self.projections], places)
        return self._unpackings[state]

    def _place_factors(self, buffer: Buffer) -> None:
        if buffer.layout != self._layout:
            self._a.zero_()
            self._b.zero_()
            buffer.ones = ones_of(self.projections, self._a)
            buffer.layout = self._layout
        if self._placements is None:
            self._placements = placements(self.projections, self._a, self._b)
        self._table.write(self._placements)
        buffer.factors = self._call


def _state_of(projections: tuple[Projection, ...]) -> tuple[tuple[int, int, int], ...]:
    """Which weights these are, and how often they were written to."""
    # 4-bit weights are a class of tensors whose every question goes through Python, unless it is told not to.
    with torch._C.DisableTorchFunctionSubclass():
        weights = [projection.linear.weight for projection in projections]
        return tuple((id(weight), weight.data_ptr(), _version(weight)) for weight in weights)


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _of_adapter(slot: Slot, da: Tensor, dy: Tensor, t: Tensor) -> list[Tensor | None]:
    """Gradients of A, B and bias of one adapter; dy (T, N) and t (T, R) are its own."""
    scale, bias = slot.projection.scale, slot.projection.lora_bias
    db = transposed_product(dy, t)
    db = db if scale == 1.0 else db * scale
    dbias = None if bias is None else (dy.sum(0, dtype=db.dtype) * scale).to(bias.dtype)
    return [da.to(slot.a.dtype), db.to(slot.b.dtype), dbias]
