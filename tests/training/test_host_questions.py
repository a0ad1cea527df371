"""What the host asks a tensor, it waits for: between two log lines it asks nothing that a device had to answer."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.training.merging import FlatCollator

QUESTIONS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu", "numpy")


class Silence(TrainerCallback):
    """Makes every question an error from the end of step 2 to that of step 4, but those of the collator on the host."""

    def __init__(self, patch):
        self.on, self.steps = False, 0
        collate = FlatCollator.__call__

        def collated(collator, examples):
            with self.lifted():
                return collate(collator, examples)

        patch.setattr(FlatCollator, "__call__", collated)
        for name in QUESTIONS:
            patch.setattr(torch.Tensor, name, self.watched(name, getattr(torch.Tensor, name)))

    @contextmanager
    def lifted(self):
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def watched(self, name, question):
        def ask(tensor, *arguments, **settings):
            assert not self.on, f"the host asks a tensor: {name}"
            return question(tensor, *arguments, **settings)

        return ask

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += self.on
        self.on = 2 <= state.global_step < 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_nothing_between_log_lines(checkpoints, tmp_path, monkeypatch, family, accumulation, ragged):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(checkpoints(family)), max_seq_length=64, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    ids = [list(range(5, 45 - (index % 7 if ragged else 0))) for index in range(40)]
    labels = [[-100] * (index % 3) + row[index % 3 :] for index, row in enumerate(ids)]
    args = PantheraMLTrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, logging_steps=5, save_strategy="no",
        gradient_accumulation_steps=accumulation, merge_micro_batches=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
    trainer = PantheraMLTrainer(model, args, train_dataset=rows, tokenizer=tokenizer)
    with monkeypatch.context() as patch:
        silence = Silence(patch)
        trainer.add_callback(silence)
        trainer.train()
    assert silence.steps == 2 and trainer.state.log_history[-1]["train_loss"] > 0
