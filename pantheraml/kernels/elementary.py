"""exp and tanh for kernels, accurate to a few units in the last place of float32.

Triton's own ``exp`` rounds its argument times log2(e), so that its error grows with the argument, and its ``/`` is an
approximate quotient; both are what a gradient that stock PyTorch computes to 1 unit would be judged by.
"""

from __future__ import annotations

from pantheraml.kernels.launch import jit, tl


@jit
def exp(x):
    """exp to 2 units in the last place at any x; a NaN stays one."""
    x = tl.where(x < -150.0, -150.0, x)  # 0 in float32, and free of inf - inf
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950408889634, -high) + x * 1.9259629911266175e-8
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@jit
def tanh(x):
    """tanh(x), and its slope 1 - tanh(x)^2, exact also where tanh is close to 1."""
    z = tl.minimum(x * x, 0.4)
    # For |x| < 0.625 a fit in x^2, good to 2e-8 of the value: exponentials would cancel.
    series = -0.33333329 + z * (0.13332782 + z * (-0.0538525 + z * (0.02100364 - z * 0.00610495)))
    inner = x + x * z * series
    e = exp(-2 * tl.abs(x))
    rest = tl.div_rn(2 * e, 1 + e)  # 1 - |tanh|
    near = tl.abs(x) < 0.625
    value = tl.where(near, inner, tl.where(x < 0, rest - 1, 1 - rest))
    return value, tl.where(near, 1 - inner * inner, rest * (2 - rest))
