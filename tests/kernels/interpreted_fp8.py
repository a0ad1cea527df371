"""FP8's kernels under Triton's interpreter, which cannot cast to float8: scaled values in float32.

Run by ``test_formats_without_gpu.py``. The rounding itself is the hardware's; tests/gpu/test_formats.py
holds it against torch's.
"""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import fp8, fp8_factor, fp8_norm, fp8_product
from pantheraml.kernels.rms_norm import RMSNorm
from tests.kernels.fp8_cases import KINDS, rows

LARGEST = fp8.LARGEST


def quantise(launch, x, by=None, margin=None):
    width = x.shape[1] + (0 if margin is None else 3 * margin.values.shape[1])
    out, scales = torch.empty(x.shape[0], width), torch.empty(x.shape[0], 1)
    launch(x, by, margin, out, scales)
    return out, scales


def check(ours, exact):
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-6, atol=0, equal_nan=True)


def whole(out, cols):
    """Columns, m by its two parts, and m / 16: near a tie hi may fall on either side, and lo makes up for it."""
    extra = (out.shape[1] - cols) // 3
    hi, middle, lo = out[:, cols:].split(extra, dim=1) if extra else 3 * [out[:, :0]]
    assert torch.equal(hi.to(fp8.DTYPE).float(), hi)
    return torch.cat([out[:, :cols], hi + lo / 16, middle], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(12, 200), (1, 16), (3, 1), (2, 3000)])
def test_scales_and_scaled_values(kind, dtype, shape):
    if dtype == torch.float16 and "1e12" in kind:
        return
    x = rows(kind, shape, dtype)
    ours = quantise(fp8.triton_quantise, x)
    check(ours, quantise(fp8._eager_quantise, x))
    assert (ours[0].abs() <= LARGEST).all()


@pytest.mark.parametrize("extra", [0, 5, 64])
@pytest.mark.parametrize("scaled", [True, False])
def test_scaled_columns_and_margins(extra, scaled):
    x, by = rows("normal", (5, 100)), torch.rand(100) + 0.5 if scaled else None
    margin = (
        fp8.Margin(rows("normal", (5, 2 * extra))[:, ::2] * 9, torch.tensor([5.0]), 100.0) if extra else None
    )
    ours, exact = (quantise(way, x, by, margin) for way in (fp8.triton_quantise, fp8._eager_quantise))
    check(*((whole(out, 100), scales) for out, scales in (ours, exact)))


