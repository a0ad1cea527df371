"""Fused layers with dropout equal stock layers with the very same masks, whatever is kept, in however many tiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pantheraml.models.families import find_family
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer, apply_layers
from pantheraml.models.fused.functions import AttentionInput
from pantheraml.models.fused.host_store import HostStore
from pantheraml.models.patching import PatchSet
from pantheraml.models.sample_dropout import SampleDropout, follow_samples, keyed
from pantheraml.models.token_keys import TokenKeys
from tests.fused.masks import Recorder, apply_masks
from tests.fused.test_decoder_layer import (
    ALL,
    DEVICE,
    FAMILIES,
    assert_equal,
    build,
    names_in,
    run,
)
from tests.fused.test_fp8_layer import error, in_fp8
from tests.fused.test_whole_layer import DENSE, build_whole

DROP = dict(lora_dropout=0.3)


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


def seeded(model, seed=11):
    torch.manual_seed(seed)
    return run(model)


def reference(recorder, ours, family, targets=ALL, **lora):
    """What the stock model computes with the masks that ``ours`` had last."""
    stock = build(family, targets, False, **DROP, **lora)[0].train()
    return run(apply_masks(stock, recorder.masks(ours)))


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["o_proj", "gate_proj", "up_proj"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_stock_layer_with_the_same_masks(family, targets, calls, recorder):
    if not names_in(family, targets):
        pytest.skip("this family has experts in the place of these linears")
    model = build(family, targets, True, **DROP)[0].train()
    ours = run(model)
    assert len(calls) == 2
    assert_equal(ours, reference(recorder, model, family, targets))
    plain = run(build(family, targets, False)[0])
    assert (ours[0] - plain[0]).abs().max() > 1e-3 * plain[0].abs().max()


@pytest.mark.parametrize("family", DENSE)
def test_the_same_whatever_is_kept_in_however_many_tiles(family, recorder):
    found = []
    settings = [("all", 20, False), ("projected", 20, False), ("input", 20, False), ("input", 48, False)]
    for keep, tile, stored in [*settings, ("attended", 13, True)]:
        model, layers = build_whole(family, keep, **DROP)
        for layer in layers:
            layer.tile = tile
            layer.store = HostStore(torch.device(DEVICE)) if stored else None
        found.append(seeded(model))
    assert_equal(found[0], reference(recorder, model, family))
    for one in found[1:]:
        assert_equal(one, found[0], tolerance=5e-6)  # CPUs differ in their rounding


@pytest.mark.parametrize("outer", [False, True])
def test_layers_that_are_computed_again_drop_the_same(outer, calls, recorder):
    """In parts around another attention, by the layer's own recompute and by somebody else's around the layer."""
    model = build("llama", ALL, True, **DROP)[0].train()
    for layer in [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]:
        layer.gradient_checkpointing = not outer
        if outer:
            inner = layer.forward
            layer.forward = lambda x, inner=inner, **rest: checkpoint(inner, x, use_reentrant=False, **rest)
    ours = run(model)
    assert len(calls) == 4
    assert_equal(ours, reference(recorder, model, "llama"))


def in_4bit(model):
    """``model`` with the base linears of its layers in NF4."""
    bnb = pytest.importorskip("bitsandbytes")
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or "lora_" in path or "lm_head" in path:
            continue
        new = bnb.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, quant_type="nf4"
        )
        new.compute_dtype = module.weight.dtype
        new.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        new.bias = module.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new.to(module.weight.device))
    return model


@pytest.mark.parametrize("lora", [{}, DROP, {"lora_bias": True}, {"lora_bias": True, **DROP}])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("keep", ["all", "input"])
def test_four_bit_weights(keep, lora, recorder):
    model, layers = build_whole("llama", keep, **lora)
    ours = run(in_4bit(model))
    assert all(stack._buffer is not None for layer in layers for stack in layer.reader._stacks.values())
    stock = in_4bit(build("llama", ALL, False, **lora)[0].train())
    stock = apply_masks(stock, recorder.masks(model)) if "lora_dropout" in lora else stock
    assert_equal(ours, run(stock), tolerance=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_fp8_weights_err_as_those_of_stock_layers(family, recorder):
    errors = {"mine": [], "theirs": []}
    for seed in range(4):  # of the noise that FP8 brings, each draws another sample
        model, _ = build_whole(family, "attended", **DROP)
        ours = seeded(in_fp8(model), seed)
        exact, stock = (build(family, ALL, False, **DROP)[0].train() for _ in range(2))
        masks = recorder.masks(model)
        exact, stock = run(apply_masks(exact, masks)), run(apply_masks(in_fp8(stock), masks))
        for name, found in (("mine", ours), ("theirs", stock)):
            factors, truth = (torch.cat([g.flatten() for g in run[1].values()]) for run in (found, exact))
            errors[name].append((error(found[0], exact[0]), error(factors, truth)))
    mine, theirs = (torch.tensor(found).square().mean(0).sqrt() for found in errors.values())
    assert (mine <= 1.4 * theirs).all() and (theirs < 0.25).all(), (mine, theirs)


def test_seeds_follow_torchs_generator_and_nobody_else_draws():
    model, _ = build_whole("llama", "attended", **DROP)
    first, again, other = seeded(model)[0], seeded(model)[0], seeded(model, 12)[0]
    assert torch.equal(first, again) and not torch.allclose(first, other, rtol=1e-3, atol=1e-3)
    plain, _ = build_whole("llama", "attended")
    state = torch.get_rng_state()
    run(model.eval())
    run(plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_does_not_drop_and_a_change_of_p_acts_at_once(calls):
    ours, theirs = (build("llama", ALL, fused, **DROP)[0] for fused in (True, False))
    plain = run(theirs.eval())
    assert_equal(run(ours.eval()), plain)
    ours.train()
    shifts = []
    for p in (0.0, 0.01, 0.3, 0.9):
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
        logits, gradients = seeded(ours)
        shifts.append(float((logits - plain[0]).square().mean()))
        if p == 0:
            assert_equal((logits, gradients), plain)
    assert shifts == sorted(shifts) and shifts[2] > 4 * shifts[1] > 0
    assert len(calls) == 10


def test_adapters_that_are_merged_or_disabled_do_not_drop():
    ours, theirs = (build("llama", ALL, fused, **DROP)[0].train() for fused in (True, False))
    ids = torch.arange(5, 29, device=DEVICE)[None]
    for model in (ours, theirs):
        with model.disable_adapter():
            model.plain = model(input_ids=ids).logits
        model.merge_adapter()
        model.merged = model(input_ids=ids).logits
        model.unmerge_adapter()
    for name in ("plain", "merged"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)
    again = ours(input_ids=ids).logits  # the adapter is back, and drops
    assert not torch.allclose(again, ours.merged, rtol=1e-2, atol=1e-3)


def test_generation_in_training_mode_drops_as_stock_does(monkeypatch):
    """Each token has masks of its own: the layers that keep their parts for an answer leave it to the stock ones."""
    from pantheraml.models.fused import decoding_layer

    model = build("llama", ALL, False, **DROP)[0].train()
    base = model.get_base_model()
    patches = apply_layers(base, find_family(base.config), PatchSet(), on_cpu=True)
    decoding_layer.apply_decoding_layers(base, patches)
    used = []
    monkeypatch.setattr(
        AttentionInput, "apply", lambda *_: pytest.fail("fused functions generate with dropout")
    )
    few = decoding_layer._few_rows
    monkeypatch.setattr(decoding_layer, "_few_rows", lambda *a, **k: used.append(1) or few(*a, **k))
    ids = torch.arange(5, 20, device=DEVICE)[None]
    model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert not used
    model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert used


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_masks_that_follow_samples_are_those_of_the_stock_layer(family, calls):
    """In tiles, recomputed and around a mask: keys go with their rows."""
    keys = TokenKeys(torch.randint(2**40, (48,), device=DEVICE), seed=5)
    results = []
    for fused in (True, False):
        model = build(family, ALL, fused, **DROP)[0].train()
        assert follow_samples(model, PatchSet()).adapters
        with keyed(keys):
            results.append(run(model))
    assert len(calls) == 2
    assert_equal(*results, tolerance=3e-5)
    for layer in [module for module in model.modules() if isinstance(module, SampleDropout)]:
        assert layer.number >= 0
    torch.manual_seed(1)
    assert not torch.equal(run(model)[0], results[1][0]), "without keys, masks are drawn"


@pytest.mark.parametrize("keep", ["all", "attended", "input"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_dropout_of_attention_and_residual_that_follows_samples(family, keep):
    """Fused or not, kept or computed again: transformers attends between the fused parts."""
    keys = (torch.tensor([7, 3], device=DEVICE)[:, None] << 32) | torch.arange(24, device=DEVICE)
    results = []
    for fused in (True, False):
        model = build(family, ALL, fused, **DROP)[0].train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
            if hasattr(module, "resid_mlp_dropout"):
                module.resid_mlp_dropout.p = 0.2
            if isinstance(module, FusedDecoderLayer):
                module.gradient_checkpointing, module.keep_when_recomputing = keep != "all", keep
        followed = follow_samples(model, PatchSet())
        assert followed.inside
        with keyed(followed.keys(keys, 5)):
            results.append(run(model))
    assert_equal(*results, tolerance=3e-5)
    assert not torch.allclose(run(model)[0], results[1][0], atol=1e-3)
