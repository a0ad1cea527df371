"""Frozen weights of few bits on a GPU: 4-bit ones as bitsandbytes unpacks them, FP8 against float64 and PyTorch."""

from __future__ import annotations

import pytest
import torch

from pantheraml import FastLanguageModel
from pantheraml.kernels import fp8, fp8_factor, fp8_norm, fp8_product, nf4
from pantheraml.kernels.rms_norm import RMSNorm, rms_norm
from pantheraml.kernels.unpack_table import UnpackTable
from pantheraml.models.fp8 import Fp8Linear
from pantheraml.models.fused.fp8_stack import Fp8Stack
from pantheraml.models.fused.projection import Projection
from tests import tiny
from tests.kernels.fp8_cases import KINDS, LEAST_DB, rows, sqnr
from tests.kernels.nf4_cases import (
    SHAPES,
    TABLES,
    check_odd_tables,
    check_table,
    packed,
    spread,
    stacks,
    theirs,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "blocksize"), [*SHAPES, ((1024, 4096), 64), ((4096, 1792), 128)])
def test_unpacking_equals_bitsandbytes(shape, blocksize, dtype, nested, kind):
    data, state = packed(shape, dtype, blocksize, kind, nested, device="cuda")
    expected = theirs(data, state)
    assert torch.equal(nf4.unpack_4bit(data, state), expected)
    out, whole = spread(shape, dtype, "cuda", gap=8)
    assert torch.equal(nf4.unpack_4bit(data, state, out), expected) and (whole[:, shape[1] :] == 77).all()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_stored_as_floats(storage):
    data, state = packed((256, 512), torch.bfloat16, device="cuda", storage=storage)
    assert torch.equal(nf4.unpack_4bit(data, state), theirs(data, state))


def test_a_wrong_table_is_seen():
    data, state = packed((128, 192), torch.bfloat16, device="cuda")
    expected = theirs(data, state)
    state.code = state.code.roll(1)
    assert not torch.equal(nf4.unpack_4bit(data, state), expected)


def test_more_than_2_to_the_31_values():
    rows, cols = 2**19 + 4, 4096
    data, state = packed((256, cols), torch.bfloat16, device="cuda", nested=False)
    big = data.view(-1).repeat(rows // 256 + 1)[: rows * cols // 2]
    state.absmax = state.absmax.repeat(rows // 256 + 1)[: rows * cols // 64].contiguous()
    state.shape = torch.Size((rows, cols))
    out = nf4.unpack_4bit(big, state)
    state.shape = torch.Size((256, cols))
    part = theirs(data, state)
    assert torch.equal(out[-260:-4], part) and torch.equal(out[-4:], part[:4])


def test_unpacking_opcheck():
    data, state = packed((64, 128), torch.bfloat16, device="cuda")
    out = torch.empty(64, 128, dtype=torch.bfloat16, device="cuda")
    torch.library.opcheck(torch.ops.pantheraml.unpack_4bit, (out, data, *nf4.read_state(state)))


LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shapes", [*TABLES, [(64, 96), (33, 160), (1024, 4096), (4096, 1792)]])
@pytest.mark.parametrize("margin", [0, 64])
def test_a_table_equals_bitsandbytes(shapes, dtype, nested, kind, margin):
    assert check_table(shapes, dtype, "cuda", margin, nested=nested, kind=kind).is_one_launch


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("dtype", "blocksize"), [(torch.bfloat16, 64), (torch.float16, 4096)])
def test_a_table_of_a_whole_layer(dtype, blocksize, nested):
    assert check_table(LAYER, dtype, "cuda", nested=nested, blocksize=blocksize).is_one_launch


def test_a_table_of_many_weights():
    # more entries than a warp has lanes, so the search for one's own crosses warps
    assert check_table([(8 * n, 64) for n in range(1, 300)], torch.bfloat16, "cuda").is_one_launch


def test_odd_tables_are_written_one_by_one():
    check_odd_tables(torch.bfloat16, "cuda")


def test_a_table_sees_what_changes_inside():
    weights = [packed(shape, torch.bfloat16, device="cuda") for shape in TABLES[1]]
    targets, _ = stacks(TABLES[1], torch.bfloat16, "cuda")
    table, before = UnpackTable(weights, targets), theirs(*weights[1])
    for _ in range(3):  # the second launch and those after it take what the first has compiled
        weights[1][1].code.copy_(weights[1][1].code.roll(1))
        table.write()
        for target, weight in zip(targets, weights, strict=True):
            assert torch.equal(target, nf4.unpack_4bit(*weight))
    assert not torch.equal(targets[1], before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_table_on_a_gpu_that_is_not_the_current_one(order):
    tables = []
    for device in order:
        with torch.cuda.device(device):
            weights = [packed(shape, torch.bfloat16, device=f"cuda:{device}") for shape in TABLES[1]]
            targets, _ = stacks(TABLES[1], torch.bfloat16, f"cuda:{device}")
            tables.append((UnpackTable(weights, targets), targets, [theirs(*weight) for weight in weights]))
            torch.cuda.synchronize()
    with torch.cuda.device(0):
        for table, targets, expected in tables * 2:
            table.write()
            torch.cuda.synchronize(targets[0].device)
            assert all(torch.equal(*pair) for pair in zip(targets, expected, strict=True))
            for target in targets:
                target.zero_()
        assert torch.cuda.current_device() == 0


# --- FP8 ------------------------------------------------------------------------------------------------------

needs_fp8 = pytest.mark.skipif(
    fp8_product.why_no_fp8(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    is not None
    or not torch.cuda.is_available(),
    reason="needs a GPU of compute capability 8.9 or newer",
)


def on_cpu(rows_of):
    return rows_of.values.cpu().float(), rows_of.scales.cpu()


@needs_fp8
def test_this_gpu_takes_fp8_and_weights_that_are_views():
    device = torch.device("cuda", torch.cuda.current_device())
    assert fp8_product.why_no_fp8(device) is None
    print("products read views:", fp8_product.takes_views(device))


@needs_fp8
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 200), (1, 16), (300, 14336), (7, 57344), (5, 66000)])
@pytest.mark.parametrize("margin", [0, 5])
def test_rows_equal_those_of_plain_pytorch(kind, dtype, shape, margin):
    x = rows(kind, shape, dtype)
    by = torch.rand(shape[1]) + 0.5
    extra = (
        fp8.Margin(rows("normal", (shape[0], margin), dtype), torch.tensor([30.0]), 1.0) if margin else None
    )
    there = fp8.Margin(extra.values.cuda(), extra.largest.cuda(), 1.0) if margin else None
    for factor in (None, by):
        ours = on_cpu(fp8.quantise_rows(x.cuda(), None if factor is None else factor.cuda(), there))
        exact = fp8.quantise_rows(x, factor, extra)
        torch.testing.assert_close(ours[1], exact.scales, rtol=1e-6, atol=0, equal_nan=True)
        # A product that falls on the boundary of two e4m3 numbers may go either way: one unit, rarely.
        mine, values = ours[0][:, : shape[1]], exact.values.float()[:, : shape[1]]
        assert (mine != values).float().mean() < 2e-3
        assert ((mine - values).abs() <= 0.126 * values.abs().clamp(min=2**-6) + 2**-9).all()
        if margin:  # its parts may be split otherwise, their sum may not
            wholes = []
            for whole in (ours[0], exact.values.float()):
                hi, _, lo = whole[:, shape[1] :].split(margin, dim=1)
                wholes.append(hi + lo / 16)
            assert (wholes[0] - wholes[1]).abs().max() <= 2**-7 * wholes[1].abs().max() + 2**-12


