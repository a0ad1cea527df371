"""The ledger of swaps on one model instance."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from torch import nn

from pantheraml.errors import ConfigError
from pantheraml.models.patching import PatchSet
from tests import tiny

NORM = "model.layers.0.input_layernorm"
MLP = "model.layers.1.mlp"
IDS = torch.arange(12).reshape(1, 12) + 5


class Doubled(nn.Module):
    """Twice what the old norm gives, on the same weight."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.weight = old.weight
        self.eps = old.variance_epsilon

    def forward(self, x):
        return 2 * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class HalvedMLP(nn.Module):
    """Half an MLP's output, on the same children; the activation child is not registered."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = old.gate_proj, old.up_proj, old.down_proj

    def forward(self, x):
        return 0.5 * self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def greet(model, word):
    """Say hello."""
    return f"{word} from {type(model).__name__} {id(model)}"


@pytest.fixture
def model():
    return tiny.build_model("llama")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def swap_norm(model, patchset):
    patchset.replace(model, NORM, Doubled(model.get_submodule(NORM)), "twice as good")


def test_changes_act_and_revert_is_bitwise(model):
    before, names, ids = logits(model), list(model.state_dict()), [id(p) for p in model.parameters()]
    stock = model.config._attn_implementation
    patchset = PatchSet()
    swap_norm(model, patchset)
    patchset.replace(model, MLP, HalvedMLP(model.get_submodule(MLP)), "half is enough")
    patchset.bind(model, "greet", greet, "to be polite")
    patchset.set(model.config, "_attn_implementation", "eager", "to see the mask")
    patchset.skip("model.norm", "left for later")

    assert not torch.allclose(logits(model), before)
    assert model.greet("hello") == f"hello from LlamaForCausalLM {id(model)}"
    assert model.config._attn_implementation == "eager"
    assert list(model.state_dict()) == names and [id(p) for p in model.parameters()] == ids
    assert patchset.report() == [
        (NORM, "LlamaRMSNorm -> Doubled", "twice as good"),
        (MLP, "LlamaMLP -> HalvedMLP", "half is enough"),
        ("LlamaForCausalLM", "greet() added", "to be polite"),
        ("LlamaConfig", "_attn_implementation='eager'", "to see the mask"),
        ("model.norm", "skipped", "left for later"),
    ]

    patchset.revert()
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "greet") and model.config._attn_implementation == stock
    assert type(model.get_submodule(NORM)).__name__ == "LlamaRMSNorm"
    assert list(model.state_dict()) == names and [id(p) for p in model.parameters()] == ids
    assert patchset.report() == []
    patchset.revert()
    assert torch.equal(logits(model), before)


def test_a_bound_name_hides_and_gives_back_a_method(model):
    patchset = PatchSet()
    patchset.bind(model, "num_parameters", lambda owner: "many", "test")
    assert model.num_parameters() == "many"
    patchset.revert()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_a_module_that_does_not_share_is_refused(model):
    before = logits(model)
    norm = model.get_submodule(NORM)
    patchset = PatchSet()
    other_weight = Doubled(norm)
    other_weight.weight = nn.Parameter(norm.weight.detach().clone())
    more = Doubled(norm)
    more.register_buffer("scale", torch.ones(1))
    child = Doubled(norm)
    child.extra = nn.Identity()
    for new, name in ((other_weight, "weight"), (nn.Identity(), "weight"), (more, "scale"), (child, "extra")):
        with pytest.raises(ConfigError, match=rf"{NORM} does not share {name}"):
            patchset.replace(model, NORM, new, "test")
    for value in (nn.Linear(1, 1), torch.ones(1), nn.Parameter(torch.ones(1))):
        with pytest.raises(ConfigError, match="state dict"):
            patchset.set(model, "extra", value, "test")
    with pytest.raises(ConfigError, match="state dict"):
        patchset.set(model, "lm_head", None, "test")
    assert patchset.report() == [] and torch.equal(logits(model), before)


def test_one_spot_has_one_ledger(model):
    first, second = PatchSet(), PatchSet()
    swap_norm(model, first)
    first.set(model.config, "_attn_implementation", "eager", "test")
    doubled = model.get_submodule(NORM)
    again = copy.copy(doubled)
    with pytest.raises(ConfigError, match=r"already changed \(LlamaRMSNorm -> Doubled\)"):
        second.replace(model, NORM, again, "test")
    with pytest.raises(ConfigError, match="already changed"):
        second.set(model.config, "_attn_implementation", "sdpa", "test")
    assert model.get_submodule(NORM) is doubled and model.config._attn_implementation == "eager"
    first.revert()
    swap_norm(model, second)


def test_revert_keeps_what_came_later(model):
    patchset = PatchSet()
    swap_norm(model, patchset)
    later = nn.LayerNorm(64)
    model.model.layers[0].input_layernorm = later
    with pytest.raises(ConfigError, match=f"{NORM} no longer holds"):
        patchset.revert()
    assert model.model.layers[0].input_layernorm is later


def test_a_forward_put_there_by_another_library_is_not_lost(model):
    norm = model.get_submodule(NORM)
    norm.forward = lambda x: x
    with pytest.raises(ConfigError, match="Another library"):
        swap_norm(model, PatchSet())


def test_hooks_and_training_flag_move_both_ways(model):
    calls = []
    old = model.get_submodule(NORM)
    first = old.register_forward_hook(lambda module, args, out: calls.append("first"))
    model.train()
    patchset = PatchSet()
    swap_norm(model, patchset)
    new = model.get_submodule(NORM)
    assert new.training
    new.register_forward_pre_hook(lambda module, args: calls.append("second"))
    logits(model)
    assert calls == ["second", "first"]
    first.remove()
    model.eval()
    patchset.revert()
    calls.clear()
    logits(model)
    assert calls == ["second"] and old.training is False


# PEFT 0.21 asks transformers 5.23 by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_added_after_a_swap_survives_revert(model):
    from peft import LoraConfig, get_peft_model

    patchset = PatchSet()
    patchset.replace(model, MLP, HalvedMLP(model.get_submodule(MLP)), "test")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    patchset.revert()
    assert type(model.get_submodule(MLP)).__name__ == "LlamaMLP"
    with_adapter = logits(adapted)
    with adapted.disable_adapter():
        assert not torch.allclose(logits(adapted), with_adapter)
    assert "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight" in adapted.state_dict()


def test_a_deep_copy_is_a_model_of_its_own(model):
    patchset = PatchSet()
    swap_norm(model, patchset)
    patchset.bind(model, "greet", greet, "to be polite")
    patched = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), patched)
    assert twin.greet("hi") == f"hi from LlamaForCausalLM {id(twin)}"
    with torch.no_grad():
        twin.get_submodule(NORM).weight.zero_()
    assert torch.equal(logits(model), patched)
    patchset.revert()
    assert type(twin.get_submodule(NORM)).__name__ == "Doubled"


def test_a_deep_copy_carries_its_own_ledger(model):
    before = logits(model)
    patchset = PatchSet()
    patchset.set(model, "ledger", patchset, "to find it again")
    swap_norm(model, patchset)
    patchset.set(model.config, "_attn_implementation", "eager", "test")
    patched = logits(model)
    twin = copy.deepcopy(model)
    with pytest.raises(ConfigError, match="already changed"):
        PatchSet().set(twin.config, "_attn_implementation", "sdpa", "test")
    twin.ledger.revert()
    assert torch.equal(logits(twin), before) and torch.equal(logits(model), patched)
    assert model.config._attn_implementation == "eager" != twin.config._attn_implementation
    patchset.revert()
    assert torch.equal(logits(model), before)


def test_a_patched_model_can_be_pickled(model):
    patchset = PatchSet()
    swap_norm(model, patchset)
    patchset.bind(model, "greet", greet, "to be polite")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again), logits(model))
    assert again.greet("hi") == f"hi from LlamaForCausalLM {id(again)}"


def test_a_saved_checkpoint_does_not_know(model, tmp_path):
    from transformers import AutoModelForCausalLM

    before = logits(model)
    patchset = PatchSet()
    swap_norm(model, patchset)
    patchset.set(model.config, "_attn_implementation", "eager", "test")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), before)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()


def test_a_ledger_that_is_gone_frees_its_spots(model):
    swap_norm(model, PatchSet())
    gc.collect()
    doubled = model.get_submodule(NORM)

    class Again(Doubled):
        def __init__(self, old):
            nn.Module.__init__(self)
            self.weight, self.eps = old.weight, old.eps

    patchset = PatchSet()
    patchset.replace(model, NORM, Again(doubled), "on top")
    patchset.revert()
    assert model.get_submodule(NORM) is doubled
