"""A layer that is found unchanged is computed with what was read before; whatever changes between two calls is seen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pantheraml.models.families import find_family
from pantheraml.models.fused.decoder_layer import apply_layers
from pantheraml.models.fused.read_layer import LayerReader
from pantheraml.models.patching import PatchSet
from tests.fused.test_decoder_layer import ALL, assert_equal, build, run

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def assembled(monkeypatch):
    """Counts how often the parts of a layer are made."""
    count = []
    original = LayerReader._assemble
    monkeypatch.setattr(LayerReader, "_assemble", lambda *a: count.append(1) or original(*a))
    return count


def inner(model, name):
    return model.get_base_model().get_submodule(name)


def other_values(model):
    inner(model, Q).lora_B["default"].weight.data.mul_(-2)


def other_memory_of_a_factor(model):
    factor = inner(model, Q).lora_A["default"].weight
    factor.data = 3 * factor.data


def another_factor(model):
    second = inner(model, DOWN).lora_B["default"]
    second.weight = nn.Parameter(second.weight.detach() * 3)


def another_weight(model):
    base = inner(model, Q).get_base_layer()
    base.weight = nn.Parameter(-base.weight.detach(), requires_grad=False)


def other_memory_of_a_weight(model):
    weight = inner(model, DOWN).get_base_layer().weight
    weight.data = 2 * weight.data


def other_values_of_a_weight(model):
    inner(model, DOWN).get_base_layer().weight.data.mul_(0.5)


def another_scale(model):
    inner(model, DOWN).scaling["default"] = 0.25


def merged(model):
    inner(model, Q).merge()


def switched_off(model):
    inner(model, DOWN).enable_adapters(False)


def no_adapter(model):
    layer = model.get_base_model().model.layers[0].self_attn
    layer.q_proj = layer.q_proj.get_base_layer()


def another_norm(model):
    norm = model.get_base_model().model.layers[1].input_layernorm
    norm.weight = nn.Parameter(norm.weight.detach() + 1, requires_grad=False)


def another_eps(model):
    model.get_base_model().model.layers[1].input_layernorm.variance_epsilon = 0.5


def another_dtype_and_back(model):
    model.double().float()


CHANGES = [
    other_values,
    other_memory_of_a_factor,
    another_factor,
    another_weight,
    other_memory_of_a_weight,
    other_values_of_a_weight,
    another_scale,
    merged,
    switched_off,
    no_adapter,
    another_norm,
    another_eps,
    another_dtype_and_back,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_calls_is_seen(change, calls):
    ours, theirs = (build("llama", ALL, fused)[0] for fused in (True, False))
    before = run(ours)[0]
    with torch.no_grad():
        for model in (ours, theirs):
            change(model)
    after = run(ours)
    assert len(calls) == 4
    logits, gradients = run(theirs)
    there = {
        name for name, gradient in gradients.items() if gradient is not None
    }  # a merged adapter gets none
    assert len(there) >= 26 and there == {name for name, gradient in after[1].items() if gradient is not None}
    assert_equal(
        *((out, {name: found[name] for name in there}) for out, found in (after, (logits, gradients)))
    )
    same = change in (merged, another_dtype_and_back)
    assert same == torch.allclose(after[0], before, atol=1e-3)


def test_weights_that_are_trained_from_now_on_are_seen(calls):
    ours, theirs = (build("llama", ALL, fused)[0] for fused in (True, False))
    run(ours)
    for model in (ours, theirs):
        inner(model, Q).get_base_layer().weight.requires_grad_(True)
    assert_equal(run(ours), run(theirs))
    assert len(calls) == 3  # the first layer is transformers' own in the second call


def test_unchanged_layers_are_not_made_anew(monkeypatch):
    count = assembled(monkeypatch)
    model, _ = build("llama", ALL, True)
    for _ in range(3):
        run(model)
    assert len(count) == 2
    with model.disable_adapter(), torch.no_grad():
        run_forward(model)
        run_forward(model)
    assert len(count) == 4
    run(model)
    assert len(count) == 6


def run_forward(model):
    return model(input_ids=torch.arange(5, 29)[None], use_cache=False).logits


def test_masks_are_drawn_for_every_call(monkeypatch):
    count = assembled(monkeypatch)
    model = build("llama", ALL, True, lora_dropout=0.5)[0].train()
    first, second = run(model)[0], run(model)[0]
    assert not torch.equal(first, second) and len(count) == 4


def test_four_bit_weights_that_change_are_unpacked_again(llama):
    from pantheraml import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(str(llama), 64, load_in_4bit=True, device_map="cpu")
    model = FastLanguageModel.get_peft_model(model, r=4)
    apply_layers(model.get_base_model(), find_family(model.config), PatchSet(), on_cpu=True)
    first = run_forward(model).detach()
    assert torch.equal(run_forward(model).detach(), first)
    packed = inner(model, DOWN).get_base_layer().weight
    with torch.no_grad():
        packed.data.zero_()
    assert not torch.allclose(run_forward(model).detach(), first, atol=1e-4)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stack_weights_of_their_own(way):
    model, _ = build("llama", ALL, True)
    before = run(model)
    twin = way(model.get_base_model().model.layers[0])
    assert not twin.reader._stacks and twin.reader.family is not None
    other = twin.self_attn.q_proj.get_base_layer().weight
    other.data.zero_()
    assert_equal(run(model), before)


def test_memory_of_weights_is_given_back():
    model, _ = build("llama", ALL, True)
    run(model)
    layer = model.get_base_model().model.layers[0]
    layer.reader.release()
    assert layer.reader._known is None
    assert all(stack._buffer is None for stack in layer.reader._stacks.values())