def test_what_is_not_finite_in_a_margin():
    x, m = rows("normal", (5, 100)), rows("normal", (5, 16))
    m[2, 3] = float("inf")
    out, scales = quantise(fp8.triton_quantise, x, None, fp8.Margin(m, torch.ones(1), 224.0))
    assert scales[2].isnan().all() and (out[2] == 0).all() and scales[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("shape", [(70, 32), (1, 16), (33, 40)])
@pytest.mark.parametrize("turned", [True, False])
def test_split_factors(shape, turned):
    source = rows("normal", shape[::-1]).T if turned else rows("normal", shape)
    by = torch.rand(shape[0]) + 0.1
    for scales in (by, None):
        ours, exact = (torch.zeros(shape[0], 3 * shape[1] + 3, dtype=torch.float16) for _ in range(2))
        factor = fp8_factor.Factor(source, scales, 1e-3)
        largest, other = torch.zeros(1), torch.zeros(1)
        fp8_factor.triton_split(factor, largest, ours[:, :-3])
        fp8_factor._eager_split(factor, other, exact[:, :-3])
        torch.testing.assert_close(largest, other, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours[:, : shape[1]], exact[:, : shape[1]], rtol=2**-10, atol=0)
        whole = [t[:, : shape[1]].float() + t[:, shape[1] : 2 * shape[1]].float() / 16 for t in (ours, exact)]
        torch.testing.assert_close(
            ours[:, 2 * shape[1] : -3], exact[:, 2 * shape[1] : -3], rtol=2**-9, atol=1e-6
        )
        torch.testing.assert_close(*whole, rtol=1e-5, atol=1e-6)
        assert (ours[:, -3:] == 0).all()


def test_rows_that_lie_apart_and_turned():
    wide = rows("normal", (6, 80))
    for x in (wide[:, 7:40], wide.T):
        check(quantise(fp8.triton_quantise, x), quantise(fp8._eager_quantise, x.contiguous()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(bad):
    x = rows("normal")
    x[4, 7] = bad
    out, scales = quantise(fp8.triton_quantise, x)
    assert (out[4] == 0).all() and scales[4].isnan().all()
    check((out, scales), quantise(fp8._eager_quantise, x))


@pytest.mark.parametrize(
    ("dtype", "cast_first"), [(torch.float32, True), (torch.float16, True), (torch.float16, False)]
)
@pytest.mark.parametrize("keep_h", [True, False])
def test_the_norm(dtype, cast_first, keep_h):
    x, weight = rows("outlier columns", (6, 100), dtype), torch.rand(100).to(dtype)
    out, scales, h = torch.empty(6, 160), torch.empty(6, 1), torch.empty_like(x) if keep_h else None
    norm, t = RMSNorm(weight, 1e-5, 1.0, cast_first), torch.empty(6, 20, dtype=dtype)
    raw = fp8.Margin(rows("normal", (6, 20), dtype), torch.tensor([300.0]), 1.0)
    fp8_norm.triton_norm_rows(x, norm, raw, fp8.Fp8Rows(out, scales), t, h)
    expected, exact_t = fp8_norm.rms_norm(x, *norm), fp8_norm._eager_norm_rows(x, norm, raw, False).t
    exact = quantise(fp8._eager_quantise, expected, None, fp8.Margin(exact_t, raw.largest, 1.0))
    torch.testing.assert_close(t, exact_t, rtol=2e-3, atol=0)
    unit = 2e-3 if dtype == torch.float16 else 1e-5  # one unit in the last place of h
    torch.testing.assert_close(scales, exact[1], rtol=unit, atol=0)
    torch.testing.assert_close(whole(out, 100), whole(exact[0], 100), rtol=2 * unit, atol=unit)
    if h is not None:
        torch.testing.assert_close(h, expected, rtol=unit, atol=0)


@pytest.mark.parametrize("shape", [(128, 128), (40, 300), (1, 16)])
def test_turning(shape):
    weight = torch.randint(0, 255, (shape[0], shape[1] + 5), dtype=torch.uint8)[:, : shape[1]]
    whole = torch.zeros(shape[1], shape[0] + 8, dtype=torch.uint8)
    fp8_product.triton_turn(weight, whole[:, 4 : 4 + shape[0]])
    assert torch.equal(whole[:, 4 : 4 + shape[0]], weight.T)
    assert (whole[:, :4] == 0).all() and (whole[:, 4 + shape[0] :] == 0).all()


def test_offsets_past_2_to_the_31():
    # Rows 2^30 elements apart, so the last one starts at 2^31, in memory that is mostly never touched.
    x = torch.empty(2**31 + 32, dtype=torch.float16).as_strided((3, 32), (2**30, 1))
    values = rows("normal", (3, 32), torch.float16)
    x.copy_(values)
    out, scales = torch.empty(3, 32), torch.empty(3, 1)
    fp8.triton_quantise(x, None, None, out, scales)
    check((out, scales), quantise(fp8._eager_quantise, values))


def test_a_wrong_scale_is_seen():
    x = rows("normal")
    out, scales = quantise(fp8.triton_quantise, x)
    with pytest.raises(AssertionError):
        check((out, scales * (1 + 1e-4)), quantise(fp8._eager_quantise, x))
    with pytest.raises(AssertionError):
        check((out.roll(1, 0), scales), quantise(fp8._eager_quantise, x))
