"""Layers whose own weights are trained: fused functions give every weight, bias and norm the gradient of stock ones."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import launch
from pantheraml.models.families import find_family
from pantheraml.models.fused.attention import apply_attention
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer
from pantheraml.models.fused.layer_function import FusedLayer
from tests.fused.test_decoder_layer import DEVICE, FAMILIES, MIXTURES, assert_equal, build, run
from tests.references.yardstick import assert_as_good_as

DENSE = tuple(family for family in FAMILIES if family not in MIXTURES)
# The interpreter cuts numbers off where it makes them bfloat16, and does not round.
IN_16_BITS = torch.float16 if launch._INTERPRETED else torch.bfloat16
KEEPS = ("all", "projected", "attended", "input")


def build_trained(family, keep="all", tile=20):
    """A fused model of which everything is trained; 48 tokens are two whole tiles and a short one."""
    model, patches = build(family, None, True)
    model.config.use_cache = False
    apply_attention(model, find_family(model.config), patches)
    for layer in layers_of(model):
        layer.gradient_checkpointing, layer.tile = keep != "all", tile
        layer.keep_when_recomputing = "attended" if keep == "all" else keep
    return model.train()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]


@pytest.fixture
def whole_calls(monkeypatch):
    """What each call of the whole-layer function kept."""
    seen, original = [], FusedLayer.apply
    monkeypatch.setattr(
        FusedLayer, "apply", lambda x, layer, *a: seen.append(layer.keep) or original(x, layer, *a)
    )
    return seen


@pytest.mark.parametrize("family", DENSE)
def test_it_equals_stock_whatever_it_keeps(family, whole_calls):
    theirs = run(build(family, None, False)[0].train())
    assert len(theirs[1]) >= 15
    for keep in KEEPS:
        assert_equal(run(build_trained(family, keep)), theirs)
    assert whole_calls == [keep for keep in KEEPS for _ in range(2)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", *MIXTURES])
def test_in_parts_around_another_attention(family, calls):
    """With padded rows; of mixtures, whose experts compute as they did, all but these."""
    mask = torch.ones(2, 24, dtype=torch.long, device=DEVICE)
    mask[1, 15:] = 0
    ours, theirs = (run(build(family, None, fused)[0].train(), mask) for fused in (True, False))
    assert len(calls) == 2
    real = mask.bool()
    assert_equal((ours[0][real], ours[1]), (theirs[0][real], theirs[1]))


def gradients(model, dtype):
    """Of every parameter, for six random sums of the last hidden states."""
    model, found = model.to(dtype), []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 400, (2, 24), generator=generator).to(DEVICE)
        model.zero_grad()
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        weights = torch.randn(states.shape, generator=generator).to(DEVICE, dtype)
        (states * weights).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", IN_16_BITS),
        ("qwen2", torch.float32),
        ("qwen3", IN_16_BITS),
        ("gemma3_text", torch.float32),
    ],
)
def test_it_errs_no_more_than_stock(family, dtype, whole_calls):
    def rounded(model):
        return model.to(IN_16_BITS).float()

    exact = gradients(rounded(build(family, None, False)[0]).train(), torch.float64)
    stock = gradients(rounded(build(family, None, False)[0]).train(), dtype)
    for keep in ("all", "attended"):  # the latter in tiles, whose shares are added up
        ours = gradients(rounded(build_trained(family, keep)), dtype)
        assert ours.keys() == exact.keys()
        for name, truth in exact.items():
            assert_as_good_as(ours[name], stock[name], truth, f"{name} ({keep})")
    assert len(whole_calls) == 2 * 2 * 6


def only(model, *words):
    """Let what is named by one of ``words`` be trained, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in words))
    return model


PARTS = {
    "no embedding": ("qwen3", ["layers."]),  # nothing before the first layer is trained
    "no norms": ("qwen2", ["_proj"]),
    "neither": ("llama", ["layers.0.self_attn.o_proj", "layers.1.mlp"]),
    "attention": ("qwen2", ["self_attn", "input_layernorm"]),
    "one of a stack": ("qwen2", ["layers.1.self_attn.q_proj.weight", "layers.0.mlp.up_proj"]),
    "biases": ("qwen2", ["bias"]),
    "one norm of heads": ("qwen3", ["v_proj", "k_norm"]),
}


@pytest.mark.parametrize(("family", "words"), PARTS.values(), ids=PARTS)
def test_of_what_is_trained_in_part(family, words, whole_calls):
    theirs = run(only(build(family, None, False)[0].train(), *words))
    for keep in ("all", "attended"):
        assert_equal(run(only(build_trained(family, keep), *words)), theirs)
    assert len(whole_calls) == 4


def test_norms_alone_are_left_to_stock_layers(whole_calls):
    model = only(build_trained("llama"), "norm")
    assert {layer.reader.read(layer) for layer in layers_of(model)} == {"norms are trained, and no weights"}
    assert_equal(run(model), run(only(build("llama", None, False)[0].train(), "norm")))
    assert not whole_calls


def test_what_is_trained_changes_between_two_calls():
    ours, theirs = build_trained("qwen3"), build("qwen3", None, False)[0].train()
    for change in (["_proj"], ["_proj", "norm"], ["layers."], ["q_proj"]):
        assert_equal(*(run(only(model, *change)) for model in (ours, theirs)))


def test_another_parameter_in_the_place_of_one():
    ours, theirs = build_trained("llama"), build("llama", None, False)[0].train()
    run(ours)
    for model in (ours, theirs):
        for name in ("self_attn.k_proj", "mlp.down_proj", "input_layernorm"):
            module = model.model.layers[0].get_submodule(name)
            module.weight = torch.nn.Parameter(module.weight.detach() * 2)
    assert_equal(run(ours), run(theirs))


def test_weights_stay_where_they_are_and_evaluation_is_fused_too(whole_calls):
    model = build_trained("llama")
    places = [weight.data_ptr() for weight in model.parameters()]
    run(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(5, 9, device=DEVICE)[None])
    assert len(whole_calls) == 4
    assert [weight.data_ptr() for weight in model.parameters()] == places
    assert not any(layer.reader._stacks for layer in layers_of(model))


def test_two_forwards_before_one_backward():
    """As of preference losses; the gradients of both are added up."""
    ours, theirs = build_trained("llama"), build("llama", None, False)[0].train()
    ids = torch.arange(5, 29, device=DEVICE)[None]
    found = []
    for model in (ours, theirs):
        model.zero_grad()
        first, second = (model(input_ids=one).logits for one in (ids, ids.flip(1)))
        (first.logsumexp(-1).sum() - (second * first.detach()).mean()).backward()
        found.append((first.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert_equal(*found)


def test_masters_in_float32_under_autocast_are_computed_by_stock_layers(whole_calls, calls):
    ours, theirs = build_trained("llama"), build("llama", None, False)[0].train()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_equal(run(ours), run(theirs), tolerance=0.05)
        assert not whole_calls and not calls
        assert not isinstance(layers_of(ours)[0].reader.read(layers_of(ours)[0]), str)
        run(ours.bfloat16())
    assert len(whole_calls) == 2
