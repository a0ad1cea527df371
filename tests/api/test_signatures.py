"""What scripts import and call: no name or parameter changes by accident, and import order plays no part."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest

from tests.api.surface import lines, stored, surface

ROOT = Path(__file__).parents[2]

# Names of the guides for one device, and where their scripts import them from.
GUIDES = {
    "pantheraml": [
        "FastLanguageModel",
        "FastModel",
        "PantheraMLTrainer",
        "PantheraMLTrainingArguments",
        "UnslothTrainer",
        "UnslothTrainingArguments",
        "disable_multi_gpu",
        "enable_multi_gpu",
        "get_active_config",
        "get_chat_template",
        "get_multi_gpu_status",
        "is_bfloat16_supported",
        "is_multi_gpu_enabled",
        "standardize_data_formats",
        "standardize_sharegpt",
        "to_sharegpt",
        "train_on_responses_only",
    ],
    "pantheraml.chat_templates": [
        "get_chat_template",
        "standardize_data_formats",
        "standardize_sharegpt",
        "to_sharegpt",
        "train_on_responses_only",
    ],
    "pantheraml.kernels.utils": [
        "clear_gpu_cache",
        "get_current_gpu_index",
        "get_gpu_memory_info",
        "set_gpu_device",
    ],
    "pantheraml.core": ["AggregationMethod", "MultiGPUTrainer"],
    "pantheraml.utils": ["ConfigManager", "DeviceManager", "MemoryManager"],
}


def test_the_surface_is_the_stored_one():
    difference = list(
        difflib.unified_diff(lines(stored()), lines(surface()), "stored", "now", lineterm="", n=0)
    )
    assert not difference, "\n".join(
        ["", *difference, "", "If this is meant: python -m tests.api.accept, and a line in CHANGELOG.md."]
    )


@pytest.mark.promise("A1")
@pytest.mark.parametrize(("module", "name"), [(module, name) for module in GUIDES for name in GUIDES[module]])
def test_the_guides_names_are_where_the_guides_import_them(module, name):
    assert callable(getattr(import_module(module), name))


@pytest.mark.promise("A1", "A13")
def test_each_name_is_one_thing_wherever_it_is_imported_from():
    for module in ("pantheraml.chat_templates",):
        for name in GUIDES[module]:
            assert getattr(import_module(module), name) is getattr(import_module("pantheraml"), name)
    pantheraml = import_module("pantheraml")
    assert import_module("pantheraml.core").MultiGPUTrainer is pantheraml.MultiGPUTrainer
    assert pantheraml.UnslothDistributedTrainer is pantheraml.PantheraMLDistributedTrainer
    assert pantheraml.UnslothTrainer is pantheraml.PantheraMLTrainer
    assert pantheraml.UnslothTrainingArguments is pantheraml.PantheraMLTrainingArguments
    with pytest.raises(AttributeError, match="has no attribute 'FastVisionModel'"):
        pantheraml.FastVisionModel


TRAINING = """
import importlib, json, logging, os, sys
order, checkpoint, folder = sys.argv[1].split(","), *sys.argv[2:]
for name in order:
    importlib.import_module(name)
from datasets import Dataset
from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments

model, tokenizer = FastLanguageModel.from_pretrained(
    checkpoint, max_seq_length=64, load_in_4bit=False, device_map="cpu")
model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1)
rows = Dataset.from_dict({"text": ["one two three four five", "six seven", "eight nine ten", "eleven"]})
args = PantheraMLTrainingArguments(output_dir=folder, max_steps=2, per_device_train_batch_size=2, logging_steps=1,
    learning_rate=1e-2, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True)
trainer = PantheraMLTrainer(model, args, train_dataset=rows, tokenizer=tokenizer)
trainer.train()
print("RESULT", json.dumps([[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history[:2]]))
"""
# The first and the last way that there is to begin, and two in between; ranks in two orders are tried in tests/launch.
ORDERS = [
    "pantheraml,torch,transformers,peft,trl",
    "trl,peft,transformers,torch,pantheraml",
    "transformers,pantheraml,trl,torch,peft",
    "peft,torch,pantheraml,transformers,trl",
]


@pytest.mark.promise("B3")
@pytest.mark.slow
def test_the_order_of_imports_changes_no_number(llama, tmp_path):
    def train(order: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", TRAINING, order, str(llama), str(tmp_path / order)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split("RESULT ")[1]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(train, ORDERS))
    losses = json.loads(results[0])
    assert len(losses) == 2 and losses[0] != losses[1] and all(value > 0 for pair in losses for value in pair)
    assert results == [results[0]] * len(ORDERS)