@needs_fp8
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite(bad):
    x = rows("normal", (64, 512), torch.bfloat16, "cuda")
    x[4, 7] = bad
    weight = fp8.quantise_rows(rows("normal", (128, 512), device="cuda"))
    y = fp8_product.multiply(fp8.quantise_rows(x), weight.values, weight.scales.flatten())
    assert y[4].isnan().all() and y[torch.arange(64) != 4].isfinite().all()


def flat(x):
    """All rows as one: of a thousand rows of 48 numbers the worst one says more about chance."""
    return x.reshape(1, -1)


@needs_fp8
@pytest.mark.parametrize("tokens", [1, 3, 17, 1000, 8191])
@pytest.mark.parametrize(("n", "k"), [(6144 + 16, 4096 + 144), (4096, 14336 + 48), (48, 80)])
def test_products_both_ways(tokens, n, k):
    torch.manual_seed(0)
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(n, k, device="cuda") * torch.logspace(-2, 0, n, device="cuda")[:, None]
    dy = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) * 1e-6
    weight = fp8.quantise_rows(w)
    scales = weight.scales.flatten()
    xq = fp8.quantise_rows(x)
    y = fp8_product.multiply(xq, weight.values, scales)
    # Beside bfloat16's rounding of the result: the tensor core keeps some 14 bits of its sums.
    assert sqnr(y, xq.dense() @ weight.dense().T) > 30 and sqnr(flat(y), flat(x.double() @ w.double().T)) > 24
    turned = fp8_product.turn(weight.values, torch.empty(k, n, dtype=fp8.DTYPE, device="cuda"))
    assert torch.equal(turned.view(torch.uint8), weight.values.view(torch.uint8).T)
    dyq = fp8.quantise_rows(dy, scales)
    dx = fp8_product.multiply(dyq, turned)
    assert sqnr(dx, dyq.dense() @ weight.values.float()) > 30
    assert sqnr(flat(dx), flat(dy.double() @ w.double())) > 24


