"""A step that is not finite leaves weights and optimizer alone on a GPU, by fused optimizers, others, and a scaler."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

MARKER = 401


class Kept(TrainerCallback):
    """Trained weights and the optimizer's state after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        moments = [
            value.clone()
            for one in optimizer.state.values()
            for value in one.values()
            if isinstance(value, torch.Tensor)
        ]
        self.after[state.global_step] = weights + moments


@pytest.mark.parametrize(
    "settings",
    [{}, dict(optim="adamw_8bit"), dict(optim="adamw_torch"), dict(fp16=True, bf16=False)],
)
def test_a_step_is_left_out(llama, tmp_path, caplog, settings):
    fp16 = "fp16" in settings
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(llama), 64, load_in_16bit=True, dtype="float16" if fp16 else None
    )
    model = FastLanguageModel.get_peft_model(model, r=8)
    rows = [[*range(5, 25)] for _ in range(16)]
    rows[9][3] = MARKER  # in step 5 of 8, of two rows each
    args = PantheraMLTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=8, logging_steps=4, save_strategy="no",
        report_to="none", disable_tqdm=True, train_sampling_strategy="sequential", on_non_finite="skip", **settings,
    )  # fmt: skip
    kept = Kept()
    trainer = PantheraMLTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        tokenizer=tokenizer,
        callbacks=[kept],
    )

    def spoil(module, inputs, output):
        return output.masked_fill((inputs[0] == MARKER)[..., None], math.nan)

    model.get_input_embeddings().register_forward_hook(spoil)
    with caplog.at_level("INFO", "pantheraml"):
        trainer.train()
    assert "The loss of step 5 is nan for rows 8, 9. The step is left out." in caplog.text
    assert caplog.text.count("left out") == 1
    changed = [
        any(not torch.equal(a, b) for a, b in zip(kept.after[step - 1], kept.after[step], strict=True))
        for step in range(2, 9)
    ]
    assert changed[3] is False, "step 5"
    assert fp16 or changed == [True, True, True, False, True, True, True]
    assert all(value.isfinite().all() for value in kept.after[8] if value.is_floating_point())
    assert trainer.state.log_history[1]["skipped_steps"] == 1
