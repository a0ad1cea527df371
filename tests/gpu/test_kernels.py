"""The Triton kernels beside attention and RMSNorm on a GPU: real sizes, every dtype, offsets past 2^31."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from pantheraml.kernels import accumulate, cross_entropy, layer_norm, rope, rope_qkv, swiglu
from pantheraml.kernels import linear_cross_entropy as head_op
from pantheraml.models.fused import apply_loss
from pantheraml.models.patching import PatchSet
from pantheraml.training.head import bind_head
from tests import tiny
from tests.kernels import layer_cases, layer_norm_cases
from tests.kernels.layer_cases import (
    Maker,
    check_add_norm,
    check_glu,
    check_rotate,
    check_rotate_qkv,
    check_trained_head_norms,
)
from tests.kernels.loss_cases import (
    BENDS,
    IGNORE,
    POOL,
    check_head,
    check_loss,
    make_head,
    make_logits,
    several,
)
from tests.kernels.test_cross_entropy import run as run_loss
from tests.kernels.test_layer_norm import run as run_layer_norm
from tests.kernels.test_linear_cross_entropy import run as run_head

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GPU = "cuda"


def makers(dtype, seeds=4, strided=True):
    return [Maker(dtype, GPU, seed, strided) for seed in range(seeds)]


# --- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "cap"), [*BENDS, (1.0, 30.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "layout"),
    [(1, 11, "contiguous"), (64, 128256, "contiguous"), (33, 8193, "sliced"), (9, 300, "transposed")],
)
def test_cross_entropy(rows, vocabulary, layout, dtype, scale, cap):
    pool = POOL if vocabulary < 10000 else 0  # more of the largest would fill a small GPU
    cases = several(make_logits, rows, vocabulary, dtype, GPU, layout, pool=pool)
    check_loss(run_loss, cases, scale, cap)


@pytest.mark.parametrize(("scale", "cap"), [(0.3, None), (1.0, 30.0)])
def test_the_only_token_costs_nothing(scale, cap):
    # A logit less itself, which compilers would fuse with the product it comes from.
    loss, dz = run_loss(*make_logits(9, 1, device=GPU), scale, cap)
    assert (loss == 0).all() and (dz == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, 3.0)])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(70, 256, 32000), (1, 64, 1000), (33, 48, 8193)])
def test_linear_log_probs(rows, width, vocabulary, scale, cap, trained, dtype, monkeypatch):
    monkeypatch.setattr(head_op, "_CHUNK_ELEMENTS", 32 * vocabulary)
    # As many rows as ours takes; in half precision stock's sum of their gradients would be worse than its product.
    piece = 32 if dtype == torch.float32 else None
    cases = several(make_head, rows, width, vocabulary, dtype, GPU)
    check_head(run_head, cases, scale, cap, trained, piece)


@pytest.mark.parametrize("trained", [False, True])
def test_linear_log_probs_of_an_8b_head(trained, monkeypatch):
    monkeypatch.setattr(head_op, "_CHUNK_ELEMENTS", 100 * 128256)
    check_head(run_head, [make_head(256, 4096, 128256, torch.bfloat16, GPU)], 1.0, None, trained)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_float32_head_computed_in_half_precision(dtype, monkeypatch):
    monkeypatch.setattr(head_op, "_CHUNK_ELEMENTS", 32 * 32000)
    case = make_head(100, 256, 32000, dtype, GPU, weight_dtype=torch.float32)
    check_head(partial(run_head, dtype=dtype), [case], 1.0, None, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", [True, False])
def test_products_are_summed_in_float32(dtype, inside, monkeypatch):
    if not inside:
        monkeypatch.setattr(accumulate, "_adds_inside", lambda *_: False)
    left, right = (torch.randn(500, 64, device=GPU, dtype=dtype) for _ in range(2))
    total = torch.randn(64, 64, device=GPU)
    exact = total.double() + left.T.double() @ right.double()
    accumulate.add_product(total, left.T, right)
    torch.testing.assert_close(total, exact.float(), rtol=1e-5, atol=1e-4)


def test_wrong_losses_are_seen():
    def wrong_loss(*arguments):
        loss, dz = run_loss(*arguments)
        return loss, dz * 1.02

    def wrong_head(*arguments):
        log_probs, dh, dw = run_head(*arguments)
        return log_probs, dh, dw * 1.02

    with pytest.raises(AssertionError, match="dz"):
        check_loss(wrong_loss, [make_logits(64, 1000, torch.bfloat16, GPU)], 1.0, None)
    with pytest.raises(AssertionError, match="dW"):
        check_head(wrong_head, [make_head(64, 64, 1000, torch.bfloat16, GPU)], 1.0, None, True)


def test_forbidden_tokens_and_labels_that_are_none():
    z, labels, g = make_logits(6, 9000, torch.bfloat16, GPU)
    z[:, :5000] = -torch.inf
    labels = torch.where(labels == IGNORE, IGNORE, 8000)
    check_loss(run_loss, [(z, labels, g)], 1.0, None)
    labels[:3] = torch.tensor([-7, 9000, 2**40])
    loss, _ = run_loss(z, labels, g)
    assert loss.isnan().tolist()[:3] == [True] * 3 and loss[3:].isfinite().all()


@pytest.mark.slow
def test_more_than_2_to_the_31_logits():
    rows, vocabulary = 17000, 128256
    z = torch.empty(rows, vocabulary, device=GPU, dtype=torch.bfloat16).normal_()
    labels = torch.randint(0, vocabulary, (rows,), device=GPU)
    g = torch.rand(rows, device=GPU)
    loss, dz = run_loss(z, labels, g)
    tail = slice(rows - 5, rows)
    part_loss, part_dz = run_loss(z[tail].clone(), labels[tail], g[tail])
    assert torch.equal(loss[tail], part_loss) and torch.equal(dz[tail], part_dz)
    del dz
    cross_entropy.score_rows(z, labels, 1.0, None, gradient=True)
    assert torch.allclose(z[tail] * g[tail, None], -part_dz, rtol=2**-6, atol=1e-6)


def head_run(bind, trained):
    """Loss, log-probabilities and gradients of a tiny model in float32 whose head was bound by ``bind``."""
    model = tiny.build_model().to(GPU)
    model.lm_head.weight.requires_grad_(trained)
    bind(model)
    ids = torch.arange(5, 53, device=GPU).reshape(2, 24)
    out = model(ids, labels=ids.masked_fill(ids % 7 == 0, IGNORE), fused_lm_head=True)
    out.loss.backward()
    return out, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("trained", [False, True])
def test_the_head_computes_what_trl_computes(trained):
    outputs = ("log_probs", "entropy", "is_top1")
    theirs, gradients = head_run(lambda model: add_fused_lm_head(model, outputs=outputs), trained)
    ours, our_gradients = head_run(lambda model: bind_head(model, PatchSet()), trained)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for one, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_model_that_is_given_labels(dtype):
    model = tiny.build_model().to(GPU, dtype)
    ids = torch.arange(5, 53, device=GPU).reshape(2, 24)
    labels = ids.masked_fill(ids % 7 == 0, IGNORE)

    def run():
        loss = model(input_ids=ids, labels=labels).loss
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    stock = run()
    patches = apply_loss(model, PatchSet())
    assert patches.report()[0].what.startswith("loss_function=")
    for one, other in zip(run(), stock, strict=True):
        scale = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(one, other, rtol=scale, atol=scale * other.abs().max().item())


# --- LayerNorm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((500, 4096), "contiguous"),
        ((3, 333), "contiguous"),
        ((1, 5120), "contiguous"),
        ((2, 64, 8, 128), "transposed"),
        ((50, 2000), "sliced"),
        ((50, 200), "strided"),
        ((4, 65536), "contiguous"),
        ((4, 70001), "contiguous"),
    ],
)
def test_layer_norm(shape, layout, dtype, biased):
    cases = layer_norm_cases.make_several(shape, dtype, layout, biased, GPU)
    layer_norm_cases.check(run_layer_norm, cases)


@pytest.mark.slow
def test_layer_norm_of_more_than_2_to_the_31_elements():
    rows, cols = 2**21 + 3, 1024
    weight, bias = torch.rand(2, cols, device=GPU, dtype=torch.bfloat16)
    x = torch.empty(rows, cols, device=GPU, dtype=torch.bfloat16).normal_()
    tail = slice(rows - 5, rows)
    y = layer_norm.layer_norm(x, weight, bias)
    assert torch.equal(y[tail], layer_norm.layer_norm(x[tail], weight, bias))
    backward = partial(torch.ops.pantheraml.layer_norm_backward, weight=weight, eps=1e-5, with_dw=False)
    assert torch.equal(backward(y, x)[0][tail], backward(y[tail], x[tail])[0])


# --- the kernels of a decoder layer ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, (0.0, True), (1.0, False)])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "width", "halves"),
    [
        (1000, 32, 128, 128, 2),
        (1, 8, 64, 64, 2),
        (77, 3, 80, 32, 1),
        (50, 4, 256, 256, 1),
        (50, 8, 128, None, 2),
    ],
)
def test_rotary_positions(tokens, heads, head_dim, width, halves, norm, dtype):
    make = makers(dtype, seeds=40 if tokens == 1 else 2)
    check_rotate(make, tokens, heads, head_dim, width, bias=True, norm=norm, halves=halves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, (0.0, True), (1.0, False)])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "width", "halves", "biased"),
    [
        (1000, (32, 8), 128, 128, 2, ""),
        (1, (8, 1), 64, 64, 2, "qkv"),
        (77, (3, 3), 80, 32, 1, "qkv"),
        (50, (4, 1), 256, 256, 1, "qk"),
        (50, (64, 8), 64, 64, 1, "qkv"),
        (33, (2, 1), 20, 12, 1, "v"),
    ],
)
def test_rotary_positions_of_q_k_and_v(tokens, heads, head_dim, width, halves, biased, norm, dtype):
    make = makers(dtype, seeds=40 if tokens == 1 else 12 if tokens < 100 else 2)
    check_rotate_qkv(make, tokens, heads, head_dim, width, biased=biased, norm=norm, halves=halves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "width", "halves"),
    [(1000, (32, 8), 128, 128, 2), (77, (3, 3), 80, 32, 1), (50, (4, 1), 256, 256, 1)],
)
def test_trained_head_norms(tokens, heads, head_dim, width, halves, norm, dtype):
    make = makers(dtype, seeds=4 if tokens > 100 else 12)
    check_trained_head_norms(make, tokens, heads, head_dim, width, norm=norm, halves=halves)


def test_q_k_and_v_are_one_launch():
    make = Maker(torch.bfloat16, GPU)
    widths, rotary = (256, 128, 128), rope.Rotary(make(50, 64), make(50, 64), 64)
    x, out, biases = make(50, 512), make(50, 512), [make(cols) for cols in widths]
    norms = (make.norm(64, 0.0, True), make.norm(64, 0.0, True))
    grads = tuple(t.unflatten(1, (-1, 64)) for t in make(50, 512).split(widths, dim=1))

    def run():
        rope_qkv.rotate_qkv_(x, widths, 64, rotary, biases, norms, out)
        rope_qkv.rotate_qkv_back(grads, rotary, out, norms, x)
        torch.cuda.synchronize()

    run()  # compiles
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profiler:
        run()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [event.name for event in on_gpu] == ["_rotate_qkv_kernel", "_rotate_qkv_back_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "cols"), [(500, 14336), (1, 7), (77, 333)])
def test_gated_activations(rows, cols, activation, dtype):
    check_glu(makers(dtype, seeds=POOL // cols if rows == 1 else 2), rows, cols, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize(("rows", "cols"), [(500, 4096), (1, 5120), (77, 333)])
def test_residual_and_norm(rows, cols, norm, dtype):
    check_add_norm(makers(dtype, seeds=40 if rows == 1 else 2), rows, cols, norm=norm)


@pytest.mark.parametrize(
    ("adapter", "place", "what", "check"),
    [
        ("adapt_rotate_back", None, "dx", lambda make: check_rotate(make, 77, 4, 64, 64)),
        ("adapt_rotate_qkv_back", None, "dx", lambda make: check_rotate_qkv(make, 77, (4, 2), 64, 64)),
        ("adapt_glu", None, "output", lambda make: check_glu(make, 77, 333, "gelu")),
        ("adapt_glu_back", 1, "du", lambda make: check_glu(make, 77, 333, "silu")),
        ("adapt_norm_back", 0, "dx", lambda make: check_add_norm(make, 77, 333)),
        ("adapt_trained_norm_back", 2, "dw", lambda make: check_add_norm(make, 77, 333)),
    ],
)
def test_a_wrong_kernel_is_seen(adapter, place, what, check, monkeypatch):
    right = getattr(layer_cases, adapter)

    def wrong(*arguments):
        result = right(*arguments)
        if place is None:
            return result * 1.02
        return tuple(t * 1.02 if index == place else t for index, t in enumerate(result))

    monkeypatch.setattr(layer_cases, adapter, wrong)
    with pytest.raises(AssertionError, match=what):
        check(makers(torch.bfloat16))


@pytest.mark.slow
def test_layers_of_more_than_2_to_the_31_elements():
    make = Maker(torch.bfloat16, GPU)
    norm = make.norm(4096, 0.0, True)
    rows = 2**19 + 5
    x, y = (torch.empty(rows, 4096, device=GPU, dtype=torch.bfloat16).normal_() for _ in range(2))
    tail = slice(rows - 5, rows)
    cos, sin = torch.rand(2, rows, 128, device=GPU, dtype=torch.bfloat16)
    widths = (2048, 1024, 1024)
    biases, norms = [make(n) for n in widths], (make.norm(128, 0.0, True), make.norm(128, 0.0, True))

    def run(x, y, cos, sin):
        rotary = rope.Rotary(cos, sin, 128)
        heads = y.unflatten(1, (-1, 128))
        yield rope.rotate_(x.clone(), 128, rotary)
        yield rope.rotate_back(heads, rotary, torch.empty_like(x))
        grads = heads.split((16, 8, 8), dim=1)
        yield rope_qkv.rotate_qkv_(x.clone(), widths, 128, rotary, biases, norms, torch.empty_like(x))
        yield rope_qkv.rotate_qkv_back(grads, rotary, torch.empty_like(x), norms, x)
        yield from layer_cases.adapt_add_norm(x, y, norm)
        yield from layer_cases.adapt_norm_back(x, y, x, norm)
        yield from layer_cases.adapt_trained_norm_back(x, y, x, norm)[:2]
        yield layer_cases.adapt_glu(x, y, "silu")
        yield from layer_cases.adapt_glu_back(x, y, y, "gelu")

    part = run(x[tail].clone(), y[tail].clone(), cos[tail].clone(), sin[tail].clone())
    for whole, end in zip(run(x, y, cos, sin), part, strict=True):
        assert torch.equal(whole[tail], end)


# --- operators ---------------------------------------------------------------------------------------------------


def operators(device):
    """Every operator with arguments for it."""
    ops, make = torch.ops.pantheraml, Maker(torch.bfloat16, device)
    g, u = (make(6, 48).requires_grad_() for _ in range(2))
    weight, bias = make(48).requires_grad_(), make(48).requires_grad_()
    angle = torch.cat([make(6, 4)] * 2, dim=-1)
    yield ops.glu, (g, u, "gelu")
    yield ops.rotate, (g, angle.cos(), angle.sin(), 8, 16, bias)
    yield ops.add_norm, (g, u, weight, 1e-5, 0.0, True)
    yield ops.layer_norm, (g, weight, bias, 1e-5)
    z, labels, _ = make_logits(6, 300, torch.bfloat16, device)
    yield ops.cross_entropy, (z.requires_grad_(), labels, 1.0, 3.0)
    h, head, labels, _ = make_head(6, 48, 300, torch.bfloat16, device)
    yield ops.linear_log_probs, (h.requires_grad_(), head, labels, 1.0, None, True)
    yield ops.linear_log_probs, (h.requires_grad_(), head.clone().requires_grad_(), labels, 1.0, None, False)


def test_opcheck():
    for op, arguments in operators(GPU):
        torch.library.opcheck(op, arguments)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    for (op, here), (_, there) in zip(operators("cuda:0"), operators("cuda:1"), strict=True):
        ours, theirs = op(*there), op(*here)
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
