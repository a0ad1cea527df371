"""Adapters with a bias of their own (PEFT's ``lora_bias``) in fused layers: a column of the margin like any other."""

from __future__ import annotations

import pytest
import torch

from tests.fused.test_decoder_layer import ALL, DEVICE, FAMILIES, assert_equal, build, names_in, run
from tests.fused.test_fp8_layer import error, in_fp8
from tests.fused.test_whole_layer import DENSE, build_whole

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
BIAS = dict(lora_bias=True)
# The gradient of k's bias is a sum that nearly cancels: attention sees little of what all keys have in common.
CANCELS = 5e-5


@pytest.mark.parametrize(
    "targets", [ALL, ["q_proj", "v_proj"], ["o_proj", "gate_proj", "up_proj"], ["down_proj"]]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_stock_layer(family, targets, calls):
    if not names_in(family, targets):
        pytest.skip("this family has experts in the place of these linears")
    ours, theirs = (run(build(family, targets, fused, **BIAS)[0]) for fused in (True, False))
    assert len(calls) == 2
    assert any(name.endswith("lora_B.default.bias") for name in theirs[1])
    assert_equal(ours, theirs, CANCELS)


@pytest.mark.parametrize("keep", ["all", "projected", "attended", "input"])
@pytest.mark.parametrize("family", DENSE)
def test_it_equals_stock_whatever_it_keeps(family, keep):
    model, layers = build_whole(family, keep, **BIAS)
    for layer in layers:
        layer.tile = 20
    assert_equal(run(model), run(build(family, ALL, False, **BIAS)[0].train()), CANCELS)


def test_a_rank_that_fills_the_margin_leaves_room_for_the_bias(calls):
    """Gate and up take 64 columns by their ranks, and one more by their biases."""
    ours, theirs = (run(build("llama", ALL, fused, r=32, **BIAS)[0]) for fused in (True, False))
    assert len(calls) == 2
    assert_equal(ours, theirs, CANCELS)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_fp8_weights(family):
    exact, stock, ours = (
        run(build(family, ALL, False, **BIAS)[0]),
        run(in_fp8(build(family, ALL, False, **BIAS)[0])),
        run(in_fp8(build(family, ALL, True, **BIAS)[0])),
    )
    assert error(ours[0], exact[0]) <= 1.3 * error(stock[0], exact[0]) < 0.2
    for name, gradient in exact[1].items():
        assert error(ours[1][name], gradient) <= 2 * error(stock[1][name], gradient) + 0.02, name


def test_adapters_that_are_disabled_and_generation():
    ours, theirs = (
        build("qwen2", ["q_proj", "k_proj", "v_proj"], fused, **BIAS)[0] for fused in (True, False)
    )
    ids = torch.arange(5, 29, device=DEVICE)[None]
    for model in (ours, theirs):
        model.eval()
        with torch.no_grad():
            model.adapted = model(input_ids=ids).logits
            with model.disable_adapter():
                model.plain = model(input_ids=ids).logits
            model.merge_adapter()
            model.merged = model(input_ids=ids).logits
            model.unmerge_adapter()
    for name in ("adapted", "plain", "merged"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.merged, ours.adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.plain, ours.adapted, atol=1e-2)
    answers = [model.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*answers)
