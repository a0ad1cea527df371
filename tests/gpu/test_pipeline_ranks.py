"""Pipelines over GPUs: one over two, and several beside one another, give the numbers of one GPU."""

from __future__ import annotations

import os

import pytest
import torch

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
    notebook_launch,
)
from pantheraml.distributed import process_group
from pantheraml.launch import start
from pantheraml.models.state import get_state
from tests import tiny
from tests.distributed.test_parity import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
# Widths that every precision takes.
SIZES = dict(num_hidden_layers=4, hidden_size=128, intermediate_size=256)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    """What a test says of the run ends with it."""
    monkeypatch.setattr(process_group, "_settings", MultiGPUConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", **SIZES)


def train(folder, output, config, flags=None, resume=None, shares_gpus=False, **settings):
    """What a run has logged and evaluated, and which GPUs its weights are on; 8 rows a step."""
    if shares_gpus:  # two pipelines on the same two GPUs, since there are no more
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:0"
        torch.cuda.set_device(0)
        process_group.gpus_of_rank = lambda *_: range(2)
        start.check_ranks = lambda *_: None
    flags = {"load_in_4bit": False, "dtype": "float32"} | (flags or {})
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, use_multi_gpu=config or False, **flags
    )
    if not flags.get("full_finetuning"):
        model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.2, random_state=1)
    args = PantheraMLTrainingArguments(
        output_dir=str(output), global_batch_size=8, num_train_epochs=2, learning_rate=1e-3, logging_steps=1,
        report_to="none", disable_tqdm=True, max_grad_norm=0.5,
        **{"per_device_train_batch_size": 2, "bf16": False, "fp16": False, "save_strategy": "no"} | settings,
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer, multi_gpu_config=config
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate()["eval_loss"]
    ids = torch.arange(5, 29, device=args.device)[None]
    text = FastLanguageModel.for_inference(model).generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    state = get_state(model)
    return {
        "logs": [[entry["loss"], entry["grad_norm"]] for entry in logs],
        "eval": [before, after],
        "text": text.tolist(),
        "gpus": sorted({p.device.index for p in model.parameters()}),
        "stages": 1 if state.split is None else len(state.split.stages),
        "memory": sorted(trainer.get_model_memory_usage()),
    }


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Runs of one GPU, by the flags they load with."""
    found = {}

    def get(**flags):
        key = tuple(sorted(flags.items()))
        if key not in found:
            found[key] = train(folder, tmp_path_factory.mktemp("one"), None, flags)
        return found[key]

    return get


def assert_same(found, wanted, rel=2e-5):
    for mine, theirs in zip(found["logs"], wanted["logs"], strict=True):
        assert mine == pytest.approx(theirs, rel=rel, abs=1e-6)
    assert found["eval"] == pytest.approx(wanted["eval"], rel=rel)


ROUNDED = dict(load_in_4bit=True, dtype="bfloat16")
ALL = dict(full_finetuning=True)


@pytest.mark.parametrize(("flags", "rel"), [({}, 2e-5), (ROUNDED, 2e-2), (ALL, 5e-5)])
def test_one_pipeline_is_one_process(folder, tmp_path, whole, flags, rel):
    found = train(folder, tmp_path, MultiGPUConfig(pipeline_parallel=2, num_processes=1), flags)
    assert found["gpus"] == [0, 1] and found["stages"] in (2, 4)
    assert_same(found, whole(**flags), rel)
    assert flags or found["text"] == whole()["text"]


@pytest.mark.parametrize(("flags", "rel"), [({}, 2e-5), (ROUNDED, 2e-2), (ALL, 5e-5)])
def test_two_pipelines_reduce_on_two_gpus_each(folder, tmp_path, whole, flags, rel):
    """NCCL takes a GPU for one rank only; gloo does not ask."""
    config = MultiGPUConfig(pipeline_parallel=2, backend="gloo")
    found = notebook_launch(
        train,
        folder,
        tmp_path,
        config,
        flags,
        None,
        True,
        num_processes=2,
        config=MultiGPUConfig(backend="gloo"),
    )
    assert found["gpus"] == [0, 1] and found["stages"] in (2, 4)
    assert_same(found, whole(**flags), rel)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA GPUs")
@pytest.mark.parametrize(("flags", "rel"), [({}, 2e-5), (ROUNDED, 2e-2), (ALL, 5e-5)])
def test_two_by_two(folder, tmp_path, whole, flags, rel):
    config = MultiGPUConfig(pipeline_parallel=2, num_processes=2)
    saving = dict(save_strategy="steps", save_steps=4)
    found = notebook_launch(on_ranks, folder, tmp_path, config, flags, saving, config=config)
    assert found["gpus"] == [0, 1] and found["memory"] == ["gpu_0", "gpu_1", "gpu_2", "gpu_3"]
    assert_same(found, whole(**flags), rel)
    one = MultiGPUConfig(pipeline_parallel=2, num_processes=1)
    resumed = notebook_launch(
        on_ranks, folder, tmp_path / "on", one, flags, dict(resume=str(tmp_path / "checkpoint-4")), config=one
    )
    assert_same(resumed, whole(**flags), rel)


def on_ranks(folder, output, config, flags, settings):
    return train(folder, output, config, flags, **settings)
