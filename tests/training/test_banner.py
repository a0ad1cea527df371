"""What a run says before its first step and after its last."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
)
from pantheraml.devices.peak_memory import Outliving
from pantheraml.distributed.strategies.ddp import DDP
from pantheraml.models.memory_estimate import MemoryEstimate, describe, predicted_bytes
from pantheraml.models.recompute_plan import RecomputePlan
from pantheraml.training.banner import (
    batch_tokens,
    compare_memory,
    describe_memory,
    describe_ranks,
    joined_tokens,
)
from tests import tiny
from tests.distributed.ranks import run_ranks

GIB = 2**30


@pytest.mark.promise("E2")
def test_ranks_by_host_with_their_gpus():
    places = [
        ("node1", "NVIDIA H200"),
        ("node1", "NVIDIA H200"),
        ("node2", "NVIDIA A100"),
        ("node2", "NVIDIA L4"),
    ]
    assert describe_ranks(places, DDP(MultiGPUConfig()).describe()) == (
        "4 ranks (2 on node1: NVIDIA H200; 2 on node2: NVIDIA A100, NVIDIA L4); DDP, since the model fits on each "
        "device: each has the whole model and rows of its own."
    )
    assert 'DDP, as strategy="ddp" says' in DDP(MultiGPUConfig(strategy="ddp")).describe()


def test_prediction_and_measurement():
    predicted = MemoryEstimate(15 * GIB, GIB // 4, GIB // 2, 20 * GIB)
    first, second = (torch.device("cuda", index) for index in range(2))
    assert describe_memory({first: predicted}, {first: 139.8}) == (
        "predicted memory of each device: 35.8 GiB of 139.8 = 15.0 GiB weights + 256 MiB gradients + 512 MiB "
        "optimizer + 20.0 GiB activations."
    )
    of_ranks = [[34.9], [36.4]]
    assert compare_memory({first: predicted}, of_ranks) == "memory: predicted 35.8 GiB, measured 36.4 GiB."
    split = {first: predicted, second: replace(predicted, weights=GIB)}
    assert describe_memory(split, {}).splitlines()[1] == (
        "predicted memory of cuda:1: 21.8 GiB = 1.0 GiB weights + 256 MiB gradients + 512 MiB optimizer + 20.0 GiB "
        "activations."
    )
    told = "memory: predicted 35.8 GiB, 21.8 GiB, measured 34.9 GiB, 20.0 GiB."
    assert compare_memory(split, [[34.9, 20.0]]) == told


@pytest.mark.parametrize(
    ("lengths", "limit", "tokens"),
    [
        ([10, 10], 75, 60),  # three whole micro-batches of two rows of 10
        ([10, 10], 19, 19),  # a pass is not cut to less than one, see predict_memory
        ([4, 10], 75, 75),  # shorter ones fill it
        ([10, 10], 0, 0),  # they are not merged
    ],
)
def test_merged_micro_batches_stay_whole(lengths, limit, tokens):
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    assert joined_tokens(batch_tokens(rows, 2), limit) == tokens
    assert joined_tokens(batch_tokens(iter(()), 2), limit) == limit, "of a stream nobody knows"


def banner(folder, output, settings, rows=None):
    """What a run says, and its memory by hand."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("pantheraml")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
        )
        model = FastLanguageModel.get_peft_model(model, r=4)
        args = PantheraMLTrainingArguments(
            output_dir=str(output), per_device_train_batch_size=2, max_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, **settings,
        )  # fmt: skip
        rows = rows or Dataset.from_dict(
            {"input_ids": [list(range(5, 5 + length)) for length in (9, 20, 30, 11)]}
        )
        trainer = PantheraMLDistributedTrainer(
            model, args, train_dataset=rows, tokenizer=tokenizer, multi_gpu_config=MultiGPUConfig()
        )
        trainer.train()
    finally:
        logger.removeHandler(handler)
    passes = {
        tokens: describe(
            predicted_bytes(model, tokens, RecomputePlan(tokens, 0), outliving=Outliving(sums=tokens < 240))
        )
        for tokens in (60, 240)
    }
    return records, passes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.promise("B7")
@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (dict(gradient_accumulation_steps=4), 60),
        (dict(gradient_accumulation_steps=4, merge_micro_batches=True), 240),
    ],
)
def test_one_process_says_it_all_in_two_lines(folder, tmp_path, settings, tokens):
    records, passes = banner(folder, tmp_path, settings)
    (run,) = (line for line in records if "rows a step" in line)
    assert "parameters are trained on cpu (CPU) in float32; 4 rows; 2 x 4 x 1 = 8 rows a step" in run
    (memory,) = (line for line in records if line.startswith("predicted memory"))
    assert memory.endswith(f"= {passes[tokens]}.")
    assert not any("DDP" in line for line in records)


@pytest.mark.promise("B7", "E2")
def test_ranks_say_who_they_are_once(folder, tmp_path):
    (first, _), (second, _) = run_ranks(2, banner, folder, tmp_path, {})
    (ranks,) = (line for line in first if "DDP" in line)
    assert ranks.startswith("2 ranks (2 on ") and ": CPU)" in ranks
    assert sum("2 x 1 x 2 = 4 rows a step" in line for line in first) == 1
    assert sum(line.startswith("predicted memory of each device: ") for line in first) == 1
    assert second == []


def test_a_stream_has_no_longest_row(folder, tmp_path):
    rows = Dataset.from_dict({"input_ids": [list(range(5, 14))] * 4}).to_iterable_dataset()
    records, _ = banner(folder, tmp_path, {}, rows)
    assert any("streamed rows" in line for line in records)
    assert not any("predicted" in line for line in records)
