"""Checkpoints of runs on a GPU that are written beside the training: of the step they belong to, with fp16's scaler."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.checkpoint.manifest import problems, read_manifest
from pantheraml.checkpoint.run_record import read_totals
from tests import tiny
from tests.distributed.test_parity import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

STEPS = 6


class Witness(TrainerCallback):
    """The state right after a save was begun, before the next step; and that of the scaler when a run begins."""

    def __init__(self, trainer):
        self.trainer, self.found, self.at_begin = trainer, {}, None

    def on_train_begin(self, *_, **__):
        scaler = self.trainer.accelerator.scaler
        self.at_begin = None if scaler is None else scaler.state_dict()

    def on_save(self, args, state, control, model=None, optimizer=None, **_):
        weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
        scaler = self.trainer.accelerator.scaler
        state_of_scaler = None if scaler is None else scaler.state_dict()
        self.found[state.global_step] = weights, copy.deepcopy(optimizer.state_dict()), state_of_scaler


def train(folder, output, load, resume=None, **settings):
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, **load)
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, learning_rate=1e-2, max_steps=STEPS, save_steps=2,
        save_strategy="steps", logging_steps=1, report_to="none", disable_tqdm=True, async_save=True, **settings,
    )  # fmt: skip
    trainer = PantheraMLTrainer(model, args, train_dataset=rows(), tokenizer=tokenizer)
    witness = Witness(trainer)
    trainer.add_callback(witness)
    trainer.train(resume_from_checkpoint=resume)
    return witness


def assert_equal(one, other):
    """The same values; bitsandbytes keeps its 8-bit moments in dictionaries within the state."""
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert_equal(one[name], value)
    elif isinstance(other, torch.Tensor):
        assert torch.equal(one, other.cpu())
    else:
        assert one == other


@pytest.mark.parametrize(
    ("load", "settings"),
    [
        (dict(load_in_16bit=True, dtype="float16"), dict(fp16=True, bf16=False)),
        (dict(load_in_4bit=True), dict(optim="adamw_8bit")),
    ],
)
def test_what_was_copied_is_what_was_so(tmp_path, load, settings):
    folder = tiny.save_checkpoint(tmp_path / "llama", "llama", hidden_size=128, intermediate_size=256)
    witness = train(folder, tmp_path / "run", load, **settings)
    assert list(witness.found) == [2, 4, 6]
    for step, (weights, state, scaler) in witness.found.items():
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        assert problems(checkpoint) == []
        saved = load_file(checkpoint / "adapter_model.safetensors")
        assert len(saved) == len(weights)
        for name, weight in weights.items():
            assert torch.equal(saved[name.replace(".default", "")], weight), (step, name)
        optimizer = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        assert optimizer["state"].keys() == state["state"].keys() and optimizer["state"]
        assert_equal(optimizer["state"], state["state"])
        assert (checkpoint / "scaler.pt").exists() == (scaler is not None) == bool(settings.get("fp16"))
        assert "cuda" in read_manifest(checkpoint).libraries
        assert read_totals(checkpoint).peak_allocated_gib > 0
    again = train(folder, tmp_path / "again", load, str(tmp_path / "run" / "checkpoint-4"), **settings)
    assert again.at_begin == witness.found[4][2]
    assert list(again.found) == [6]
