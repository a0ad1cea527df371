"""The fused experts compute what the stock mixture with PEFT computes: outputs, loss, every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pantheraml import FastLanguageModel
from pantheraml.models.families import find_family
from pantheraml.models.fused import apply_fused_parts, apply_layers, expert_layers
from pantheraml.models.fused.experts import ExpertsFunction, FusedMixture, apply_experts
from pantheraml.models.patching import PatchSet
from tests import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
# Sizes that tensor cores take, so that the same file runs on a GPU.
SIZES = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
MOE = {"qwen3_moe": dict(moe_intermediate_size=64, num_experts=8, num_experts_per_tok=3)}
ATTENTION = ["q_proj", "v_proj"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = {"mixtral": "gate", "qwen3_moe": "gate", "gpt_oss": "router"}


def randomise(model, kinds):
    """Ones and zeros hide mistakes."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if any(kind in name for kind in kinds):
            noise = torch.Generator().manual_seed(index)
            scale = 0.5 if "limit" in name or "router" in name or "gate.weight" in name else 0.1
            parameter.data += (scale * torch.randn(parameter.shape, generator=noise)).to(parameter)


def build(family, fused, *, parameters=None, modules=None, router=False, sizes=None, **lora):
    """A tiny model, fused or not, with an adapter unless nothing is named."""
    model = tiny.build_model(family, **{**SIZES, **MOE.get(family, {}), **(sizes or {})}).to(DEVICE)
    randomise(model, ("norm", "bias", "gate.weight", "router.weight", "experts"))
    if DEVICE == "cuda":  # transformers' faster ways ask for bf16 there
        model.config._experts_implementation = "eager"
    patches = PatchSet()
    if fused:
        apply_experts(model, find_family(model.config), patches, on_cpu=True)
    if parameters or modules:
        torch.manual_seed(0)
        config = LoraConfig(
            target_modules=modules or [],
            target_parameters=parameters,
            task_type="CAUSAL_LM",
            **{"r": 4, "lora_alpha": 8, **lora},
        )
        model = get_peft_model(model, config)
        randomise(model, ("lora_",))
    for name, parameter in model.named_parameters():
        if router and f"{ROUTER[family]}.weight" in name:
            parameter.requires_grad_()
    return model, patches


def run(model, mask=None):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 400, (2, 24), generator=generator).to(DEVICE)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return output.logits.detach(), output.loss.detach(), gradients


def assert_equal(ours, theirs, tolerance=1e-5):
    assert (ours[0] - theirs[0]).abs().max() <= tolerance * theirs[0].abs().max()
    assert (ours[1] - theirs[1]).abs() <= tolerance * theirs[1].abs()
    assert ours[2].keys() == theirs[2].keys() and ours[2]
    for name, gradient in theirs[2].items():
        if gradient is None:
            assert ours[2][name] is None, name
            continue
        largest = gradient.abs().max()
        assert largest > 0 or "sinks" in name or "k_proj.bias" in name, name
        assert (ours[2][name] - gradient).abs().max() <= tolerance * largest + 1e-9, name


@pytest.fixture
def calls(monkeypatch):
    """How often the fused function ran."""
    count = []
    original = ExpertsFunction.apply
    monkeypatch.setattr(ExpertsFunction, "apply", lambda *a: count.append(1) or original(*a))
    return count


