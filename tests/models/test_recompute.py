"""Recompute: who decides, and that it is really switched."""

from __future__ import annotations

import pytest
import torch

from pantheraml import FastLanguageModel
from pantheraml.errors import ConfigError
from pantheraml.models.recompute import (
    apply_plan,
    is_recompute_forced,
    is_recomputing,
    sections,
    set_recompute,
)
from pantheraml.models.recompute_plan import RecomputePlan
from pantheraml.models.request import check_policy
from pantheraml.models.state import get_state
from tests import tiny

IDS = torch.arange(5, 29)[None]


@pytest.mark.parametrize("policy", [True, False, "auto", "offload", "unsloth"])
def test_known_policies(policy):
    assert check_policy(policy) is policy


@pytest.mark.parametrize("policy", [None, 1, 0, "yes", "on", "True", []])
def test_unknown_policies(policy):
    with pytest.raises(ConfigError, match="use_gradient_checkpointing="):
        check_policy(policy)


@pytest.mark.parametrize(
    ("policy", "forced"),
    [(True, True), (False, False), ("auto", False), ("offload", True), ("unsloth", True)],
)
def test_who_recomputes_whatever_is_free(policy, forced):
    assert is_recompute_forced(policy) is forced


def forwards_of_a_step(model) -> int:
    """How often the first MLP is computed in one training step."""
    calls = []
    mlp = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    handle = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()
    model(IDS, labels=IDS).loss.backward()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("adapted", [False, True])
def test_layers_are_computed_twice(adapted):
    model = tiny.build_model()
    if adapted:
        model = FastLanguageModel.get_peft_model(model, r=2)
    assert not is_recomputing(model) and forwards_of_a_step(model) == 1
    set_recompute(model, True)
    assert is_recomputing(model) and forwards_of_a_step(model) == 2
    set_recompute(model, False)
    assert not is_recomputing(model) and forwards_of_a_step(model) == 1


@pytest.fixture
def load(llama):
    def load(**flags):
        return FastLanguageModel.from_pretrained(
            str(llama), max_seq_length=64, load_in_4bit=False, device_map="cpu", **flags
        )[0]

    return load


@pytest.mark.parametrize("policy", [True, False, "auto", "offload", "unsloth"])
def test_the_policy_reaches_training(load, policy):
    on = is_recompute_forced(policy)
    model = FastLanguageModel.get_peft_model(load(use_gradient_checkpointing=policy), r=2)
    assert is_recomputing(FastLanguageModel.for_training(model)) is on
    assert is_recomputing(FastLanguageModel.for_inference(model)) is False
    # get_peft_model has the later word, for_training the last one.
    model = FastLanguageModel.get_peft_model(
        load(use_gradient_checkpointing=not on), r=2, use_gradient_checkpointing=policy
    )
    assert is_recomputing(FastLanguageModel.for_training(model)) is on
    assert is_recomputing(FastLanguageModel.for_training(model, use_gradient_checkpointing=not on)) is not on
    assert is_recomputing(FastLanguageModel.for_training(model)) is not on, "what was said last stays"


@pytest.mark.parametrize(("policy", "forwards"), [(True, 2), (False, 1), ("auto", 1), ("offload", 2)])
def test_another_librarys_switch_does_not_undo_it(load, policy, forwards):
    model = FastLanguageModel.get_peft_model(load(use_gradient_checkpointing=policy), r=2)
    set_recompute(model, forwards == 1)  # as TRL's default would, or its opposite
    assert forwards_of_a_step(model) == forwards
    set_recompute(model, forwards == 1)
    assert forwards_of_a_step(model) == forwards


def test_a_longer_batch_is_planned_anew(load):
    model = FastLanguageModel.get_peft_model(load(use_gradient_checkpointing=True), r=2).train()
    state = get_state(model)
    seen = []
    for length in (8, 4, 24, 20):
        model(IDS[:, :length], labels=IDS[:, :length]).loss.backward()
        seen.append(state.plans[0].tokens)
    with torch.no_grad():
        model(IDS.repeat(3, 1))
    assert seen == [8, 8, 24, 24] and state.plans[0].tokens == 24


def test_a_plan_switches_the_first_layers_only(load):
    model = load()
    state = get_state(model)
    apply_plan(*sections(model, state), state, RecomputePlan(8, layers=1))
    layers = model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert is_recomputing(model)
