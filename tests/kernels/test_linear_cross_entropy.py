"""Log-probabilities from hidden states: values and gradient against float64, with and without soft-cap and scale."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import linear_cross_entropy as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(h, weight, labels, scale, cap):
    """The same in float64, logits and all."""
    z = h.double() @ weight.double().T * scale
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    log_p = z.log_softmax(-1)
    picked = log_p.gather(-1, labels[:, None])[:, 0]
    return picked, -(log_p.exp() * log_p).sum(-1), (log_p.argmax(-1) == labels).float()


def inputs(rows, width, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + vocabulary)
    h = torch.randn(rows, width, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(DEVICE, dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator).to(DEVICE)
    with torch.no_grad():
        labels[::3] = (h.float() @ weight.float().T).argmax(-1)[::3]  # some are the most likely token
    return h, weight, labels


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 5.0)])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 16, 11), (37, 32, 1000), (5, 64, 8193), (64, 16, 512)]
)
def test_values_and_gradient(rows, width, vocabulary, scale, cap, monkeypatch):
    monkeypatch.setattr(op, "_CHUNK_ELEMENTS", 10 * vocabulary)  # several chunks
    h, weight, labels = inputs(rows, width, vocabulary)
    above = torch.randn(rows, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ours, theirs = h.clone().requires_grad_(), h.double().requires_grad_()
    scores = op.linear_log_probs(ours, weight, labels, scale=scale, softcap=cap)
    expected = reference(theirs, weight, labels, scale, cap)
    for value, truth in zip(scores, expected, strict=True):
        assert (value - truth).abs().max() <= 2e-5 * truth.abs().max().clamp(min=1)
    (scores.log_probs * above).sum().backward()
    (expected[0] * above).sum().backward()
    assert (ours.grad - theirs.grad).abs().max() <= 2e-5 * theirs.grad.abs().max()


def test_the_wrong_label_fails_the_same_assert():
    h, weight, labels = inputs(8, 16, 50)
    scores = op.linear_log_probs(h, weight, (labels + 1) % 50)
    assert (scores.log_probs - reference(h, weight, labels, 1.0, None)[0]).abs().max() > 1e-2


def test_no_rows_and_no_gradient():
    h, weight, labels = inputs(4, 16, 50)
    empty = op.linear_log_probs(h[:0].requires_grad_(), weight, labels[:0])
    assert empty.log_probs.shape == (0,) and empty.log_probs.requires_grad
    with torch.no_grad():
        assert not op.linear_log_probs(h, weight, labels).log_probs.requires_grad
    with pytest.raises(ValueError, match="no gradient of the head"):
        op.linear_log_probs(h, weight.requires_grad_(), labels)