@needs_fp8
@pytest.mark.parametrize("keep_h", [True, False])
@pytest.mark.parametrize("shape", [(300, 4096), (5, 100)])
def test_the_quantised_norm(shape, keep_h):
    x = rows("outlier columns", shape, torch.bfloat16, "cuda")
    weight = torch.rand(shape[1], device="cuda", dtype=torch.bfloat16) + 0.5
    norm = RMSNorm(weight, 1e-5)
    a = torch.randn(48, shape[1], device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5
    raw = fp8.Margin(x @ (a * weight).T, torch.ones(1, device="cuda"), 224.0)
    expected = rms_norm(x, *norm)
    found = fp8_norm.norm_rows(x, norm, raw)
    assert sqnr(found.t, expected.double() @ a.double().T) > 35
    margin = found.rows.dense()[:, shape[1] :].split(48, dim=1)
    assert sqnr(margin[0] + margin[2] / 16, found.t) > 40 and sqnr(margin[1] * 16, found.t) > 26
    quantised, _, h = fp8_norm.norm_rows(x, norm, None, keep_h)
    assert sqnr(quantised.dense(), expected) > LEAST_DB and (h is None) != keep_h
    if h is not None:
        torch.testing.assert_close(h, expected, rtol=2**-7, atol=0)


@needs_fp8
def test_split_factors():
    source = rows("normal", (4096, 48), torch.bfloat16) * 1e-3
    by, target = torch.rand(4096) + 0.1, torch.empty(4096, 144, dtype=fp8.DTYPE)
    largest = fp8_factor.split_factor(fp8_factor.Factor(source, by, 1e-12), target)
    there = torch.empty(4096, 150, dtype=torch.uint8, device="cuda").view(fp8.DTYPE)[:, :144]
    ours = fp8_factor.split_factor(fp8_factor.Factor(source.cuda(), by.cuda(), 1e-12), there)
    torch.testing.assert_close(ours.cpu(), largest, rtol=1e-6, atol=0)
    whole = [t.cpu().float()[:, :48] + t.cpu().float()[:, 48:96] / 16 for t in (there, target)]
    assert sqnr(*whole) > 50


@needs_fp8
def test_fp8_opcheck():
    x, by = rows("normal", (16, 64), torch.bfloat16, "cuda"), torch.rand(64, device="cuda")
    arguments = (x, by, x[:, :16].contiguous(), torch.ones(1, device="cuda"), 2.0)
    torch.library.opcheck(torch.ops.pantheraml.fp8_quantise_rows, arguments)
    torch.library.opcheck(torch.ops.pantheraml.fp8_norm_rows, (x, by, 1e-5, 0.0, True))


@needs_fp8
@pytest.mark.parametrize("ranks", [(16, 16, 16), (0, 0, 0), (8, 0, 64)])
@pytest.mark.parametrize("kept", [True, False])
def test_a_stack_on_the_gpu(ranks, kept):
    """Base and LoRA together, against float64 on what is held; LoRA alone as exactly as in bfloat16."""
    torch.manual_seed(0)
    sizes, width, tokens = (1024, 256, 256), 1024, 777
    layers = [Fp8Linear(width, n, False, "cuda", torch.bfloat16).quantise_() for n in sizes]
    for layer in layers:
        layer.keeps_turned = kept
    parts = tuple(
        Projection(layer, torch.randn(r, width, device="cuda") / 32 if r else None,
                   torch.randn(n, r, device="cuda") * 0.01 if r else None, 2.0 if r else 0.0)
        for layer, n, r in zip(layers, sizes, ranks, strict=True)
    )  # fmt: skip
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(tokens, sum(sizes), device="cuda", dtype=torch.bfloat16) * 1e-5
    dense = [layer.dequantised().double() for layer in layers]
    full = torch.cat([
        w if part.a is None else w + part.scale * part.b.double() @ part.a.double()
        for w, part in zip(dense, parts, strict=True)
    ])  # fmt: skip
    bound = Fp8Stack().bind(parts)
    for _ in range(2):
        assert sqnr(bound.product(x).y, x.double() @ full.T) > 25
        assert sqnr(bound.input_gradient(dy)[0], dy.double() @ full) > 25
    y = layers[0](x)  # the stock forward, whose weight is a view of the stack now
    assert sqnr(y, x.double() @ dense[0].T) > 25


@needs_fp8
def test_peft_merges_nothing_into_fp8():
    linear = Fp8Linear(64, 48, False, "cuda").quantise_()
    with pytest.raises((RuntimeError, NotImplementedError)):
        linear.weight.data += torch.randn(48, 64, device="cuda")
    moved = linear.to(torch.bfloat16).cpu().cuda()
    assert moved.weight.dtype == fp8.DTYPE and moved.weight_scale.dtype == torch.float32


@needs_fp8
def test_fp8_trains_as_bf16_does(tmp_path):
    """A tiny model: the loss after 40 steps within 1 % of bf16's, fused and not; benchmarks/fp8_loss.py is longer."""
    folder = tiny.save_checkpoint(tmp_path / "base", hidden_size=128, intermediate_size=256)
    ids = torch.randint(5, 400, (8, 64), generator=torch.Generator().manual_seed(3)).cuda()
    losses = {}
    for name, flags in {
        "bf16": dict(load_in_16bit=True), "fp8": dict(load_in_fp8=True), "stock": dict(load_in_fp8=True, kernels="off"),
    }.items():  # fmt: skip
        model, _ = FastLanguageModel.from_pretrained(str(folder), 64, **flags)
        model = FastLanguageModel.get_peft_model(model, r=16).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(40):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = loss.item()
    print(losses)
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.01)
    assert losses["stock"] == pytest.approx(losses["bf16"], rel=0.01)
