"""The numerical yardstick: never more than twice as wrong as stock PyTorch in the same dtype."""

from __future__ import annotations

import torch


def assert_as_good_as(ours, stock, exact, what="output"):
    """``max|ours - exact| <= 2 * max|stock - exact|``.

    Stock may be exact by luck on a few numbers; half a unit in the last place of the largest one is
    therefore always allowed: that much is lost by writing the result down.
    """
    assert ours.shape == exact.shape and ours.dtype == stock.dtype, (ours.shape, ours.dtype, stock.dtype)
    if exact.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{what} is not finite"
    error = (ours.double() - exact.double()).abs().max().item()
    theirs = (stock.double() - exact.double()).abs().max().item()
    least = 0.5 * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= max(2 * theirs, least), (
        f"{what}: error {error:.3g}, stock {theirs:.3g}, least {least:.3g}"
    )
