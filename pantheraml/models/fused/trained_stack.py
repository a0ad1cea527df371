"""Weights that share their input and are trained: each stays where it is, and gets a gradient.

Nothing is copied: whoever shares weights out between ranks gathers them into tensors of its own, and an optimizer holds
the Parameters. So there is a product for each weight, which writes to its columns of one output; the gradient of the
input is one sum inside the products; the gradients of the weights, ``dW = dy^T x``, are the rows of one product.

The weights are read from their modules at every product. The memory of those that ranks share out is given back after
the forward, and filled again before the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pantheraml.kernels.rms_norm import RMSNorm, rms_norm_into
from pantheraml.models.fused.adapter_inputs import AdapterInputs
from pantheraml.models.fused.projection import Projection
from pantheraml.models.fused.stack import Product


class TrainedStack:
    """As ``BoundStack``, for plain weights of which some are trained and none has an adapter.

    Args:
        projections: of linears that read the same input.
    """

    margin = room = 0
    has_factors = True

    def __init__(self, projections: tuple[Projection, ...]) -> None:
        self.projections = projections
        self.inputs = AdapterInputs(projections)
        self.features = [projection.features for projection in projections]
        self.rows, self.cols = sum(self.features), projections[0].linear.in_features
        self._dtype = projections[0].dtype

    def renew(self) -> bool:
        """As of every stack: False where weights are of another dtype by now (``model.to``); they may lie anywhere."""
        return all(weight.dtype == self._dtype for weight in self._weights)

    def at(self, row: int) -> TrainedStack:
        """The stack for a part of the layer's input that begins at ``row``."""
        return self

    def widened(self, like: Tensor, width: int) -> Tensor:
        """An empty (T, width) beside ``like`` (T, …)."""
        return like.new_empty(like.shape[0], width)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Product:
        """``x W^T`` (T, N) of x (T, K); ``bias`` is that of a single weight."""
        first, *others = self._weights
        if not others:
            return Product(torch.mm(x, first.T) if bias is None else torch.addmm(bias, x, first.T), None)
        y = self.widened(x, self.rows)
        for weight, columns in zip(self._weights, y.split_with_sizes(self.features, 1), strict=True):
            torch.mm(x, weight.T, out=columns)
        return Product(y, None)

    widened_product = product

    def product_of_norm(self, x: Tensor, norm: RMSNorm) -> Product:
        """``product`` of the norm of x (T, K)."""
        return self.product(rms_norm_into(self.widened(x, self.cols), x, norm))

    def input_gradient(self, dy: Tensor) -> tuple[Tensor, None]:
        """``dX = dy W`` (T, K) of dy (T, N)."""
        first, *others = self._weights
        columns = dy.split_with_sizes(self.features, 1)
        dx = torch.mm(columns[0], first)
        for part, weight in zip(columns[1:], others, strict=True):
            dx.addmm_(part, weight)
        return dx, None

    def thin(self, x: Tensor) -> None:
        """Without LoRA there is no t."""

    def inner(self, dy: Tensor) -> None:
        """Without LoRA there is no i."""

    def factor_gradients(
        self, dy: Tensor, inner: Tensor | None, x: Tensor, t: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients of weight and bias of each projection; dy (T, N), x (T, K) as in the product."""
        columns = dy.split_with_sizes(self.features, 1)
        if all(projection.weight is not None for projection in self.projections):
            dws = torch.mm(dy.T, x).split_with_sizes(self.features)
        else:
            pairs = zip(self.projections, columns, strict=True)
            dws = [None if projection.weight is None else torch.mm(part.T, x) for projection, part in pairs]
        found: list[Tensor | None] = []
        for projection, dw, part in zip(self.projections, dws, columns, strict=True):
            found += [dw, None if projection.bias is None else part.sum(0)]
        return found

    @property
    def _weights(self) -> list[Tensor]:
        # Through the dictionaries, as everywhere in a layer: modules' own search costs the host more than a launch.
        found = (projection.linear._parameters["weight"] for projection in self.projections)
        return [weight for weight in found if weight is not None]
