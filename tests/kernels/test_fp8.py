"""FP8 on a CPU: the plain paths in float8, how far they are from float64, and the custom ops."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import fp8, fp8_norm, fp8_product
from pantheraml.kernels.rms_norm import rms_norm
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


def test_parts_lie_side_by_side_under_one_scale():
    parts = [rows("normal", (5, n)) * n for n in (64, 16, 48)]
    by = [torch.rand(part.shape[1]) + 0.5 for part in parts]
    whole = torch.cat([part * factor for part, factor in zip(parts, by, strict=True)], dim=1)
    ours, alone = fp8.quantise_rows(parts, by), fp8.quantise_rows(whole)
    assert torch.equal(ours.scales, alone.scales)
    assert torch.equal(ours.values.float(), alone.values.float())


@pytest.mark.parametrize("kind", ["normal", "outlier columns", "one outlier", "zero rows"])
def test_products_forward_and_back(kind):
    """Both directions by one set of weights: what the two roundings leave, 28.5 dB."""
    x, w = rows(kind, (24, 256)), rows("normal", (64, 256)) * torch.logspace(-2, 0, 64)[:, None]
    dy = rows("gradients", (24, 64))
    weight = fp8.quantise_rows(w)
    scales = weight.scales.flatten()
    y = fp8_product.multiply(fp8.quantise_rows(x), weight.values, scales, torch.float32)
    assert sqnr(y, x.double() @ w.double().T) > 24
    turned = fp8_product.turn([weight.values], torch.empty(256, 64, dtype=fp8.DTYPE))
    dx = fp8_product.multiply(fp8.quantise_rows(dy, [scales]), turned, None, torch.float32)
    assert sqnr(dx, dy.double() @ w.double()) > 24
    # against the weights as they are held, the rounding of the gradient is all
    assert sqnr(dx, dy.double() @ weight.dense().double()) > 28


def test_a_scale_of_another_row_is_seen():
    x, weight = rows("normal", (24, 256)), fp8.quantise_rows(rows("normal", (64, 256)))
    wrong = weight.scales.flatten().roll(1)
    y = fp8_product.multiply(fp8.quantise_rows(x), weight.values, wrong, torch.float32)
    assert sqnr(y, x.double() @ weight.dense().double().T) < 20


def test_an_output_that_is_given():
    x, weight = fp8.quantise_rows(rows("normal")), fp8.quantise_rows(rows("normal", (32, 200)))
    whole = torch.zeros(12, 40)
    out = whole[:, 4:36]
    given = fp8_product.multiply(x, weight.values, weight.scales.flatten(), out=out)
    assert given is out and (whole[:, :4] == 0).all() and (whole[:, 36:] == 0).all()
    assert torch.equal(out, fp8_product.multiply(x, weight.values, weight.scales.flatten(), torch.float32))


@pytest.mark.parametrize("cast_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_gives_the_rows_of_its_output(dtype, cast_first):
    x, weight = rows("outlier columns", (6, 48), dtype), torch.rand(48).to(dtype)
    quantised, h = fp8_norm.norm_rows(x, weight, 1e-5, 1.0, cast_first, keep_h=True)
    expected = rms_norm(x, weight, 1e-5, 1.0, cast_first)
    assert torch.equal(h, expected) and sqnr(quantised.dense(), expected) > LEAST_DB
    assert fp8_norm.norm_rows(x, weight, 1e-5, 1.0, cast_first)[1] is None


def test_opcheck():
    parts = [rows("normal", (4, 32)), rows("normal", (4, 16))]
    by = [torch.rand(32), torch.rand(16)]
    for arguments in ((parts, by), (parts[:1], [])):
        torch.library.opcheck(torch.ops.pantheraml.fp8_quantise_rows, arguments)
    arguments = (parts[0], torch.rand(32), 1e-5, 0.0, True)
    torch.library.opcheck(torch.ops.pantheraml.fp8_norm_rows, arguments)


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
