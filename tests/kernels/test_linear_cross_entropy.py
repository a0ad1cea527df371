"""Log-probabilities from hidden states on CPU: values and gradients, frozen and trained heads, and the ops."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pantheraml.errors import ConfigError
from pantheraml.kernels import linear_cross_entropy as op
from pantheraml.kernels.accumulate import add_product
from tests.kernels.loss_cases import BENDS, check_head, make_head, several
from tests.references import cross_entropy as reference

SHAPES = [(1, 16, 11), (37, 32, 1000), (20, 64, 4097), (64, 16, 512)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(h, weight, labels, g, scale=1.0, cap=None, trained=True, dtype=None):
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_(trained)
    scores = op.linear_log_probs(h, weight, labels, scale=scale, softcap=cap, dtype=dtype)
    leaves = (h, weight) if trained else (h,)
    return scores.log_probs.detach(), *torch.autograd.grad(scores.log_probs, leaves, g)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(op, "_CHUNK_ELEMENTS", 33_000)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "cap"), BENDS)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), SHAPES)
def test_errors_are_at_most_twice_those_of_stock_pytorch(rows, width, vocabulary, scale, cap, dtype, trained):
    check_head(run, several(make_head, rows, width, vocabulary, dtype), scale, cap, trained)


@pytest.mark.parametrize(("scale", "cap"), BENDS)
def test_entropy_and_most_likely_token(scale, cap):
    h, weight, labels, _ = make_head(37, 32, 1000)
    scores = op.linear_log_probs(h, weight, labels, scale=scale, softcap=cap)
    _, entropy, is_top1 = reference.scores(h.double() @ weight.double().T, labels, scale, cap)
    torch.testing.assert_close(scores.entropy, entropy.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.is_top1, is_top1.float()) and 0 < is_top1.sum() < 37


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_computed_in_half_precision(dtype):
    h, weight, labels, g = make_head(40, 32, 500, dtype, weight_dtype=torch.float32)
    compute = partial(run, dtype=dtype)
    assert compute(h, weight, labels, g)[2].dtype is torch.float32
    check_head(compute, [(h, weight, labels, g)], 1.0, None, True)


def test_small_gradients_do_not_vanish_in_float16():
    h, weight, labels, g = make_head(40, 32, 500, torch.float16)
    whole, small = (run(h, weight.float(), labels, g * f, dtype=torch.float16) for f in (1.0, 2.0**-20))
    assert torch.equal(small[2] * 2.0**20, whole[2]) and whole[2].abs().max() > 0
    nothing = run(h, weight, labels, torch.zeros_like(g))
    assert (nothing[1] == 0).all() and (nothing[2] == 0).all()


def test_a_trained_head_with_hidden_states_that_need_no_gradient():
    h, weight, labels, g = make_head(8, 16, 50)
    leaf = weight.clone().requires_grad_()
    (dw,) = torch.autograd.grad(op.linear_log_probs(h, leaf, labels).log_probs, leaf, g)
    assert torch.equal(dw, run(h, weight, labels, g)[2])


def test_the_backward_can_be_repeated():
    h, weight, labels, g = make_head(30, 16, 500)
    for trained in (False, True):
        h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_(trained)
        scores = op.linear_log_probs(h, weight, labels)
        first = torch.autograd.grad(scores.log_probs, h, g, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(scores.log_probs, h, g)[0], first)


def test_no_rows_and_no_gradient():
    h, weight, labels, _ = make_head(4, 16, 50)
    empty = op.linear_log_probs(h[:0].requires_grad_(), weight.requires_grad_(), labels[:0])
    empty.log_probs.sum().backward()
    assert empty.log_probs.shape == (0,) and torch.equal(weight.grad, torch.zeros_like(weight))
    with torch.no_grad():
        assert not op.linear_log_probs(h, weight, labels).log_probs.requires_grad
    assert not op.linear_log_probs(h.requires_grad_(), weight, labels).entropy.requires_grad


def test_shapes_that_do_not_fit():
    h, weight, labels, _ = make_head(4, 16, 50)
    for wrong in ((h[None], weight, labels), (h[:, 1:], weight, labels), (h, weight, labels[1:])):
        with pytest.raises(ConfigError, match="Flatten the batch"):
            op.linear_log_probs(*wrong)


def half_precision_sum(total, left, right):
    total.copy_((total.bfloat16() + (left @ right).bfloat16()).float())


def without_rows(total, left, right):
    total.copy_(left.float() @ right.float())


@pytest.mark.parametrize("wrong", [half_precision_sum, without_rows])
def test_the_yardstick_refuses_a_wrong_sum_over_chunks(wrong, monkeypatch):
    # All rows alike but for noise: the sum grows with the chunks, and with it what a narrow one loses.
    h, weight, labels, g = make_head(2000, 16, 50, torch.bfloat16, weight_dtype=torch.float32)
    h, labels, g = (h + 2).to(h.dtype), labels % 3, g.abs()
    monkeypatch.setattr(op, "_CHUNK_ELEMENTS", 20 * 50)
    compute, cases = partial(run, dtype=h.dtype), [(h, weight, labels, g)]
    check_head(compute, cases, 1.0, None, True)
    monkeypatch.setattr(op, "add_product", wrong)
    with pytest.raises(AssertionError, match="dW"):
        check_head(compute, cases, 1.0, None, True)


@pytest.mark.parametrize("trained", [False, True])
def test_the_yardstick_refuses_wrong_labels(trained):
    def wrong(h, weight, labels, *rest):
        return run(h, weight, (labels + 1) % 50, *rest)

    with pytest.raises(AssertionError, match="log_probs"):
        check_head(wrong, [make_head(8, 16, 50)], 1.0, None, trained)


@pytest.mark.parametrize("with_dh", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (2.0, 5.0)])
def test_opcheck(scale, cap, trained, with_dh):
    h, weight, labels, g = make_head(7, 16, 3000)
    forward, backward = torch.ops.pantheraml.linear_log_probs, torch.ops.pantheraml.linear_log_probs_backward
    sums = forward(h, weight, labels, scale, cap, False)[3]
    torch.library.opcheck(backward, (g, h, weight, labels, sums, scale, cap, trained))
    leaves = (h.requires_grad_(), weight.requires_grad_(trained))
    torch.library.opcheck(forward, (*leaves, labels, scale, cap, with_dh))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_summed_in_float32(dtype):
    left, right = torch.randn(20, 7).to(dtype), torch.randn(20, 5).to(dtype)
    total = torch.randn(7, 5)
    expected = total.double() + left.double().T @ right.double()
    add_product(total, left.T, right)
    torch.testing.assert_close(total, expected.float(), rtol=1e-6, atol=1e-6)
