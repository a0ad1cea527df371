"""Models with a vision tower: their language model is trained, the tower stays as it is."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from tests import tiny

IDS = torch.arange(8, 40)[None]


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A tiny Gemma 3 as its larger checkpoints are: with a SigLIP tower and a projector."""
    folder = tmp_path_factory.mktemp("gemma3")
    text = {**tiny._SIZES, **tiny.FAMILIES["gemma3_text"]}
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5, boi_token_index=6,
        eoi_token_index=7,
    )  # fmt: skip
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def load(gemma3):
    def load(folder=gemma3, **flags):
        return FastLanguageModel.from_pretrained(
            str(folder), **{"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **flags}
        )

    return load


def adapted(model) -> set[str]:
    return {name.partition(".lora_")[0] for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    "targets", [None, "all-linear", ["q_proj", "up_proj"], ["gate_proj"], r".*language_model.*\.o_proj"]
)
def test_only_the_language_model_is_adapted(load, targets):
    model = FastLanguageModel.get_peft_model(load()[0], r=4, target_modules=targets)
    found = adapted(model)
    assert found and all("language_model.layers" in name for name in found)
    if targets in (None, "all-linear"):
        assert len(found) == 14
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_it_trains_saves_and_comes_back(load, tmp_path, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    model, tokenizer = load()
    assert "image tokens see each other in both directions" in caplog.text
    assert model.config.get_text_config().pad_token_id == tokenizer.pad_token_id
    model = FastLanguageModel.get_peft_model(model, r=4)
    rows = Dataset.from_dict({"text": ["one two three", "four five six"]})
    arguments = PantheraMLTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, learning_rate=0.02, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = PantheraMLTrainer(model, arguments, train_dataset=rows, tokenizer=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        model.save_pretrained(tmp_path / "adapter", tokenizer)
        assert torch.equal(load(tmp_path / "adapter")[0].eval()(input_ids=IDS).logits, expected)
        model.save_pretrained_merged(tmp_path / "merged", tokenizer, dtype="float32")
        merged = load(tmp_path / "merged")[0].eval()(input_ids=IDS).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
