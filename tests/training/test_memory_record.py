"""The memory that was predicted and measured is kept as numbers."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.models.memory_estimate import MemoryEstimate
from pantheraml.training.memory_record import memory_record, write_memory_record
from tests import tiny

GIB = 2**30


@pytest.mark.promise("D6")
def test_a_record_has_both_figures_of_every_device():
    one = MemoryEstimate(15 * GIB, 0, GIB, 20 * GIB, slack=2 * GIB, driver=GIB, moment="head and loss")
    devices = {torch.device("cuda", 0): one, torch.device("cuda", 1): one}
    first, second = memory_record(devices, [[34.0, 20.0], [36.5, 19.0]])
    assert (first["device"], first["measured_allocated"]) == ("cuda:0", int(36.5 * GIB))
    assert second["measured_allocated"] == 20 * GIB
    assert (first["predicted_allocated"], first["predicted_reserved"]) == (36 * GIB, 39 * GIB)
    assert sum(first["predicted"].values()) == 39 * GIB and first["moment"] == "head and loss"
    assert memory_record({torch.device("cuda", 0): one})[0]["measured_allocated"] is None


def test_it_is_written_and_a_place_that_cannot_be_written_ends_nothing(tmp_path):
    write_memory_record(tmp_path / "run", [{"device": "cuda:0"}])
    assert json.loads((tmp_path / "run" / "memory.json").read_text()) == [{"device": "cuda:0"}]
    (tmp_path / "file").write_text("")
    write_memory_record(tmp_path / "file", [])


@pytest.fixture
def trainer(tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "model", "llama")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    args = PantheraMLTrainingArguments(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, max_steps=1, save_steps=1, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [list(range(5, 25))] * 2})
    return PantheraMLTrainer(model, args, train_dataset=rows, tokenizer=tokenizer)


def test_checkpoints_and_the_output_folder_have_it(trainer, tmp_path):
    trainer.train()
    (memory,) = json.loads((tmp_path / "run" / "checkpoint-1" / "run.json").read_text())["memory"]
    assert memory["device"] == "cpu" and memory["measured_allocated"] is None
    assert memory["predicted"]["trainable"] == sum(
        p.nbytes for p in trainer.model.parameters() if p.requires_grad
    )
    assert not (tmp_path / "run" / "memory.json").exists(), "a CPU has no peak"
    trainer.tell_peaks(trainer._predicted, [[1.0]])
    (told,) = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert told == memory | {"measured_allocated": GIB}
