"""Frozen FP8 weights that share their input, with LoRA's factors in the margins of the same products.

    forward   [x    | t ] [W_q | s B / w]^T * scale_t * w_n
    backward  [dy w | i ] [W_q ; A]         * scale_t

t = x A^T and i = s dy B are computed in the dtype of x, for the gradients of the factors. In the margins they and the
factors are split into e4m3 parts (``fp8_factor``, three columns for one), which keep 8 bits of mantissa as bfloat16.
LoRA's share thus costs 3 E more columns of an inner dimension of thousands, E the sum of ranks in steps of 16.

``F = [W_q | margin]`` (N, K + 3 E) holds the layers' Parameters as views. The backward reads the turned ``D``
(K, N + 3 E): kept where the layers say so (``keeps_turned``), else made anew in memory that all layers share.

Weights that are in their places only while their layer is computed, because ranks share them out, are copied into an F
that all layers share, and turned in every backward. To gather them turned as well would spare a kernel that reads and
writes them once, and cost as much again on every rank and on the way between ranks, which is slower.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pantheraml.kernels.fp8 import DTYPE, Margin, quantise_rows
from pantheraml.kernels.fp8_factor import Factor, split_factor
from pantheraml.kernels.fp8_norm import norm_rows
from pantheraml.kernels.fp8_product import multiply, turn
from pantheraml.kernels.place_factors import Placement, Table
from pantheraml.kernels.rms_norm import RMSNorm, rms_norm_into
from pantheraml.kernels.workspace import borrow
from pantheraml.models.fused.adapter_inputs import AdapterInputs
from pantheraml.models.fused.projection import Projection
from pantheraml.models.fused.slots import layout, margin_of, ones_of, placements
from pantheraml.models.fused.stack import BoundStack, Product

_STEP = 16
# An adapter that begins has a B near zero: below this share of its weight, t would have to fall below e4m3's range.
_LEAST_B, _LEAST_A = 3.5, 1e-12


class Fp8Stack:
    """As ``Stack``, for projections whose weights are in FP8.

    Attributes:
        is_passing: whether weights are in their places only while the layer is computed.
    """

    keeps_unpacked = False  # nothing is packed
    is_passing = False
    is_trained = False  # FP8 weights cannot be

    def __init__(self) -> None:
        self._memory: Fp8Memory | None = None

    @torch.inference_mode(False)  # memory that an evaluation asks for serves training too
    def bind(self, projections: tuple[Projection, ...]) -> BoundFp8Stack:
        """The stack as it computes with these adapters."""
        margin = margin_of(projections, _STEP)
        if self._memory is None or not self._memory.holds(projections, margin):
            self._memory = Fp8Memory(projections, margin, is_passing=self.is_passing)
        return BoundFp8Stack(self._memory, projections, margin)

    @property
    def beside_bytes(self) -> int:
        """Bytes that are held beside the weights' memory."""
        return 0 if self._memory is None else self._memory.beside_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes that the first backward will add to them: those of the turned twin."""
        return 0 if self._memory is None else self._memory.missing_bytes

    def release(self) -> None:
        """Give each Parameter memory of its own again."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.release()


class _Room:
    """F and the factors as they are multiplied, and whose they are.

    Attributes:
        matrix: F (N, K + 3 E).
        a: (E, K).
        b: (N, E), scaled.
        ones: (E,), what is added to t for biases, or None.
        weights: the call whose weights were copied here, where they are only passing.
        factors: the call whose factors lie here.
        layout: where in the margins they do.
        largest: what the margins are multiplied by follows from these.
    """

    def __init__(self, rows: int, cols: int, margin: int, device: torch.device, dtype: torch.dtype) -> None:
        self.matrix = torch.zeros(rows, cols + 3 * margin, dtype=torch.uint8, device=device).view(DTYPE)
        self.a = torch.zeros(margin, cols, dtype=dtype, device=device)
        self.b = torch.zeros(rows, margin, dtype=dtype, device=device)
        self.ones: Tensor | None = None
        self.weights: object = None
        self.factors: object = None
        self.layout: object = None
        self.largest: dict[str, Tensor] = {}


