"""A run goes on with all weights that it has saved, also those that a published checkpoint has in pieces."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.errors import CheckpointError
from pantheraml.models.saved_weights import has_other_names, load_weights
from tests import tiny


def trainer_of(folder, output, **settings):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=32, full_finetuning=True, dtype="float32", device_map="cpu"
    )
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 400, (24,), generator=generator).tolist() for _ in range(8)]
    data = Dataset.from_dict({"input_ids": rows})
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, max_steps=4, save_steps=2, logging_steps=1, bf16=False,
        learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip
    return PantheraMLTrainer(model, args, train_dataset=data, eval_dataset=data, tokenizer=tokenizer)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_a_fully_trained_model_goes_on_bit_by_bit(tmp_path, family):
    folder = tiny.save_checkpoint(tmp_path / family, family)
    run = trainer_of(folder, tmp_path / "run")
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert has_other_names(run.model, checkpoint) == (family == "mixtral")
    again = trainer_of(folder, tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again)[2:] == losses(run)[2:]
    for mine, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_best_model_is_loaded_with_its_experts(tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "mixtral", "mixtral")
    # The first look has the higher loss, which is asked for: the last weights are not the best ones.
    trainer = trainer_of(
        folder, tmp_path / "run", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_weights_that_are_missing_are_named(tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "llama", "llama")
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), full_finetuning=True, dtype="float32", device_map="cpu"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"lacks 21 weights of the model: lm_head\.weight"):
        load_weights(model, tmp_path / "empty")
