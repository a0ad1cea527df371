"""The head that gives log-probabilities without logits, against the head in plain PyTorch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pantheraml.models.patching import PatchSet
from pantheraml.training.head import bind_cpu_head, bind_head, read_scale, why_not_fused
from tests import tiny

IDS = torch.arange(5, 53).reshape(2, 24)
LABELS = IDS.masked_fill(IDS % 7 == 0, -100)


def adapted(base, **options):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return get_peft_model(base, config)


def run(bind, base, model=None, labels=LABELS, weights=None, **call):
    """Figures and gradients of one fused forward of ``model`` whose base's head is bound by ``bind``."""
    model = base if model is None else model
    patches = PatchSet()
    bind(base, patches)
    out = model(IDS, labels=labels, fused_lm_head=True, **call)
    (out.loss if weights is None else -(out.log_probs * weights).sum()).backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    model.zero_grad()
    patches.revert()
    assert "forward" not in vars(base)
    return out, gradients


def model_with(bind, family="llama", labels=LABELS, num_items=None):
    base = tiny.build_model(family)
    return run(bind, base, adapted(base), labels, num_items_in_batch=num_items)


def assert_alike(ours, plain, our_gradients, gradients):
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-5, atol=0)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.is_top1.bool() & plain.label_mask, plain.is_top1.bool())
    assert torch.equal(ours.label_mask, plain.label_mask)
    largest = max(gradient.abs().max() for gradient in gradients)
    assert largest > 0
    for one, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest.item())


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("num_items", [None, 100])
def test_figures_and_gradients_are_those_of_the_logits(family, num_items):
    ours, our_gradients = model_with(bind_head, family, num_items=num_items)
    plain, gradients = model_with(bind_cpu_head, family, num_items=num_items)
    assert_alike(ours, plain, our_gradients, gradients)


# llama's head is a matrix of its own, gemma2's is the embedding
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_trained_head(family, weighted):
    weights = torch.rand(2, 23) if weighted else None
    model = tiny.build_model(family)
    ours, our_gradients = run(bind_head, model, weights=weights)
    plain, gradients = run(bind_cpu_head, model, weights=weights)
    assert len(gradients) == len(list(model.parameters()))
    assert_alike(ours, plain, our_gradients, gradients)


def test_a_head_that_is_trained_beside_an_adapter():
    results = []
    for bind in (bind_head, bind_cpu_head):
        base = tiny.build_model()
        model = adapted(base, modules_to_save=["lm_head"])
        assert why_not_fused(base) is None
        with torch.no_grad():  # the trained copy is the one that counts
            base.lm_head.original_module.weight.zero_()
        out, gradients = run(bind, base, model)
        assert any(gradient.shape == (tiny.VOCAB, 64) for gradient in gradients)
        results.append((out, gradients))
    (ours, our_gradients), (plain, gradients) = results
    assert_alike(ours, plain, our_gradients, gradients)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("family", "options"),
    [("cohere", dict(logit_scale=0.25)), ("granite", dict(logits_scaling=8.0, attention_multiplier=0.25))],
)
def test_scaled_logits(family, options, trained):
    config = AutoConfig.for_model(family, **tiny._SIZES, **options)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model = base if trained else adapted(base)
    (ours, our_gradients), (plain, gradients) = (
        run(bind, base, model) for bind in (bind_head, bind_cpu_head)
    )
    assert_alike(ours, plain, our_gradients, gradients)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"logit_scale": None, "logits_scaling": 1.0}, 1.0),
        ({"logit_scale": 0.0625}, 0.0625),
        ({"output_multiplier": 2}, 2.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"logits_scaling": 8.0}, 0.125),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
        ({"logit_scale": "inv_sqrt_d_model"}, None),
    ],
)
def test_what_a_config_multiplies_its_logits_by(settings, scale):
    assert read_scale(SimpleNamespace(**{"model_type": "any", **settings})) == scale


@pytest.mark.parametrize("trained", [False, True])
def test_under_autocast_products_are_in_its_dtype(trained):
    model = tiny.build_model()
    model.lm_head.weight.requires_grad_(trained)
    with torch.autocast("cpu", torch.bfloat16):
        ours, our_gradients = run(bind_head, model)
        plain, gradients = run(bind_cpu_head, model)
    assert [g.dtype for g in our_gradients] == [torch.float32] * len(gradients)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-2, atol=0)
    for one, other in zip(our_gradients, gradients, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()


@pytest.mark.parametrize("trained", [False, True])
def test_a_batch_without_labels_reaches_every_parameter(trained):
    base = tiny.build_model()
    model = base if trained else adapted(base)
    out, gradients = run(bind_head, base, model, torch.full_like(IDS, -100))
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
    # what the head is is asked at every call
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCAB))
    model(IDS, labels=LABELS, fused_lm_head=True)
    assert [one["fused_lm_head"] for one in calls] == [False, False, True, True, True]


def test_heads_that_are_left_to_trl(monkeypatch):
    mixtral = tiny.build_model("mixtral", output_router_logits=True)
    assert why_not_fused(mixtral) is None
    monkeypatch.setattr("pantheraml.training.head.experts_per_token", lambda config: None)
    assert why_not_fused(mixtral) == "the model adds a loss of its own"
    model = tiny.build_model()
    assert why_not_fused(model) is None
    model.config.logit_scale = "inv_sqrt_d_model"
    assert why_not_fused(model) == "the logits are scaled in a way of their own"


def test_heads_that_are_no_plain_matrix():
    def with_bias(model):
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCAB))

    def with_adapter(model):
        get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))

    def packed(model):
        weight = torch.zeros(tiny.VOCAB, 32, dtype=torch.uint8)
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)

    def another_class(model):
        model.set_output_embeddings(type("Scaled", (torch.nn.Linear,), {})(64, tiny.VOCAB, bias=False))

    def with_forward_of_its_own(model):
        model.lm_head.forward = model.lm_head.forward

    def without(model):
        model.set_output_embeddings(None)

    for change in (with_bias, with_adapter, packed, another_class, with_forward_of_its_own, without):
        model = tiny.build_model()
        assert why_not_fused(model) is None
        change(model)
        assert why_not_fused(model) == "the head is no plain matrix", change.__name__
