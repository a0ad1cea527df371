"""Every path, name and kind that a family states is true of a real model of it."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pantheraml.models.families import FAMILIES, find_family
from tests import tiny

NAMES = [family.name for family in FAMILIES]
# What the tiny model needs beyond tests/tiny.py to show everything its family can have.
VARIANTS = {
    "qwen3_moe": {"mlp_only_layers": [0]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
}


def build(name):
    if name != "gemma3":
        return tiny.build_model(name, **VARIANTS.get(name, {}))
    from transformers import AutoConfig, AutoModelForCausalLM

    text = tiny.build_model("gemma3_text").config.to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    model = build(request.param)
    family = find_family(model.config)
    assert family is not None and family.name == request.param
    return model, family


def text_modules(model, family):
    return {
        n: m
        for n, m in model.named_modules()
        if not any(n == o or n.startswith(f"{o}.") for o in family.not_text)
    }


def mlps(model, family):
    """(ordinary MLPs, mixture MLPs)"""
    all_mlps = [layer.get_submodule(family.mlp) for layer in model.get_submodule(family.layers)]
    mixed = [m for m in all_mlps if family.experts and hasattr(m, family.experts.module)]
    return [m for m in all_mlps if m not in mixed], mixed


def test_an_unknown_type_has_no_family():
    assert find_family(SimpleNamespace(model_type="gpt2")) is None


def test_frozen():
    with pytest.raises(AttributeError):
        FAMILIES[0].layers = "elsewhere"
    with pytest.raises(TypeError):
        find_family(SimpleNamespace(model_type="phi3")).merged_projections["q_proj"] = "other"


def test_the_parts_are_where_the_family_says(case):
    model, family = case
    config = model.config.get_text_config()
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers
    assert isinstance(model.get_submodule(family.embedding), nn.Embedding)
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    assert type(model.get_submodule(family.final_norm)).__name__ in family.norm.class_names
    for path in family.not_text:
        assert isinstance(model.get_submodule(path), nn.Module)
    for layer in layers:
        attention = layer.get_submodule(family.attention)
        assert [n for n, m in attention.named_children() if isinstance(m, nn.Linear)] and all(
            isinstance(attention.get_submodule(name), nn.Linear) for name in family.attention_projections
        )
        assert isinstance(layer.get_submodule(family.mlp), nn.Module)


def test_the_norms_are_all_known_and_all_listed(case):
    model, family = case
    norms = {n: m for n, m in text_modules(model, family).items() if "Norm" in type(m).__name__}
    assert {type(m).__name__ for m in norms.values()} == set(family.norm.class_names)
    listed = {family.final_norm}
    for i in range(model.config.get_text_config().num_hidden_layers):
        listed |= {f"{family.layers}.{i}.{name}" for name in family.layer_norms}
        listed |= {f"{family.layers}.{i}.{family.attention}.{name}" for name in family.head_norms}
    assert listed == set(norms)
    assert all(hasattr(norm, family.norm.eps_name) for norm in norms.values())


def test_the_norm_kind_is_the_formula(case):
    model, family = case
    norm = model.get_submodule(family.final_norm).to(torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(7, norm.weight.numel(), dtype=torch.bfloat16)
    x_hat = x.float() * torch.rsqrt(
        x.float().pow(2).mean(-1, keepdim=True) + getattr(norm, family.norm.eps_name)
    )
    weight = norm.weight.float() + family.norm.offset
    rounded = (x_hat.bfloat16().float() if family.norm.cast_first else x_hat) * weight
    assert torch.equal(norm(x), rounded.bfloat16())


def test_the_mlp_is_what_the_family_says(case):
    model, family = case
    plain, mixed = mlps(model, family)
    for mlp in plain:
        linears = [name for name, child in mlp.named_children() if isinstance(child, nn.Linear)]
        assert sorted(linears) == sorted(family.mlp_projections)
    assert bool(mixed) == (family.experts is not None)
    for mlp in mixed:
        experts = mlp.get_submodule(family.experts.module)
        assert mlp.get_submodule(family.experts.router).weight.ndim == 2
        for name in family.experts.parameters.values():
            assert isinstance(getattr(experts, name), nn.Parameter) and getattr(experts, name).ndim == 3
    assert bool(plain) == bool(family.mlp_projections)


def test_the_activation_is_the_family_s(case):
    model, family = case
    config = model.config.get_text_config()
    x = torch.linspace(-12, 12, 50)
    if family.activation == "clamped_swiglu":
        experts = mlps(model, family)[1][0].experts
        gate, up = x.clamp(max=7), x.flip(0).clamp(-7, 7)
        ours = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        torch.testing.assert_close(experts._apply_gate(torch.stack([x, x.flip(0)], dim=-1).flatten()), ours)
        return
    assert (getattr(config, "hidden_act", None) or config.hidden_activation) == family.activation
    plain, mixed = mlps(model, family)
    stated = {
        "silu": nn.functional.silu,
        "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    }
    for mlp in plain + [m.experts for m in mixed]:
        act = getattr(mlp, "act_fn", None) or mlp.activation_fn
        torch.testing.assert_close(act(x), stated[family.activation](x))


def test_default_targets_cover_every_linear_of_the_layers_but_routers(case):
    model, family = case
    linears = {n for n, m in model.get_submodule(family.layers).named_modules() if isinstance(m, nn.Linear)}
    covered = {n for n in linears if n.rpartition(".")[2] in family.target_modules}
    assert covered == linears
    used = {n.rpartition(".")[2] for n in covered}
    assert used == set(family.target_modules)
    names = dict(model.named_parameters())
    for target in family.target_parameters:
        assert any(name.endswith(f".{target}") and p.ndim == 3 for name, p in names.items())
    three_d = {n for n, p in model.get_submodule(family.layers).named_parameters() if p.ndim == 3}
    assert three_d == {n for n in three_d if n.endswith(family.target_parameters or ("none",))}


def test_every_well_known_name_leads_somewhere(case):
    model, family = case
    names = [n for n, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        places = {family.merged_projections.get(name, name), family.expert_projections.get(name, name)} - {
            name
        }
        for place in places or {name}:
            assert any(n.endswith(f".{place}") for n in names), (name, place)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_takes_the_default_targets(case):
    from peft import LoraConfig, get_peft_model

    model, family = case
    if family.experts and family.mlp_projections:
        # With gate_proj among the modules of a mixture, PEFT rewrites the targets itself.
        model = tiny.build_model(family.name)
    linears = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    modules = [name for name in family.target_modules if name in linears]
    before = {n for n, p in model.get_submodule(family.layers).named_parameters() if p.ndim > 1}
    config = LoraConfig(
        r=2,
        target_modules=modules,
        target_parameters=list(family.target_parameters),
        exclude_modules=rf"({'|'.join(family.not_text)})\..*" if family.not_text else None,
    )
    adapted = get_peft_model(model, config)
    wrapped = {n for n, _ in adapted.named_parameters() if "lora_A" in n}
    routers = {n for n in before if family.experts and f".{family.experts.router}." in n}
    biases = {n for n in before if n.endswith("_bias")}
    assert len(wrapped) == len(before - routers - biases)
    adapted.unload()


def test_deviations_are_told(case):
    model, family = case
    config, layers = model.config.get_text_config(), model.get_submodule(family.layers)
    has = {
        "attention_softcap": getattr(config, "attn_logit_softcapping", None) is not None,
        "final_softcap": getattr(config, "final_logit_softcapping", None) is not None,
        "sliding_window": hasattr(config, "sliding_window"),
        "attention_sinks": hasattr(layers[0].get_submodule(family.attention), "sinks"),
        "scaled_embedding": type(model.get_submodule(family.embedding)) is not nn.Embedding,
        "sandwich_norm": len(family.layer_norms) == 4,
        "partial_rotary": "partial_rotary_factor" in (config.rope_parameters or {}) and family.name == "phi3",
        "half_rotary": hasattr(import_module(type(layers[0]).__module__), "_apply_rotary_emb"),
        "residual_dropout": hasattr(config, "resid_pdrop"),
    }
    assert {name for name, there in has.items() if there} == family.deviations
