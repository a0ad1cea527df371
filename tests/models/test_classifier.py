"""Sequence classifiers, such as reward models: built with num_labels, and found again where they were saved."""

from __future__ import annotations

import pytest
import torch

from pantheraml import FastLanguageModel
from pantheraml.errors import ConfigError

IDS = torch.arange(5, 25)[None]


def load(name, **options):
    model, _ = FastLanguageModel.from_pretrained(
        str(name), max_seq_length=64, load_in_4bit=False, device_map="cpu", **options
    )
    return model


def scores(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_the_new_head_depends_on_random_state_alone(llama):
    one, same, other = (load(llama, num_labels=3, random_state=seed) for seed in (1, 1, 2))
    assert scores(one).shape == (1, 3)
    assert torch.equal(scores(one), scores(same)) and not torch.equal(scores(one), scores(other))


@pytest.mark.parametrize("adapted", [True, False])
def test_a_saved_classifier_is_loaded_as_one(llama, tokenizer, tmp_path, adapted):
    model = load(llama, num_labels=1, random_state=1)
    if adapted:
        model = FastLanguageModel.get_peft_model(model, r=2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    model.save_pretrained(tmp_path / "saved", tokenizer)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, dtype="float32")
    assert torch.equal(scores(load(tmp_path / "saved")), scores(model))
    assert torch.allclose(scores(load(tmp_path / "merged")), scores(model), atol=1e-5)
    assert scores(load(llama)).shape[-1] > 1, "a language model stays one"


def test_another_number_of_labels_than_saved_is_refused(llama, tokenizer, tmp_path):
    load(llama, num_labels=2).save_pretrained(tmp_path / "saved", tokenizer)
    with pytest.raises(ConfigError, match="was saved with 2"):
        load(tmp_path / "saved", num_labels=3)
