"""The head that gives log-probabilities without logits, against the head in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pantheraml.models.patching import PatchSet
from pantheraml.training.head import bind_cpu_head, bind_head, why_not_fused
from tests import tiny

IDS = torch.arange(5, 53).reshape(2, 24)
LABELS = IDS.masked_fill(IDS % 7 == 0, -100)


def model_with(bind, family="llama", labels=LABELS, num_items=None):
    """Figures and gradients of one fused forward of an adapted model whose head is bound by ``bind``."""
    base = tiny.build_model(family)
    torch.manual_seed(1)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    patches = PatchSet()
    bind(base, patches)
    out = adapted(IDS, labels=labels, fused_lm_head=True, num_items_in_batch=num_items)
    out.loss.backward()
    gradients = [weight.grad.clone() for weight in adapted.parameters() if weight.requires_grad]
    patches.revert()
    assert "forward" not in vars(base)
    return out, gradients


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("num_items", [None, 100])
def test_figures_and_gradients_are_those_of_the_logits(family, num_items):
    ours, our_gradients = model_with(bind_head, family, num_items=num_items)
    plain, gradients = model_with(bind_cpu_head, family, num_items=num_items)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-5, atol=0)
    for name in ("log_probs", "entropy"):
        one, other = getattr(ours, name), getattr(plain, name)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.is_top1.bool() & plain.label_mask, plain.is_top1.bool())
    assert torch.equal(ours.label_mask, plain.label_mask)
    largest = max(gradient.abs().max() for gradient in gradients)
    assert largest > 0
    for one, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest.item())


def test_a_batch_without_labels_reaches_every_parameter():
    out, gradients = model_with(bind_head, labels=torch.full_like(IDS, -100))
    assert out.loss.item() == 0 and all(gradient.abs().max() == 0 for gradient in gradients)


def test_other_calls_go_to_the_forward_that_was_there():
    model = tiny.build_model().requires_grad_(False)
    calls = []
    model.forward = lambda *args, **kwargs: calls.append(kwargs)
    patches = PatchSet()
    bind_head(model, patches)
    model(IDS)
    model(IDS, labels=LABELS)
    model(IDS, labels=LABELS, shift_labels=LABELS, fused_lm_head=True)
    model(IDS, fused_lm_head=True)
    with torch.autocast("cpu", torch.bfloat16):  # float32 weights would be computed in another dtype
        model(IDS, labels=LABELS, fused_lm_head=True)
    assert [one["fused_lm_head"] for one in calls] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({}, "the head is trained"),
        ({"family": "cohere"}, "the logits are scaled"),
        ({"family": "mixtral", "output_router_logits": True}, "a loss of its own"),
    ],
)
def test_heads_that_are_left_to_trl(overrides, reason):
    overrides = dict(overrides)
    family = overrides.pop("family", "llama")
    if family == "cohere":
        from transformers import CohereConfig, CohereForCausalLM

        model = CohereForCausalLM(CohereConfig(**tiny._SIZES, logit_scale=0.25))
    else:
        model = tiny.build_model(family, **overrides)
    if reason != "the head is trained":
        model.get_output_embeddings().requires_grad_(False)
    assert reason in why_not_fused(model)


def test_heads_that_are_no_plain_matrix():
    model = tiny.build_model().requires_grad_(False)
    assert why_not_fused(model) is None
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCAB), requires_grad=False)
    assert why_not_fused(model) == "the head is no plain matrix"
    model.set_output_embeddings(None)
    assert why_not_fused(model) == "the head is no plain matrix"
