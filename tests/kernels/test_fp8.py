"""FP8 on a CPU: the plain paths in float8, how far they are from float64, and the custom ops."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import fp8, fp8_factor, fp8_norm, fp8_product
from pantheraml.kernels.rms_norm import RMSNorm, rms_norm
from tests.kernels.fp8_cases import KINDS, LEAST_DB, rows, sqnr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 200), (1, 16), (3, 1)])
def test_rows_lose_as_much_as_e4m3_must(kind, dtype, shape):
    x = rows(kind, shape, dtype)
    quantised = fp8.quantise_rows(x)
    assert quantised.values.dtype == torch.float8_e4m3fn and quantised.values.shape == shape
    assert quantised.scales.shape == (shape[0], 1)
    assert sqnr(quantised.dense(), x) > LEAST_DB
    largest = quantised.values.float().abs().amax(1)[x.abs().amax(1) > 0]
    assert (largest == fp8.LARGEST).all()  # the whole range is used


def test_a_row_of_zeros_and_one_without_rows():
    zero = fp8.quantise_rows(torch.zeros(3, 16))
    assert (zero.dense() == 0).all() and torch.isfinite(zero.scales).all()
    assert fp8.quantise_rows(torch.zeros(0, 16)).values.shape == (0, 16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_its_own_row_alone(bad):
    x = rows("normal")
    x[4, 7] = bad
    weight = fp8.quantise_rows(rows("normal", (32, 200)))
    y = fp8_product.multiply(fp8.quantise_rows(x), weight.values, weight.scales.flatten(), torch.float32)
    assert y[4].isnan().all() and y[torch.arange(12) != 4].isfinite().all()


def test_columns_are_scaled_and_the_margin_is_under_the_same_scale():
    x, by, m = rows("normal", (5, 64)), torch.rand(64) + 0.5, rows("normal", (5, 16)) * 3
    ours = fp8.quantise_rows(x, by, fp8.Margin(m, torch.tensor([448.0]), 1.0))
    alone = fp8.quantise_rows(torch.cat([x * by, 2 * m], dim=1))
    assert torch.equal(ours.scales, alone.scales)
    assert torch.equal(ours.values.float()[:, :80], alone.values.float())
    hi, sixteenth, lo = (part * ours.scales for part in ours.values.float()[:, 64:].split(16, dim=1))
    assert sqnr(hi + lo / 16, 2 * m) > 45 and sqnr(hi, 2 * m) < 36 and sqnr(sixteenth, m / 8) > LEAST_DB


@pytest.mark.parametrize("least", [1e-12, 1000.0])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_split_factor_keeps_eight_bits(least, size):
    """``[m | m / 16] [hi | lo]^T``: the factor loses no more than in bfloat16, however small or large it is."""
    source = rows("normal", (48, 32)) * torch.logspace(-4, 0, 48)[:, None] * size
    least *= size
    by = torch.rand(48) + 0.1
    target = torch.empty(48, 96, dtype=fp8.DTYPE)
    largest = fp8_factor.split_factor(fp8_factor.Factor(source, by, least), target)
    assert largest == (source / by[:, None]).abs().max()
    hi, lo, sixteenth = target.float().split(32, dim=1)
    assert (sixteenth - hi / 16).abs().max() <= 2**-10
    exact = source / by[:, None] / (largest.clamp(min=least) / 224)
    assert target.float().abs().max() <= 224
    assert ((hi + lo / 16 - exact).abs() <= 2**-8 * exact.abs() + 2**-13).all()
    if least < 10 * size:
        assert sqnr((hi + lo / 16)[30:], exact[30:]) > 45 and sqnr(hi[30:], exact[30:]) < 36
    with pytest.raises(AssertionError):
        fp8_factor.split_factor(fp8_factor.Factor(source, by, least), target[:, :32])


def test_a_factor_that_is_not_finite_stays_so():
    source = rows("normal", (16, 16))
    source[3, 4] = float("nan")
    target = torch.empty(16, 48, dtype=fp8.DTYPE)
    largest = fp8_factor.split_factor(fp8_factor.Factor(source, None, 1e-12), target)
    assert largest.isfinite() and target.float()[3, 4].isnan()
    source[3, 4] = float("inf")
    assert fp8_factor.split_factor(fp8_factor.Factor(source, None, 1e-12), target).isinf()
    assert target.float()[3, 4].isnan()


@pytest.mark.parametrize("kind", ["normal", "outlier columns", "one outlier", "zero rows"])
def test_products_forward_and_back(kind):
    """Both directions by one set of weights: what the two roundings leave, 28.5 dB."""
    x, w = rows(kind, (24, 256)), rows("normal", (64, 256)) * torch.logspace(-2, 0, 64)[:, None]
    dy = rows("gradients", (24, 64))
    weight = fp8.quantise_rows(w)
    scales = weight.scales.flatten()
    y = fp8_product.multiply(fp8.quantise_rows(x), weight.values, scales, torch.float32)
    assert sqnr(y, x.double() @ w.double().T) > 24
    turned = fp8_product.turn(weight.values, torch.empty(256, 64, dtype=fp8.DTYPE))
    dx = fp8_product.multiply(fp8.quantise_rows(dy, scales), turned, None, torch.float32)
    assert sqnr(dx, dy.double() @ w.double()) > 24
    # against the weights as they are held, the rounding of the gradient is all
    assert sqnr(dx, dy.double() @ weight.dense().double()) > 28


def test_a_scale_of_another_row_is_seen():
    x, weight = rows("normal", (24, 256)), fp8.quantise_rows(rows("normal", (64, 256)))
    wrong = weight.scales.flatten().roll(1)
    y = fp8_product.multiply(fp8.quantise_rows(x), weight.values, wrong, torch.float32)
    assert sqnr(y, x.double() @ weight.dense().double().T) < 20


@pytest.mark.parametrize("cast_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_gives_the_rows_of_its_output(dtype, cast_first):
    x, weight = rows("outlier columns", (6, 48), dtype), torch.rand(48).to(dtype)
    norm = RMSNorm(weight, 1e-5, 1.0, cast_first)
    quantised, t, h = fp8_norm.norm_rows(x, norm, keep_h=True)
    expected = rms_norm(x, *norm)
    assert t is None and torch.equal(h, expected) and sqnr(quantised.dense(), expected) > LEAST_DB
    assert fp8_norm.norm_rows(x, norm).h is None
    a = torch.randn(16, 48).to(dtype)
    raw = fp8.Margin(x @ (a * (weight + 1)).T, torch.ones(1), 224.0)
    ours, t, _ = fp8_norm.norm_rows(x, norm, raw)
    exact = rms_norm(x.double(), weight.double(), 1e-5, 1.0, False) @ a.double().T
    assert sqnr(t, exact) > (35 if dtype == torch.bfloat16 else 100)
    alone = fp8.quantise_rows(expected, None, fp8.Margin(t, torch.ones(1), 224.0))
    assert torch.equal(ours.values.view(torch.uint8), alone.values.view(torch.uint8))


def test_opcheck():
    x, by, m = rows("normal", (4, 32)), torch.rand(32), rows("normal", (4, 16))
    for arguments in ((x, by, m, torch.ones(1), 2.0), (x, None, None, None, 1.0)):
        torch.library.opcheck(torch.ops.pantheraml.fp8_quantise_rows, arguments)
    torch.library.opcheck(torch.ops.pantheraml.fp8_norm_rows, (x, torch.rand(32), 1e-5, 0.0, True))
    target = torch.empty(4, 96, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.pantheraml.fp8_split_factor, (x, None, 2.0, target))


def test_where_it_runs():
    assert fp8_product.why_no_fp8(torch.device("cpu")) is None
    assert "need an NVIDIA GPU" in (fp8_product.why_no_fp8(torch.device("meta")) or "")


@pytest.mark.parametrize(
    ("capability", "reason"), [((8, 0), "compute capability 8.0; FP8 products begin at 8.9"), ((8, 6), "8.6")]
)
def test_older_gpus_are_named(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An older GPU")
    assert reason in fp8_product.why_no_fp8.__wrapped__(torch.device("cuda", 0))
