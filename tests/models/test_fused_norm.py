"""Fused norms in real models, on CPU through the plain path of the kernel."""

from __future__ import annotations

import copy

import pytest
import torch

from pantheraml.models.families import find_family
from pantheraml.models.fused import FusedRMSNorm, apply_fused_parts, apply_norms
from pantheraml.models.patching import PatchSet
from tests import tiny

IDS = torch.arange(20).reshape(2, 10) + 7


def loss_and_gradients(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_norm_is_swapped_and_nothing_changes(name):
    model = tiny.build_model(name)
    stock = copy.deepcopy(model)
    patches = apply_norms(model, find_family(model.config), PatchSet(), on_cpu=True)
    left = [
        type(m).__name__
        for m in model.modules()
        if "Norm" in type(m).__name__ and not isinstance(m, FusedRMSNorm)
    ]
    swapped = sum(isinstance(m, FusedRMSNorm) for m in model.modules())
    assert left == [] and swapped == len(patches.report()) >= 5
    assert torch.equal(model(input_ids=IDS).logits, stock(input_ids=IDS).logits)

    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(stock)
    assert torch.equal(loss, expected_loss) and list(gradients) == list(expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)

    apply_norms(model, find_family(model.config), PatchSet(), on_cpu=True)
    patches.revert()
    assert not any(isinstance(m, FusedRMSNorm) for m in model.modules())
    assert torch.equal(model(input_ids=IDS).logits, stock(input_ids=IDS).logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_on_a_cpu_norms_stay_and_the_ledger_says_why():
    model = tiny.build_model("llama")
    patches = apply_norms(model, find_family(model.config), PatchSet())
    assert patches.report() == [("5 norms", "skipped", "Triton needs a GPU, the model is on cpu")]
    assert not any(isinstance(m, FusedRMSNorm) for m in model.modules())


@pytest.mark.promise("F4")
def test_an_unknown_architecture_is_left_alone():
    patches = apply_fused_parts(tiny.build_model("llama"), None, PatchSet())
    assert patches.report() == [("LlamaForCausalLM", "skipped", "no family describes 'llama'")]


def test_a_norm_offloaded_by_another_library_stays():
    model = tiny.build_model("llama")
    norm = model.model.norm
    norm.forward = norm.forward
    patches = apply_norms(model, find_family(model.config), PatchSet(), on_cpu=True)
    assert patches.report()[-1] == (
        "1 norms",
        "skipped",
        "another library put a forward of its own on the module",
    )
    assert model.model.norm is norm


# PEFT 0.21 asks transformers 5.23 by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("whole", [None, ["norm"]])
def test_before_and_after_peft(when, whole):
    from peft import LoraConfig, get_peft_model

    def adapt(model):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=whole, init_lora_weights=False)
        return get_peft_model(model, config)

    reference = adapt(tiny.build_model("llama"))
    model, patches = tiny.build_model("llama"), PatchSet()
    family = find_family(model.config)
    if when == "before":
        adapted = adapt(apply_and_return(model, family, patches))
    else:
        adapted = apply_and_return(adapt(model), family, patches)
    # PEFT compares ends of names: "norm" means every norm, each kept twice, as it was and as it is trained
    assert list(adapted.state_dict()) == list(reference.state_dict())
    assert sum(isinstance(m, FusedRMSNorm) for m in adapted.modules()) == (10 if whole else 5)
    loss, gradients = loss_and_gradients(adapted)
    expected_loss, expected = loss_and_gradients(reference)
    assert torch.equal(loss, expected_loss) and list(gradients) == list(expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


def apply_and_return(model, family, patches):
    apply_norms(model, family, patches, on_cpu=True)
    return model


def test_recompute_and_checkpoints_know_nothing_of_it(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny.build_model("gemma2").train()
    expected_loss, expected = loss_and_gradients(model)
    apply_norms(model, find_family(model.config), PatchSet(), on_cpu=True)
    # transformers 5.23 calls it by another name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    loss, gradients = loss_and_gradients(model)
    assert torch.equal(loss, expected_loss)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
