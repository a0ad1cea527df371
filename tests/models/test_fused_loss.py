"""The loss of ``model(labels=...)`` computed by the fused operation, against transformers' own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from pantheraml.models.fused import apply_loss
from pantheraml.models.patching import PatchSet
from tests import tiny

IDS = torch.arange(5, 53).reshape(2, 24)
LABELS = IDS.masked_fill(IDS % 7 == 0, -100)
CALLS = {
    "mean": dict(labels=LABELS),
    "sum over items": dict(labels=LABELS, num_items_in_batch=torch.tensor(100)),
    "a plain number of items": dict(labels=LABELS, num_items_in_batch=100),
    "shifted by the caller": dict(labels=LABELS, shift_labels=LABELS.roll(1, 1)),
    "another label that does not count": dict(labels=LABELS.masked_fill(LABELS < 0, 0), ignore_index=0),
}


def loss_and_gradients(model, **call):
    loss = model(input_ids=IDS, **call).loss
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_loss_and_gradients_are_those_of_transformers(family, call):
    model = tiny.build_model(family)
    expected, gradients = loss_and_gradients(model, **CALLS[call])
    patches = apply_loss(model, PatchSet(), on_cpu=True)
    assert [change.path for change in patches.report()] == [type(model).__name__]
    loss, ours = loss_and_gradients(model, **CALLS[call])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    largest = max(gradient.abs().max() for gradient in gradients)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest.item())
    patches.revert()
    assert model.loss_function is ForCausalLMLoss
    assert torch.equal(loss_and_gradients(model, **CALLS[call])[0], expected)


def test_no_label_at_all_is_nan_as_in_transformers():
    model = tiny.build_model()
    apply_loss(model, PatchSet(), on_cpu=True)
    assert model(input_ids=IDS, labels=torch.full_like(IDS, -100)).loss.isnan()


def test_copies_and_pickles_keep_the_loss():
    model = tiny.build_model()
    apply_loss(model, PatchSet(), on_cpu=True)
    expected = model(input_ids=IDS, labels=LABELS).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.loss_function is model.loss_function is not ForCausalLMLoss
        assert torch.equal(other(input_ids=IDS, labels=LABELS).loss, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_what_stays():
    model = tiny.build_model()
    patches = apply_loss(model, PatchSet())
    assert patches.report() == [("loss", "skipped", "Triton needs a GPU, the model is on cpu")]
    model.loss_function = lambda **_: None
    patches = apply_loss(model, PatchSet(), on_cpu=True)
    assert patches.report() == [("loss", "skipped", "the model has a loss of its own")]
