"""A step that runs out of memory with DeepSpeed's engine: what its passes have added up is forgotten on all ranks."""

from __future__ import annotations

import pytest
import torch

from pantheraml import FastLanguageModel, MultiGPUConfig
from pantheraml.distributed.strategies.zero_settings import holds_gradients
from pantheraml.training import merging
from tests import tiny
from tests.distributed import test_deepspeed
from tests.distributed.ranks import run_ranks
from tests.distributed.starved_runs import (
    IN_A_LAYER,
    IN_ITS_BACKWARD,
    MERGED,
    STEPS,
    assert_repeated,
    starved_run,
)
from tests.distributed.test_deepspeed import zero
from tests.distributed.test_deepspeed_memory import AUTO
from tests.distributed.test_out_of_memory import FITS

pytestmark = test_deepspeed.pytestmark
nothing_is_compiled = test_deepspeed.nothing_is_compiled

LORA, FULL = dict(load_in_4bit=False), dict(full_finetuning=True)
# One rank fails, or both do, apart; before the last pass of a step, so that others have been added up, or in it.
APART = {0: dict(most=FITS, at="norm", backward=True), 1: dict(most=FITS, at="embed_tokens")}
# Of batches that do not fit.
EVALUATED = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
# No pass can be shorter: layers recompute.
RECOMPUTES = {1: dict(most=20, at="layers.2", unless_recomputing=True)}


def overlapping(stage):
    """Settings of DeepSpeed's own: two buckets, and timers that may be started only once."""
    sharding = {"stage": stage, "overlap_comm": True}
    return dict(deepspeed=AUTO | {"zero_optimization": sharding, "wall_clock_breakdown": True})


def load(folder, config, way):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, device_map="cpu", use_multi_gpu=config, **way
    )
    if way == LORA:
        model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.3, random_state=1)
    return model, tokenizer


def train(folder, output, way, config, starve, settings):
    """A run; ``starve`` says what fits, by rank."""
    merging.MOST_TOKENS = 60  # of this process, which ends with the runs
    model, tokenizer = load(folder, config, way)
    trainer, found = starved_run(folder, output, model, tokenizer, starve, settings)
    if isinstance(found, str):
        return found
    # Of ZeRO's optimizer, which for a backward that it knows nothing of would reduce.
    optimizer = getattr(trainer.deepspeed, "optimizer", None)
    assert not getattr(optimizer, "_backward_active_depth", 0), "no backward is on its way"
    return found


def train_all(folder, output, way, runs):
    """An undisturbed run of DDP, and others."""
    undisturbed = (MultiGPUConfig(strategy="ddp"), {}, {})
    return [train(folder, output, way, *run) for run in (undisturbed, *runs)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)


def assert_all(ranks, runs):
    assert_repeated(ranks, [(starve, settings) for _, starve, settings in runs])


def test_the_step_is_repeated_with_the_same_gradient(folder, tmp_path):
    """Until nothing is left to reduce, which all ranks say."""
    runs = [
        (zero(1), APART, {}),
        (zero(2), {1: IN_ITS_BACKWARD}, EVALUATED),
        (zero(2), {}, MERGED),
    ]
    hopeless = (zero(2), {1: dict(most=20, at="layers.1")}, {})
    ranks = run_ranks(2, train_all, folder, tmp_path, LORA, [*runs, hopeless])
    for said in [found.pop() for found in ranks]:
        assert "ran out of memory on rank 1" in said and "nothing is left to reduce" in said
    assert_all(ranks, runs)
    passes = [found[3]["passes"] for found in ranks]
    assert len(passes[0]) != len(passes[1]) and max(map(len, passes)) < 4 * STEPS, "merged by each rank alone"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "runs"),
    [
        (LORA, [(zero(0), {1: IN_A_LAYER}, {}), (zero(2, cpu_offload=True), APART, MERGED)]),
        (LORA, [(zero(0), RECOMPUTES, {}), (zero(1), {0: IN_ITS_BACKWARD}, MERGED), (zero(2), RECOMPUTES, {})]),
        (LORA, [(zero(1), APART, overlapping(1)), (zero(2), {0: IN_ITS_BACKWARD}, overlapping(2))]),
        (FULL, [(zero(0), APART, MERGED), (zero(1, cpu_offload=True), {1: IN_ITS_BACKWARD}, {})]),
    ],
)  # fmt: skip
def test_other_settings(folder, tmp_path, way, runs):
    assert_all(run_ranks(2, train_all, folder, tmp_path, way, runs), runs)


def test_gradients_wait_where_there_is_room_for_them():
    """Where they are whole in any case, or in one bucket; and where DeepSpeed leaves it to others."""
    model = tiny.build_model("llama")
    numbers = sum(p.numel() for p in model.parameters())

    def holds(stage, settings=None, **zero):
        return holds_gradients({"zero_optimization": {"stage": stage} | zero} | (settings or {}), model)

    for bucket, found in ((numbers, [True] * 3), (numbers - 1, [True, True, False])):
        assert [holds(stage, reduce_bucket_size=bucket) for stage in range(4)] == [*found, False]
        assert holds(1, overlap_comm=True, reduce_bucket_size=bucket) == found[2]
    assert holds(2) and not holds(2, {"data_types": {"grad_accum_dtype": "fp32"}})
    assert holds(1, {"bf16": {"enabled": True}}) and not holds(0, {"bf16": {"enabled": True}})
    model.to(torch.bfloat16)
    assert not holds(2)
