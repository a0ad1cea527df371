"""Which projections fused functions can read, and why they leave the others."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pantheraml.kernels.nf4 import unpack_4bit
from pantheraml.models.fused.projection import Projection, computes_in, read_projection
from tests import tiny

NAME = "model.layers.0.mlp.up_proj"


def unpacked(projection):
    """The base weight as products use it."""
    return unpack_4bit(*projection.packed) if projection.is_packed else projection.linear.weight.detach()


def layer(**settings):
    """``up_proj`` of a tiny Llama with a LoRA adapter of ``settings``, in training mode."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], **settings})
    return get_peft_model(tiny.build_model(), config).train().get_base_model().get_submodule(NAME)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
def test_plain_adapters_are_read(settings):
    lora = layer(**settings)
    found = read_projection(lora)
    assert isinstance(found, Projection) and found.features == 96 and found.dtype == torch.float32
    x = torch.randn(5, 64)
    ours = x @ unpacked(found).T + found.scale * (x @ found.a.T) @ found.b.T
    torch.testing.assert_close(ours, lora(x), rtol=1e-5, atol=1e-5)


def test_layers_without_an_adapter_that_acts_are_read_as_they_are():
    plain = tiny.build_model().requires_grad_(False).get_submodule(NAME)
    off, merged, other = layer(), layer(init_lora_weights=False), layer()
    off.enable_adapters(False)
    merged.merge()
    other._active_adapter = ["another"]
    for one in (plain, off, merged, other):
        found = read_projection(one)
        assert isinstance(found, Projection) and found.a is None and found.scale == 0.0
        x = torch.randn(3, 64)
        torch.testing.assert_close(x @ unpacked(found).T, one(x), rtol=1e-5, atol=1e-5)


def test_four_bit_weights_are_unpacked(llama):
    from pantheraml import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(str(llama), 64, load_in_4bit=True, device_map="cpu")
    one = model.get_submodule(NAME).eval()
    found = read_projection(one)
    assert isinstance(found, Projection) and unpacked(found).shape == (96, 64)
    x = torch.randn(3, 64)
    torch.testing.assert_close(x @ unpacked(found).T, one(x), rtol=1e-4, atol=1e-4)


def trained_base():
    lora = layer()
    lora.base_layer.weight.requires_grad_(True)
    return lora


def biased_4_bit():
    linear = bitsandbytes.nn.Linear4bit(64, 64, bias=True, quant_type="nf4").to("cpu")
    linear.weight.requires_grad_(False)
    return linear


def own_forward():
    linear = nn.Linear(4, 4).requires_grad_(False)
    linear.forward = lambda x: x
    return linear


def two_adapters():
    lora = layer()
    model = get_peft_model(tiny.build_model(), LoraConfig(r=4, target_modules=["up_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"]))
    lora = model.get_base_model().get_submodule(NAME)
    lora._active_adapter = ["default", "second"]
    return lora


def turned():
    lora = layer()
    lora.fan_in_fan_out = True
    return lora


def own_dropout():
    lora = layer(lora_dropout=0.1)
    lora.lora_dropout["default"] = nn.AlphaDropout(0.1)
    return lora


class Own(nn.Linear):
    """A linear layer of another library."""


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Embedding(4, 4), "Embedding is no linear layer"),
        (trained_base, "base weights are trained beside an adapter"),
        (biased_4_bit, "biases of quantised weights are trained"),
        (lambda: Own(4, 4).requires_grad_(False), "Own computes in a way of its own"),
        (own_forward, "Linear computes in a way of its own"),
        (two_adapters, "several adapters are active"),
        (lambda: layer(use_dora=True), "the adapter is a DoraLinearVariant"),
        (own_dropout, "the adapter's input goes through AlphaDropout"),
        (turned, "the weight is stored turned"),
    ],
)
def test_what_is_left_and_why(build, reason):
    assert read_projection(build()) == reason


def test_weights_that_are_trained_are_factors():
    linear = nn.Linear(4, 4)
    found = read_projection(linear)
    assert found.is_trained and found.factors == (linear.weight, linear.bias)
    linear.weight.requires_grad_(False)
    assert read_projection(linear).factors == (None, linear.bias)
    for frozen in (read_projection(linear, as_frozen=True), read_projection(linear.requires_grad_(False))):
        assert not frozen.is_trained and frozen.factors == (None, None)
    assert not read_projection(trained_base(), as_frozen=True).is_trained


def test_dropout_matters_in_training_alone():
    lora = layer(lora_dropout=0.1)
    assert read_projection(lora).dropout == 0.1
    assert read_projection(lora.eval()).dropout == 0.0
    assert isinstance(read_projection(own_dropout().eval()), Projection)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_is_the_third_factor():
    lora = layer(lora_bias=True)
    assert read_projection(lora).factors[2] is lora.lora_B["default"].bias
    assert read_projection(layer()).factors[2] is None


def test_autocast_may_change_the_dtype():
    cpu = torch.device("cpu")
    assert computes_in(torch.float32, cpu)
    with torch.autocast("cpu", torch.bfloat16):
        assert computes_in(torch.bfloat16, cpu) and not computes_in(torch.float32, cpu)