CASES = {
    "experts": dict(parameters=BOTH),
    "gate and up": dict(parameters=BOTH[:1]),
    "down": dict(parameters=BOTH[1:]),
    "experts, attention and router": dict(parameters=BOTH, modules=ATTENTION, router=True),
    "attention": dict(modules=ATTENTION),
    "full": dict(),
    "rank-stabilised": dict(parameters=BOTH, use_rslora=True, r=3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_stock_experts(family, case, calls):
    ours, theirs = (run(build(family, fused, **CASES[case])[0]) for fused in (True, False))
    assert len(calls) == 2
    assert_equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows(family, calls):
    mask = torch.ones(2, 24, dtype=torch.long, device=DEVICE)
    mask[1, 15:] = 0
    ours, theirs = (run(build(family, fused, parameters=BOTH)[0], mask) for fused in (True, False))
    assert len(calls) == 2
    real = mask.bool()
    assert_equal((ours[0][real], *ours[1:]), (theirs[0][real], *theirs[1:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_then_swap_equals_swap_then_adapter(family, calls):
    first, _ = build(family, True, parameters=BOTH)
    second, _ = build(family, False, parameters=BOTH)
    patches = apply_experts(second, find_family(second.config), PatchSet(), on_cpu=True)
    assert len(patches.report()) == 2
    for ours, theirs in zip(run(first)[:2], run(second)[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert len(calls) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_inside_fused_layers(family, calls):
    """Attention halves and experts fused together, then all undone."""
    arguments = dict(parameters=BOTH, modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    ours, theirs = (build(family, False, **arguments)[0] for _ in range(2))
    before = logits(ours)
    patches = apply_layers(ours.get_base_model(), find_family(ours.config), PatchSet(), on_cpu=True)
    apply_experts(ours.get_base_model(), find_family(ours.config), patches, on_cpu=True)
    assert_equal(run(ours), run(theirs), tolerance=3e-5)  # the rounding of both parts adds up
    assert len(calls) == 2
    ours.zero_grad(), theirs.zero_grad()
    patches.revert()
    assert torch.equal(logits(ours), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_stock_and_undoing_restores_the_blocks(family, calls):
    ours, patches = build(family, True, parameters=BOTH)
    theirs, _ = build(family, False, parameters=BOTH)
    ids = torch.arange(5, 20, device=DEVICE)[None]
    options = dict(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(**options), theirs.generate(**options))
    assert len(calls) > 8
    names = list(ours.state_dict())
    assert sorted(names) == sorted(theirs.state_dict())  # PEFT's own forward reorders a module's parameters
    assert sum(isinstance(module, FusedMixture) for module in ours.modules()) == 2
    patches.revert()
    assert not any(isinstance(module, FusedMixture) for module in ours.modules())
    assert list(ours.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 29, device=DEVICE)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_disabling_merging_and_a_second_adapter_act_at_once(family, calls):
    ours, theirs = (build(family, fused, parameters=BOTH)[0] for fused in (True, False))
    plain = []
    for model in (ours, theirs):
        with model.disable_adapter():
            plain.append(logits(model))
    adapted = [logits(model) for model in (ours, theirs)]
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*plain, **close)
    torch.testing.assert_close(*adapted, **close)
    assert not torch.allclose(plain[0], adapted[0], atol=1e-3)

    for model in (ours, theirs):
        model.merge_adapter()
    torch.testing.assert_close(logits(ours), logits(theirs), **close)
    torch.testing.assert_close(logits(ours), adapted[0], **close)
    for model in (ours, theirs):
        model.unmerge_adapter()
    torch.testing.assert_close(logits(ours), adapted[0], **close)
    assert len(calls) == 2 * 5

    for model in (ours, theirs):  # two at once: the stock path
        torch.manual_seed(5)
        model.add_adapter("other", model.peft_config["default"])
        randomise(model, ("lora_B.other",))
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(ours), logits(theirs), **close)
    assert len(calls) == 2 * 5


def test_recompute(calls):
    ours, theirs = (build("qwen3_moe", fused, parameters=BOTH)[0] for fused in (True, False))
    inner = ours.get_base_model()
    prefix = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
    ours.train(), theirs.train()
    getattr(inner, f"{prefix}_checkpointing_enable")(
        **{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
    )
    assert_equal(run(ours), run(theirs))
    assert len(calls) == 4  # once more in the backward


def test_jitter_and_other_dtypes_run_the_stock_block(calls):
    model, _ = build("mixtral", True, parameters=BOTH)
    plain, _ = build("mixtral", False, parameters=BOTH)
    for one in (model, plain):
        for layer in one.get_base_model().model.layers:
            layer.mlp.jitter_noise = 0.1
    results = []
    for one in (model.train(), plain.train()):
        torch.manual_seed(3)
        results.append(run(one))
    assert_equal(*results)
    assert not calls
    model, _ = build("mixtral", True, parameters=BOTH)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        run(model)
    assert not calls


def test_a_copy_is_fused_too(calls):
    model, _ = build("qwen3_moe", True, parameters=BOTH)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(model), logits(twin))
    assert len(calls) == 4
    with torch.no_grad():
        next(p for n, p in twin.named_parameters() if "lora_B" in n).add_(1)
    assert not torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_follows_the_same_curve(family, calls):
    # At a higher rate a token soon changes experts by the last bit of a sum, and the curves part for good.
    curves = []
    for fused in (True, False):
        model, _ = build(family, fused, parameters=BOTH, modules=ATTENTION)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for step in range(32):
            ids = torch.randint(5, 400, (2, 12), generator=torch.Generator().manual_seed(step % 4)).to(DEVICE)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert len(calls) == 64
    assert curves[1][-4:].mean() < curves[1][:4].mean()
    torch.testing.assert_close(*curves, rtol=1e-5, atol=0)


def test_what_is_left_is_said():
    model = tiny.build_model("mixtral", hidden_act="gelu")
    patches = apply_experts(model, find_family(model.config), PatchSet(), on_cpu=True)
    assert [(path, why) for path, _, why in patches.report()] == [
        ("2 mixtures of experts", "the activation is GELUActivation")
    ]
    patches = apply_experts(model, find_family(model.config), PatchSet())
    assert DEVICE == "cuda" or "Triton needs a GPU" in patches.report()[0].why
    changes = apply_fused_parts(model, find_family(model.config), PatchSet()).report()
    assert sum("mixtures of experts" in change.path for change in changes) == 1
    dense = tiny.build_model("llama")
    assert not apply_experts(dense, find_family(dense.config), PatchSet(), on_cpu=True).report()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the fused parts are there from the start")
def test_a_model_loaded_in_4_bit_has_plain_experts(tmp_path, calls):
    pytest.importorskip("bitsandbytes")
    tiny.save_checkpoint(tmp_path, "mixtral")
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path), max_seq_length=64, load_in_4bit=True)
    layer = model.model.layers[0]
    assert type(layer.self_attn.q_proj).__name__ == "Linear4bit"
    assert layer.mlp.experts.down_proj.is_floating_point()
    model = FastLanguageModel.get_peft_model(model, r=4)
    randomise(model, ("lora_",))
    stock = run(model.train())
    model.zero_grad(set_to_none=True)
    apply_experts(model, find_family(model.config), PatchSet(), on_cpu=True)
    assert_equal(run(model), stock)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda experts: experts.register_forward_hook(lambda *_: None), "hooks"),
        (lambda experts: setattr(experts, "_is_expert_parallel", True), "spread over several GPUs"),
        (lambda experts: setattr(experts.down_proj, "data", experts.down_proj.data.half()), "dtypes"),
    ],
)
def test_experts_that_are_not_read(change, reason):
    experts = tiny.build_model("mixtral").model.layers[0].mlp.experts
    assert isinstance(expert_layers.read_experts(experts), expert_layers.Experts)
    change(experts)
    assert reason in expert_layers.read_experts(experts)