# Rooms of passing weights, shared by all layers of the same sizes on a device: they hold one layer at a time.
_shared: WeakValueDictionary[tuple[object, ...], _Room] = WeakValueDictionary()


class Fp8Memory:
    """The weights of a stack side by side with their factors, both ways.

    Attributes:
        room: where they lie; the layer's own, or one that it shares.
        matrix: F (N, K + 3 E).
        scales: (N,) float32, those of the weights.
        a: (E, K), the factors as they are multiplied.
        b: (N, E), scaled.
    """

    def __init__(self, projections: tuple[Projection, ...], margin: int, *, is_passing: bool = False) -> None:
        linears: Any = [projection.linear for projection in projections]
        rows, cols = sum(p.features for p in projections), linears[0].in_features
        kind = rows, cols, margin, linears[0].weight.device, projections[0].dtype
        room = _shared.get(kind) if is_passing else None
        if room is None:
            room = _Room(*kind)
        if is_passing:
            _shared[kind] = room
        self.margin, self.room, self.is_passing = margin, room, is_passing
        self.matrix, self.a, self.b = room.matrix, room.a, room.b
        self.scales = torch.cat([linear.weight_scale for linear in linears])
        self.linears = tuple(linears)
        self._versions = [linear.weight_scale for linear in linears]
        self._places = self.matrix[:, :cols].split_with_sizes([linear.out_features for linear in linears])
        self._table = Table()
        self._turned: Tensor | None = None
        self._turned_factors: object = None
        if not is_passing:
            self._copy_weights()
            for linear, place in zip(linears, self._places, strict=True):
                linear.weight.data = place

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for linear, place in zip(self.linears, self._places, strict=True):
            place.view(torch.uint8).copy_(linear.weight.view(torch.uint8))

    def holds(self, projections: tuple[Projection, ...], margin: int) -> bool:
        """Whether these Parameters and scales lie here still, unless they only pass, and the margin is theirs."""
        at = self.matrix.data_ptr()
        for projection, scales in zip(projections, self._versions, strict=True):
            linear: Any = projection.linear
            if linear.weight_scale is not scales or not (self.is_passing or linear.weight.data_ptr() == at):
                return False
            at += projection.features * self.matrix.stride(0)
        return self.margin == margin and self.a.dtype == projections[0].dtype

    def release(self) -> None:
        """Give each Parameter memory of its own again."""
        storage = self.matrix.untyped_storage().data_ptr()
        for linear in () if self.is_passing else self.linears:
            if linear.weight.untyped_storage().data_ptr() == storage:
                linear.weight.data = linear.weight.data.clone(memory_format=torch.contiguous_format)

    def place(self, bound: BoundFp8Stack) -> None:
        """Write the factors to ``a``, ``b`` and the margin of ``matrix``, once for each call; before them the weights
        beside which they belong, where others may have passed since.
        """
        room = self.room
        if self.is_passing and room.weights is not bound.call:
            self._copy_weights()
            room.weights, room.factors = bound.call, None
        if not self.margin or room.factors is bound.call:
            return
        projections = bound.projections
        wanted = layout(projections)
        if wanted != room.layout:
            self.a.zero_()
            self.b.zero_()
            room.ones = ones_of(projections, self.a)
            room.layout = wanted
        if bound.placements is None:
            bound.placements = placements(projections, self.a, self.b)
        self._table.write(bound.placements)
        factor = Factor(self.b, self.scales, _LEAST_B)
        room.largest["b"] = split_factor(factor, self.matrix[:, self.matrix.shape[1] - 3 * self.margin :])
        room.factors = bound.call

    def largest(self, name: str) -> Tensor:
        """What the margin beside the factor "a" or "b" is multiplied by follows from this."""
        return self.room.largest[name]

    @property
    def beside_bytes(self) -> int:
        """Bytes beside F: those of the factors, and of D where it is kept."""
        held = (self.scales, self.a, self.b, self._turned)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @property
    def missing_bytes(self) -> int:
        """Bytes of D where it is to be kept and nobody asked for it yet."""
        return math.prod(self._turned_shape) if self._turned is None and self._keeps_turned else 0

    @property
    def _keeps_turned(self) -> bool:
        return self.linears[0].keeps_turned and not self.is_passing

    @property
    def _turned_shape(self) -> tuple[int, int]:
        rows, wide = self.matrix.shape
        return wide - 3 * self.margin, rows + 3 * self.margin

    def turned(self, call: object) -> Tensor:
        """D (K, N + 3 E) with the factors of a call, placed before; to be used before anything else asks for one."""
        shape, kept = self._turned_shape, self._turned
        cols, rows = shape[0], self.matrix.shape[0]
        if kept is None:
            if self._keeps_turned:
                kept = torch.empty(shape, dtype=torch.uint8, device=self.matrix.device).view(DTYPE)
                self._turned = kept
            result = borrow(shape, DTYPE, self.matrix.device) if kept is None else kept
            turn(self.matrix[:, :cols], result[:, :rows])
        else:
            result = kept
        if self.margin and (self._turned is None or self._turned_factors is not call):
            self.room.largest["a"] = split_factor(Factor(self.a.T, None, _LEAST_A), result[:, rows:])
            self._turned_factors = call
        return result


