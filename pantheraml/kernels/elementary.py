"""exp, log, tanh and sigmoid for kernels, accurate in float32.

Triton's own ``exp`` rounds its argument times log2(e), so that its error grows with the argument; the hardware's powers
and logarithms of two err by 2 units in the last place or more, and ``/`` is an approximate quotient. In 16-bit results
that does not show. In float32 ones (``EXACT``) gradients would err by more than twice what stock PyTorch's do, so the
exponential is a series there.
"""

from __future__ import annotations

from pantheraml.kernels.launch import jit, tl


@jit
def product(x, y, EXACT: tl.constexpr):
    """x * y; with ``EXACT`` rounded, whatever is added to it.

    Compilers fuse ``x * y + z``, which adds z to the product before it is rounded. A logit would then differ from the
    highest one even where it is that one.
    """
    return tl.fma(x, y, 0.0) if EXACT else x * y


@jit
def exp(x, EXACT: tl.constexpr):
    """exp at any x but infinity, 0 below 1e-38, to 1 unit in the last place, or without ``EXACT`` to 3; NaN is NaN."""
    if EXACT:
        inside = tl.where(x < -87.0, -87.0, tl.where(x > 89.0, 89.0, x))
        n = tl.floor(inside * 1.4426950408889634 + 0.5)
        # ln 2 in two parts, the first of so few bits that n times it is exact.
        r = tl.fma(n, -1.42860677e-6, tl.fma(n, -0.693145751953125, inside))
        series = 1 / 120 + r * (1 / 720 + r * (1 / 5040))
        series = 0.5 + r * (1 / 6 + r * (1 / 24 + r * series))
        whole = tl.where(n < 200.0, n, 0.0).to(tl.int32) + 127
        y = (1 + tl.fma(r * r, series, r)) * (whole << 23).to(tl.float32, bitcast=True)
        return tl.where(x < -87.0, 0.0, y)
    x = tl.where(x < -150.0, -150.0, x)  # 0 in float32, and free of inf - inf
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950408889634, -high) + x * 1.9259629911266175e-8
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@jit
def log(x, EXACT: tl.constexpr):
    """log of a positive x, with ``EXACT`` improved by a step of Newton's."""
    y = tl.log(x)
    if EXACT:
        y += tl.fma(x, exp(-y, True), -1.0)
    return y


@jit
def tanh(x, EXACT: tl.constexpr):
    """tanh(x), and its slope 1 - tanh(x)^2, exact also where tanh is close to 1."""
    z = tl.minimum(x * x, 0.4)
    # For |x| < 0.625 a fit in x^2, good to 2e-8 of the value: exponentials would cancel.
    series = -0.33333329 + z * (0.13332782 + z * (-0.0538525 + z * (0.02100364 - z * 0.00610495)))
    inner = x + x * z * series
    e = exp(-2 * tl.abs(x), EXACT)
    rest = tl.div_rn(2 * e, 1 + e)  # 1 - |tanh|
    near = tl.abs(x) < 0.625
    value = tl.where(near, inner, tl.where(x < 0, rest - 1, 1 - rest))
    return value, tl.where(near, 1 - inner * inner, rest * (2 - rest))


@jit
def sigmoid(x, EXACT: tl.constexpr):
    """s = sigmoid(x); with ``EXACT`` the rest that the roundings of 1 + e^-x and its inverse took from s; and 1 - s."""
    e = exp(tl.minimum(-x, 80.0), EXACT)
    whole = 1 + e
    s = tl.div_rn(1.0, whole)
    rest = s * tl.fma(whole - 1 - e, s, tl.fma(-whole, s, 1.0)) if EXACT else 0.0
    return s, rest, e * s  # 1 - s would cancel where s is close to 1
