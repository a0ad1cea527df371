"""Ranks that are pipelines train as one process does that has the whole model; here the stages share the CPU."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch.distributed as dist

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
)
from pantheraml.distributed.pipeline import step
from pantheraml.errors import ConfigError
from pantheraml.models.state import get_state
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows
from tests.training.starving import Starved

PIPELINE = MultiGPUConfig(pipeline_parallel=2)
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")


def load(folder, config=None, dropout=0.2):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu", use_multi_gpu=config
    )
    if config is not None:  # as on several GPUs: accelerate refuses such a model to ranks, to one, too
        model.hf_device_map = {"model": "cpu", "lm_head": "cpu"}
    return FastLanguageModel.get_peft_model(model, r=4, lora_dropout=dropout, random_state=1), tokenizer


def trainer_of(output, model, tokenizer, config, settings):
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        **{
            **dict(global_batch_size=8, num_train_epochs=1, learning_rate=1e-3, logging_steps=1, report_to="none"),
            **dict(save_strategy="no", disable_tqdm=True, max_grad_norm=0.5, merge_micro_batches=False),
            **settings,
        },
    )  # fmt: skip
    return PantheraMLDistributedTrainer(
        model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer, multi_gpu_config=config
    )


def train(folder, output, config=None, settings=None, resume=None, fits=None):
    """What a rank has logged, trained and evaluated; ``fits``: tokens of a pass that the last rank has room for."""
    settings = dict(settings or {})
    model, tokenizer = load(folder, config, dropout=settings.pop("dropout", 0.2))
    trainer = trainer_of(output, model, tokenizer, config, settings)
    before = trainer.evaluate()["eval_loss"]
    is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    starved = Starved(model, fits) if fits is not None and is_last else None
    pipelined, run = [], step.Pipeline.step
    step.Pipeline.step = lambda self, batches, *a, **k: (
        pipelined.append(len(batches)),
        run(self, batches, *a, **k),
    )[1]
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        step.Pipeline.step = run
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "logs": [{name: entry[name] for name in LOGGED if name in entry} for entry in logs],
        "weights": [p.detach().numpy() for p in model.parameters() if p.requires_grad],
        "eval": (before, trainer.evaluate()["eval_loss"]),
        "text": model.generate(input_ids=model.dummy_inputs["input_ids"], max_new_tokens=4).tolist(),
        "stages": 1 if get_state(model).split is None else len(get_state(model).split.stages),
        "strategy": trainer._strategy.name,
        "pipelined": pipelined,
        "failures": starved.failures if starved else [],
    }


def assert_same(found, wanted, skipped=()):
    for number, (mine, theirs) in enumerate(zip(found["logs"], wanted["logs"], strict=True), 1):
        for name in theirs.keys() - set(skipped):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-6, abs=1e-7), (number, name)
    for mine, theirs in zip(found["weights"], wanted["weights"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-5)
    if "eval" not in skipped:
        assert found["eval"] == pytest.approx(wanted["eval"], rel=1e-6)
    assert found["text"] == wanted["text"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    @functools.cache
    def get(family):
        how = dict(num_hidden_layers=3, attention_dropout=0.2)
        return tiny.save_checkpoint(tmp_path_factory.mktemp(family), family, **how)

    return get


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """Runs of one process with the whole model, and their folders."""

    @functools.cache
    def get(family="llama", **settings):
        output = tmp_path_factory.mktemp("whole")
        settings = dict(per_device_train_batch_size=2) | settings
        return train(folders(family), output, settings=settings)

    return get


@pytest.mark.promise("A7")
@pytest.mark.parametrize(("ranks", "then", "per_device"), [(1, 2, 4), (2, 1, 2)])
def test_pipelines_train_save_and_go_on_on_any_number(folders, tmp_path, whole, ranks, then, per_device):
    settings = dict(per_device_train_batch_size=per_device, save_strategy="steps", save_steps=2)
    for found in run_ranks(ranks, train, folders("llama"), tmp_path, PIPELINE, settings):
        assert_same(found, whole())
        assert found["stages"] == 2
        assert found["pipelined"] == [8 // ranks] * 3 + [found["pipelined"][-1]]
    settings, checkpoint = dict(per_device_train_batch_size=2), str(tmp_path / "checkpoint-2")
    for found in run_ranks(then, train, folders("llama"), tmp_path / "on", PIPELINE, settings, checkpoint):
        assert len(found["pipelined"]) == 2
        # TRL counts tokens from where it goes on.
        assert_same(found, whole(), skipped=["num_tokens"])


def test_a_single_rank_of_torchrun_is_a_pipeline(folders, tmp_path, whole):
    """accelerate refuses a model on several devices to every process group."""
    settings = dict(per_device_train_batch_size=4)
    (found,) = run_ranks(1, train, folders("llama"), tmp_path, PIPELINE, settings, grouped=True)
    assert found["strategy"] == "pipeline"
    assert_same(found, whole())


def test_routers_of_all_pipelines_are_balanced_together(folders, tmp_path, whole):
    settings = dict(per_device_train_batch_size=2, router_aux_loss_coef=0.5, dropout=0.0, max_steps=4)
    wanted = whole("mixtral", **settings)
    assert min(entry["aux_loss"] for entry in wanted["logs"]) > 0
    for found in run_ranks(2, train, folders("mixtral"), tmp_path, PIPELINE, settings):
        assert found["pipelined"]
        assert_same(found, wanted, skipped=["eval"])


def test_stages_in_turn_are_averaged_too(folders, tmp_path, whole):
    """A loss that is not plain goes through the stages of a rank one after the other, and through DDP."""
    settings = dict(per_device_train_batch_size=4, loss_type="dft", max_steps=2)
    for found in run_ranks(2, train, folders("llama"), tmp_path, PIPELINE, settings):
        assert not found["pipelined"]
        # TRL's own figures are means over ranks.
        assert_same(found, whole(**settings), skipped=["num_tokens", "entropy", "mean_token_accuracy"])


def test_a_pipeline_that_runs_out_of_memory_is_waited_for(folders, tmp_path, whole):
    """A step of 8 rows is 3, 3 and 2 of them, so that one of two ranks also has a batch without labels."""
    settings = dict(per_device_train_batch_size=3)
    *_, last = found = run_ranks(2, train, folders("llama"), tmp_path, PIPELINE, settings, None, 30)
    assert last["failures"] and not found[0]["failures"]
    for one in found:
        assert_same(one, whole())


def test_what_contradicts_a_pipeline(folders, tmp_path):
    assert all(run_ranks(2, refused, folders("llama"), tmp_path))


def refused(folder, output):
    """True where all of it is refused."""
    model, tokenizer = load(folder, MultiGPUConfig())
    with pytest.raises(ConfigError, match="its model is whole on one device"):
        trainer_of(output, model, tokenizer, PIPELINE, dict(per_device_train_batch_size=4))
    with pytest.raises(ConfigError, match="The planner puts the stages"):
        FastLanguageModel.from_pretrained(str(folder), device_map={"": 0}, use_multi_gpu=PIPELINE)
    with pytest.raises(ConfigError, match=r"has 3 layers(.|\n)*pipeline_parallel=3"):
        load(folder, MultiGPUConfig(pipeline_parallel=4))
    with pytest.raises(ConfigError, match="the head of a language model"):
        FastLanguageModel.from_pretrained(str(folder), num_labels=1, use_multi_gpu=PIPELINE)
    return True
