"""``initialize_distributed``: any order, once or again, one state with the trainer; who contradicts is told."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from trl import SFTConfig

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLTrainer,
    PantheraMLTrainingArguments,
    get_rank,
    get_world_size,
    initialize_distributed,
    is_main_process,
    setup_multi_gpu,
)
from pantheraml.distributed import process_group
from pantheraml.errors import ConfigError
from tests.distributed.ranks import run_ranks

ROWS = Dataset.from_dict({"text": [f"The capital number {i} is {i * 7}." for i in range(21)]})


def arguments(output, **settings):
    common = dict(max_steps=1, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    return PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, **{**common, **settings}
    )


def build(folder, args, use_multi_gpu=None):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, use_multi_gpu=use_multi_gpu
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    return PantheraMLTrainer(model, args, train_dataset=ROWS, tokenizer=tokenizer)


def loss_of(trainer):
    trainer.train()
    return [
        (entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry
    ]


def facts(accelerator: Accelerator):
    return str(accelerator.distributed_type), accelerator.num_processes, accelerator.mixed_precision


def in_every_order(folder, output, strategy, zero_stage=None):
    """What accelerators say, and what was trained, where each thing came first."""
    process_group._settings = MultiGPUConfig()
    group, asked = dist.group.WORLD, dict(strategy=strategy, zero_stage=zero_stage)
    # As guides print it: arguments, ranks, model; and ranks once more.
    args = arguments(output, multi_gpu_strategy=strategy)
    first = initialize_distributed(args=args, **asked)
    again = initialize_distributed(**asked)
    seen, losses = [facts(first), facts(again)], []
    trainer = build(folder, args, use_multi_gpu=True)
    assert vars(first.state) is vars(again.state) is vars(trainer.accelerator.state)
    losses.append(loss_of(trainer))
    # Arguments after the ranks: what they clear of accelerate's state, the accelerator does not miss.
    early = initialize_distributed(**asked)
    args = arguments(output)
    assert not AcceleratorState._shared_state and early.num_processes == get_world_size()
    assert early.process_index == get_rank() and early.is_main_process == is_main_process()
    losses.append(loss_of(build(folder, args)))
    seen.append(facts(early))
    # The trainer before the ranks are spoken of.
    trainer = build(folder, arguments(output))
    late = initialize_distributed(**asked)
    assert vars(late.state) is vars(trainer.accelerator.state)
    losses.append(loss_of(trainer))
    seen.append(facts(late))
    # Arguments of TRL's own, which on CPUs do not know of other ranks.
    plain = SFTConfig(output_dir=str(output), bf16=False, report_to="none")
    initialize_distributed(args=plain, **asked)
    assert plain.world_size == get_world_size() and plain.use_cpu == (get_world_size() > 1)
    assert dist.group.WORLD is group and "ACCELERATE_USE_DEEPSPEED" not in os.environ
    return seen, losses


@pytest.mark.promise("B2")
def test_ddp_in_every_order(llama, tmp_path):
    for seen, losses in run_ranks(2, in_every_order, llama, tmp_path, "ddp"):
        assert seen == [("DistributedType.MULTI_CPU", 2, "no")] * 4
        assert losses[0] == losses[1] == losses[2]


@pytest.mark.promise("B2")
def test_one_process(llama, tmp_path):
    seen, losses = in_every_order(llama, tmp_path, "ddp")
    assert seen == [("DistributedType.NO", 1, "no")] * 4
    assert losses[0] == losses[1] == losses[2]


def test_arguments_of_another_precision(tmp_path):
    args = arguments(tmp_path, bf16=True)
    assert initialize_distributed("ddp").mixed_precision == "no"
    assert initialize_distributed("ddp", args=args).mixed_precision == "bf16"


@pytest.mark.promise("B2")
def test_an_earlier_call_counts():
    """Where nothing else is said; and other fields of the settings are those of the last call that names them."""
    setup_multi_gpu(MultiGPUConfig(timeout_minutes=5, zero_stage=3, strategy="deepspeed"))
    initialize_distributed(hang_seconds=7)
    assert process_group.settings_of_run() == MultiGPUConfig(
        timeout_minutes=5, zero_stage=3, strategy="deepspeed", hang_seconds=7
    )


LAUNCHED = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
CONTRADICTIONS = {
    "the arguments": (
        dict(strategy="ddp"),
        dict(multi_gpu_strategy="deepspeed"),
        {},
        "multi_gpu_strategy of the",
    ),
    "the launcher": (
        dict(strategy="ddp"),
        {},
        LAUNCHED,
        "accelerate launch or args.deepspeed says 'deepspeed'",
    ),
    "its stage": (dict(strategy="deepspeed", zero_stage=2), {}, LAUNCHED, "zero_stage=2; .* says 3"),
    "a stage of nothing": (dict(strategy="ddp", zero_stage=2), {}, {}, "setting of DeepSpeed"),
    "a stage that is none": (dict(strategy="deepspeed", zero_stage=4), {}, {}, "zero_stage=4"),
    "a wrapper": (dict(strategy="fsdp"), {}, dict(ACCELERATE_USE_FSDP="true"), "by its own FSDP"),
    "the precision": (
        dict(strategy="ddp"),
        dict(bf16=True),
        dict(ACCELERATE_MIXED_PRECISION="fp16"),
        "=fp16",
    ),
    "a misspelt strategy": (dict(strategy="dpp"), {}, {}, "Did you mean 'ddp'"),
    "a misspelt setting": (dict(num_process=2), {}, {}, "Did you mean 'num_processes'"),
}


@pytest.mark.promise("B2")
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name, tmp_path, monkeypatch):
    asked, written, variables, said = CONTRADICTIONS[name]
    args = arguments(tmp_path, **written)
    monkeypatch.setattr(process_group, "ensure_ranks", lambda _: pytest.fail("before anything is started"))
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=said):
        initialize_distributed(args=args, **asked)


def test_another_strategy_than_before():
    initialize_distributed("ddp")
    with pytest.raises(ConfigError, match="strategy='fsdp'; an earlier call says 'ddp'"):
        initialize_distributed("fsdp")


@pytest.mark.promise("B8")
@pytest.mark.parametrize("launched", ["bf16", "no"])
def test_the_launchers_precision(launched, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    args = arguments(tmp_path)
    assert args.bf16 == (launched == "bf16") and not args.fp16
    accelerator = initialize_distributed("ddp", args=args)
    trainer = build(llama, args)
    assert accelerator.mixed_precision == trainer.accelerator.mixed_precision == launched
    assert trainer.accelerator.native_amp == (launched == "bf16")
