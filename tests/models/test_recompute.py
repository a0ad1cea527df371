"""Recompute: who decides, and that it is really switched."""

from __future__ import annotations

import pytest
import torch

from pantheraml import FastLanguageModel
from pantheraml.errors import ConfigError, NotYetError
from pantheraml.models.recompute import check_policy, is_recompute_on, is_recomputing, set_recompute
from tests import tiny

IDS = torch.arange(5, 29)[None]


@pytest.mark.parametrize("policy", [True, False, "auto", "unsloth"])
def test_known_policies(policy):
    assert check_policy(policy) is policy


@pytest.mark.parametrize("policy", [None, 1, 0, "yes", "on", "True", []])
def test_unknown_policies(policy):
    with pytest.raises(ConfigError, match="use_gradient_checkpointing="):
        check_policy(policy)


def test_offloading_is_for_later():
    with pytest.raises(NotYetError, match="Use True"):
        check_policy("offload")


@pytest.mark.parametrize(
    ("policy", "on_gpu", "on_cpu"),
    [(True, True, True), (False, False, False), ("auto", True, False), ("unsloth", True, True)],
)
def test_who_recomputes(policy, on_gpu, on_cpu):
    assert (is_recompute_on(policy, "cuda"), is_recompute_on(policy, "cpu")) == (on_gpu, on_cpu)


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


@pytest.mark.parametrize("policy", [True, False, "auto", "unsloth"])
def test_the_policy_reaches_training(llama, policy):
    def load(**flags):
        return FastLanguageModel.from_pretrained(
            str(llama), max_seq_length=64, load_in_4bit=False, device_map="cpu", **flags
        )[0]

    on = is_recompute_on(policy, "cpu")
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