class BoundFp8Stack(BoundStack):
    """An FP8 stack with the adapters of one call; ``x`` is (T, K), ``dy`` (T, N), never widened."""

    def __init__(self, memory: Fp8Memory, projections: tuple[Projection, ...], margin: int) -> None:
        self._memory, self.projections, self.margin = memory, projections, margin
        self.inputs = AdapterInputs(projections)
        self.rows, self.cols = memory.matrix.shape[0], projections[0].linear.in_features
        self.room = 0  # FP8 rows and their margins are made inside the products
        self.placements: list[Placement] | None = None
        self.renew()

    def renew(self) -> bool:
        """As of every stack."""
        self.call: object = object()
        return self._memory.holds(self.projections, self.margin) and not self.inputs.drop

    def product(self, x: Tensor, bias: Tensor | None = None) -> Product:
        """``x W^T + bias`` with LoRA's share."""
        memory = self._memory
        memory.place(self)
        t = self.thin(x)
        rows = quantise_rows(x, margin=None if t is None else Margin(t, memory.largest("b"), _LEAST_B))
        y = multiply(rows, memory.matrix, memory.scales, x.dtype)
        return Product(y if bias is None else y.add_(bias), t)

    def widened_product(self, x: Tensor) -> Product:
        """``product``: nothing is widened."""
        return self.product(x)

    def product_of_norm(self, x: Tensor, norm: RMSNorm) -> Product:
        """``product`` of the norm of x (T, K), which is written in the dtype of x for dropout and biases alone."""
        memory = self._memory
        memory.place(self)
        if self.inputs.drop or memory.room.ones is not None:  # t is no product of x then
            return self.product(rms_norm_into(torch.empty_like(x), x, norm))
        raw = None
        if self.margin:
            weight = norm.weight if norm.offset == 0 else norm.weight + norm.offset
            raw = Margin(torch.mm(x, (memory.a * weight).T), memory.largest("b"), _LEAST_B)
        rows, t, _ = norm_rows(x, norm, raw)
        return Product(multiply(rows, memory.matrix, memory.scales, x.dtype), t)

    def input_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """dX (T, K) with LoRA's share, and ``i = s dy B`` (T, E)."""
        memory = self._memory
        memory.place(self)
        inner = self.inner(dy)
        turned = memory.turned(self.call)
        if inner is not None and self.inputs.drop:
            dx = multiply(quantise_rows(dy, memory.scales), turned[:, : self.rows], None, dy.dtype)
            return self.inputs.add_input_gradient(dx, inner, memory.a), inner
        margin = None if inner is None else Margin(inner, memory.largest("a"), _LEAST_A)
        rows = quantise_rows(dy, memory.scales, margin)
        return multiply(rows, turned, None, dy.dtype), inner

    def thin(self, x: Tensor) -> Tensor | None:
        """``t = x A^T`` (T, E) alone; None without LoRA."""
        if not self.margin:
            return None
        self._memory.place(self)
        return self.inputs.product(x, self._memory.a.T, self._memory.room.ones)

    def inner(self, dy: Tensor) -> Tensor | None:
        """``i = s dy B`` alone, where no gradient of x is wanted."""
        if not self.margin:
            return None
        self._memory.place(self)
        return torch.mm(dy, self._memory.b)
