"""The fused decoder layer computes what the stock layer with PEFT computes: outputs, loss, every adapter gradient."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pantheraml.models.families import find_family
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer, apply_layers
from pantheraml.models.patching import PatchSet
from tests import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = tuple(tiny.FAMILIES)
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Head and hidden sizes that tensor cores take, so that the same file runs on a GPU.
SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)


def names_in(family, targets):
    """The linears of ``family`` that these well-known names mean; none for what only its experts have."""
    found = find_family(tiny.build_model(family).config)
    linears = set(found.attention_projections + found.mlp_projections)
    if family in MIXTURES:
        linears = set(found.attention_projections)
    names = (found.merged_projections.get(name, name) for name in targets)
    return sorted({name for name in names if name in linears})


def build(family, targets, fused, **lora):
    sizes = dict(SIZES, **({"head_dim": 32} if family == "mistral" else {}))
    model = tiny.build_model(family, **sizes).to(DEVICE)
    if "attention_softcap" in find_family(model.config).deviations:
        model.set_attn_implementation(
            "eager"
        )  # transformers 5.17 starts with SDPA, which leaves the soft-cap out
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros hide mistakes
            noise = torch.Generator().manual_seed(len(name))
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=noise).to(DEVICE)
    patches = PatchSet()
    if fused:
        apply_layers(model, find_family(model.config), patches, on_cpu=True)
    if targets:
        targets = names_in(family, targets)
        torch.manual_seed(0)
        settings = {"r": 4, "lora_alpha": 8, **lora}
        model = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings))
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                noise = torch.Generator().manual_seed(index)
                parameter.data.copy_(torch.randn(parameter.shape, generator=noise) * 0.1)
    return model, patches


def run(model, mask=None, seed=1):
    """Logits, and the gradient of everything trained, for one batch."""
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    ids = torch.randint(5, 400, (2, 24), generator=generator).to(DEVICE)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(ours, theirs, tolerance=1e-5):
    logits, gradients = ours
    assert (logits - theirs[0]).abs().max() <= tolerance * theirs[0].abs().max()
    assert gradients.keys() == theirs[1].keys() and gradients
    for name, gradient in theirs[1].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert (gradients[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize(
    "targets", [ALL, ["q_proj", "v_proj"], ["o_proj", "gate_proj", "up_proj"], ["down_proj"]]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_stock_layer(family, targets, calls):
    if not names_in(family, targets):
        pytest.skip("this family has experts in the place of these linears")
    ours, theirs = run(build(family, targets, True)[0]), run(build(family, targets, False)[0])
    assert len(calls) == 2
    assert_equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows(family, calls):
    mask = torch.ones(2, 24, dtype=torch.long, device=DEVICE)
    mask[1, 15:] = 0
    ours, theirs = run(build(family, ALL, True)[0], mask), run(build(family, ALL, False)[0], mask)
    assert len(calls) == 2
    real = mask.bool()
    assert_equal((ours[0][real], ours[1]), (theirs[0][real], theirs[1]))


def test_rank_stabilised_scales_and_recompute(calls):
    ours, theirs = (build("llama", ALL, fused, use_rslora=True)[0] for fused in (True, False))
    ours.train()
    ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": False}) if not hasattr(
        ours.get_base_model(), "activation_checkpointing_enable"
    ) else ours.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    assert_equal(run(ours), run(theirs))
    assert len(calls) == 4  # once more in the backward


@pytest.mark.parametrize("lora", [dict(use_dora=True), dict(bias="all")])
def test_what_it_does_not_cover_runs_the_stock_layer(lora, calls):
    model = build("llama", ALL, True, **lora)[0].train()
    ours = run(model)
    assert len(calls) == (2 if lora == dict(bias="all") else 0)
    assert_equal(ours, run(build("llama", ALL, False, **lora)[0].train()))


def test_disabling_the_adapter_acts_at_once():
    ours, theirs = (build("llama", ALL, fused)[0] for fused in (True, False))
    ids = torch.arange(5, 29, device=DEVICE)[None]
    with torch.no_grad():
        for model in (ours, theirs):
            model.adapted = model(input_ids=ids).logits
            with model.disable_adapter():
                model.plain = model(input_ids=ids).logits
    assert torch.allclose(ours.plain, theirs.plain, atol=1e-5) and torch.allclose(
        ours.adapted, theirs.adapted, atol=1e-5
    )
    assert not torch.allclose(ours.plain, ours.adapted, atol=1e-2)


def test_generation_equals_stock_and_undoing_restores_the_layers():
    ours, patches = build("llama", ALL, True)
    theirs, _ = build("llama", ALL, False)
    ids = torch.arange(5, 20, device=DEVICE)[None]
    ours.eval(), theirs.eval()
    assert torch.equal(
        ours.generate(input_ids=ids, max_new_tokens=8, do_sample=False),
        theirs.generate(input_ids=ids, max_new_tokens=8, do_sample=False),
    )
    assert any(isinstance(module, FusedDecoderLayer) for module in ours.modules())
    names = list(ours.state_dict())
    patches.revert()
    assert not any(isinstance(module, FusedDecoderLayer) for module in ours.modules())
    assert list(ours.state_dict()) == names == list(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_autocast_to_another_dtype_runs_the_stock_layer(calls):
    ours, theirs = (build("llama", ALL, fused)[0] for fused in (True, False))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_equal(run(ours), run(theirs), tolerance=0.05)
    assert not calls
