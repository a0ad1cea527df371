"""Loaded models can be copied and pickled, as trainers do to keep a reference or to reach another process."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from pantheraml import FastLanguageModel
from pantheraml.models.state import get_state


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_saves_itself(checkpoints, tmp_path, family, duplicate):
    def load(name):
        model, _ = FastLanguageModel.from_pretrained(
            str(name), max_seq_length=64, load_in_4bit=False, device_map="cpu"
        )
        return model

    @torch.no_grad()
    def logits(model):
        return model.eval()(input_ids=torch.arange(5, 25)[None]).logits

    model = FastLanguageModel.get_peft_model(load(checkpoints(family)), r=2)
    before = logits(model)
    twin = duplicate(model)
    assert torch.equal(logits(twin), before)
    assert get_state(twin) is not get_state(model) and get_state(twin).family == get_state(model).family

    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(0.01 if weight.requires_grad else 0)
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(logits(load(tmp_path / "twin")), logits(twin))
    assert torch.equal(logits(model), before)
