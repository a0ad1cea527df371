"""What is known about a loaded model stays with it, also through wrappers."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from pantheraml import FastLanguageModel
from pantheraml.models.families import find_family
from pantheraml.models.patching import PatchSet
from pantheraml.models.precision import Precision
from pantheraml.models.state import get_state, set_state
from tests import tiny


def load(llama, **flags):
    flags = {"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **flags}
    return FastLanguageModel.from_pretrained(str(llama), **flags)[0]


def test_facts_of_a_loaded_model(llama):
    state = get_state(load(llama, use_gradient_checkpointing="unsloth"))
    assert state.source.name == str(llama) and state.source.folder == llama and state.source.adapter is None
    assert (state.max_seq_length, state.recompute, state.full_finetuning) == (64, "unsloth", False)
    assert state.precision == Precision("plain", torch.float32)
    assert state.family is find_family(tiny.build_model().config)
    assert get_state(load(llama, full_finetuning=True)).full_finetuning


def test_a_plain_model_has_none():
    model = tiny.build_model()
    assert get_state(model) is None
    model.pantheraml_state = "something else"
    assert get_state(model) is None


def test_an_adapter_shares_the_state_of_its_base(llama):
    base = load(llama)
    adapted = FastLanguageModel.get_peft_model(
        base, r=2, max_seq_length=128, use_gradient_checkpointing=False
    )
    assert get_state(adapted) is get_state(base)
    assert (get_state(base).max_seq_length, get_state(base).recompute) == (128, False)


def test_a_copy_has_a_state_of_its_own(llama):
    model = load(llama)
    twin = copy.deepcopy(model)
    assert get_state(twin) is not get_state(model)
    get_state(twin).max_seq_length = 7
    assert get_state(model).max_seq_length == 64
    get_state(twin).patches.revert()
    assert not hasattr(twin, "save_pretrained_merged") and hasattr(model, "save_pretrained_merged")


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_a_model_can_be_pickled(checkpoints, family):
    model = load(checkpoints(family))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert get_state(again).family == get_state(model).family is not None
    ids = torch.arange(5, 20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_state_can_be_given_to_any_model():
    model, state = tiny.build_model(), get_state
    known = ["weights", PatchSet()]
    assert state(model) is None
    set_state(model, known)
    assert state(model) is None, "only a ModelState counts"
