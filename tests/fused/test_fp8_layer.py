"""Fused layers on FP8 weights: as near to float32 as FP8 layers of transformers and PEFT, whatever they keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pantheraml.models.fp8 import Fp8Linear
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer
from tests.fused.test_decoder_layer import ALL, build, run
from tests.fused.test_whole_layer import build_whole


def in_fp8(model, keeps_turned=False):
    """``model`` with the base linears of its layers in FP8."""
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or "lora_" in path or "lm_head" in path:
            continue
        parent, _, name = path.rpartition(".")
        sizes = module.in_features, module.out_features, module.bias is not None
        new = Fp8Linear(*sizes, dtype=module.weight.dtype)
        new.to(module.weight.device)
        new.weight.data, new.bias = module.weight.data, module.bias
        new.keeps_turned = keeps_turned
        new.requires_grad_(False)
        setattr(model.get_submodule(parent), name, new.quantise_())
    return model


def error(value, truth):
    return float(torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth))


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["gate_proj", "down_proj"]])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_errors_are_those_of_fp8_layers_that_are_not_fused(family, targets, calls):
    exact = run(build(family, targets, False)[0])
    stock = run(in_fp8(build(family, targets, False)[0]))
    assert not calls
    ours = run(in_fp8(build(family, targets, True)[0]))
    assert len(calls) == 2
    assert error(ours[0], exact[0]) <= 1.3 * error(stock[0], exact[0]) < 0.2
    assert ours[1].keys() == exact[1].keys()
    # Of the noise that FP8 brings, each draws another sample; over all factors it is as large.
    mine, theirs, truth = (
        torch.cat([g.flatten() for g in grads])
        for grads in zip(*((ours[1][name], stock[1][name], exact[1][name]) for name in exact[1]), strict=True)
    )
    assert error(mine, truth) <= 1.3 * error(theirs, truth) < 0.35
    for name, gradient in exact[1].items():
        assert error(ours[1][name], gradient) <= 2 * error(stock[1][name], gradient) + 0.02, name


@pytest.mark.parametrize("keeps_turned", [True, False])
def test_the_same_whatever_is_kept(keeps_turned):
    found = []
    for keep in ("all", "attended", "input"):
        model, layers = build_whole("llama", keep)
        in_fp8(model, keeps_turned)
        found += [run(model), run(model)]
        assert all(isinstance(layer, FusedDecoderLayer) for layer in layers)
    for logits, gradients in found[1:]:
        torch.testing.assert_close(logits, found[0][0], rtol=1e-5, atol=1e-6)
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(
                gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()
            )


def test_a_state_dict_gives_the_weights_memory_of_their_own():
    model = in_fp8(build("llama", ALL, True)[0])
    before = {
        name: value.view(torch.uint8).clone()
        for name, value in model.named_parameters()
        if value.dtype == torch.float8_e4m3fn
    }
    want = run(model)[0]
    state = model.state_dict()
    assert len(before) == 14
    for name, value in before.items():
        assert state[name].is_contiguous() and torch.equal(state[name].view(torch.uint8), value)
    assert torch.equal(run(model)[0], want)
