"""Cross entropy of given logits on CPU: the plain path, and its custom op."""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ConfigError
from pantheraml.kernels import cross_entropy as op
from tests.kernels.loss_cases import BENDS, IGNORE, check_loss, differentiate, make_logits, several
from tests.references import cross_entropy as reference


def run(z, labels, g, scale=1.0, cap=None):
    return differentiate(lambda z: op.cross_entropy(z, labels, scale=scale, softcap=cap), (z,), g)


@pytest.mark.parametrize(("scale", "cap"), BENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "layout"),
    [(1, 11, "contiguous"), (37, 1000, "sliced"), (6, 8193, "transposed"), (9, 1, "contiguous")],
)
def test_errors_are_at_most_twice_those_of_stock_pytorch(rows, vocabulary, layout, dtype, scale, cap):
    check_loss(run, several(make_logits, rows, vocabulary, dtype, layout=layout), scale, cap)


def test_rows_that_do_not_count():
    z, labels, g = make_logits(12, 40)
    loss, dz = run(z, labels, g)
    left_out = labels == IGNORE
    assert 0 < left_out.sum() < 12
    assert (loss[left_out] == 0).all() and (dz[left_out] == 0).all() and (loss[~left_out] > 0).all()
    nothing = run(z, torch.full_like(labels, IGNORE), g)
    assert all((t == 0).all() for t in nothing)


def test_forbidden_tokens():
    z, labels, g = make_logits(8, 40)
    z[:, ::2] = -torch.inf
    labels = torch.full_like(labels, 3)
    check_loss(run, [(z, labels, g)], 1.0, None)
    assert (run(z, labels, g)[1][:, ::2] == 0).all()


def test_the_logits_stay_as_they_are_and_the_backward_can_be_repeated():
    z, labels, g = make_logits(8, 40)
    before, z = z.clone(), z.requires_grad_()
    loss = op.cross_entropy(z, labels)
    first = torch.autograd.grad(loss, z, g, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, z, g)[0], first) and torch.equal(z.detach(), before)


def test_no_rows():
    z = torch.empty(0, 8, requires_grad=True)
    loss = op.cross_entropy(z, torch.empty(0, dtype=torch.long))
    loss.sum().backward()
    assert loss.shape == (0,) and z.grad.shape == (0, 8)


def test_shapes_that_do_not_fit():
    with pytest.raises(ConfigError, match="Logits are"):
        op.cross_entropy(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ConfigError, match="labels of shape"):
        op.cross_entropy(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))


def without_slope(z, labels, g, scale, cap):
    """The gradient of a soft-capped loss that forgets the cap's slope."""
    p = reference.bent(z.double(), scale, cap).softmax(-1)
    d = p - torch.nn.functional.one_hot(labels.clamp(min=0), z.shape[1])
    return run(z, labels, g, scale, cap)[0], (d * g[:, None] * (labels != IGNORE)[:, None]).to(z.dtype)


def without_cap(z, labels, g, scale, cap):
    return run(z, labels, g, scale)


@pytest.mark.parametrize(("wrong", "what"), [(without_slope, "dz"), (without_cap, "loss")])
def test_the_yardstick_refuses_a_wrong_kernel(wrong, what):
    cases = [make_logits(40, 300, torch.bfloat16)]
    check_loss(run, cases, 1.0, 3.0)
    with pytest.raises(AssertionError, match=what):
        check_loss(wrong, cases, 1.0, 3.0)


@pytest.mark.parametrize(("scale", "cap"), BENDS)
def test_opcheck(scale, cap):
    z, labels, g = make_logits(6, 20)
    torch.library.opcheck(torch.ops.pantheraml.cross_entropy, (z.requires_grad_(), labels, scale, cap))
    sums = torch.ops.pantheraml.cross_entropy(z.detach(), labels, scale, cap)[1]
    arguments = (g, z.detach(), labels, sums, scale, cap)
    torch.library.opcheck(torch.ops.pantheraml.cross_entropy_backward, arguments)
