"""What hooks do between ranks, which are forked here and joined as those of torchrun are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

import pantheraml
from pantheraml.distributed.process_group import get_rank
from pantheraml.errors import ConfigError, HardwareError
from tests.distributed.ranks import run_ranks
from tests.hooks.work import ROWS, SETTINGS, logged


def build(folder, output, *callbacks, unused=False, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if unused:
        model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    args = SFTConfig(
        str(output), **{**SETTINGS, "per_device_train_batch_size": 2, "use_cpu": True, **settings}
    )
    return SFTTrainer(model, args, train_dataset=ROWS, callbacks=[*callbacks])


class Moved(TrainerCallback):
    """Code of a script that changes a weight on one rank."""

    def on_step_begin(self, args, state, control, model, **_):
        if state.global_step == 1 and get_rank() == 1:
            next(model.parameters()).data += 1e-7


def work(folder, output):
    """On each rank: what was refused, what differed, and the losses with a weight that takes no part."""
    found = {}
    with pytest.raises(ConfigError) as other:
        pantheraml.enable_multi_gpu(ddp_backend="mpi")
    with pytest.raises(ConfigError) as count:
        pantheraml.enable_multi_gpu(num_gpus=3)
    found["refused"] = [str(other.value), str(count.value)]
    pantheraml.enable_multi_gpu(num_gpus=2, debug=True, hang_seconds=0)
    found["started_by"] = pantheraml.get_multi_gpu_status()["started_by"]
    with pytest.raises(HardwareError) as moved:
        build(folder, output, Moved()).train()
    found["moved"] = str(moved.value)
    split = build(folder, output).model
    split.hf_device_map = {"model.embed_tokens": 0, "lm_head": 1}
    with pytest.raises(ConfigError) as placed:
        SFTTrainer(split, SFTConfig(str(output), use_cpu=True, **SETTINGS), train_dataset=ROWS)
    found["placed"] = str(placed.value)
    pantheraml.disable_multi_gpu()
    pantheraml.enable_multi_gpu(find_unused_parameters=True, debug=True, timeout_minutes=2)
    trainer = build(folder, output, unused=True)
    trainer.train()
    found["logs"] = logged(trainer)
    pantheraml.disable_multi_gpu()
    pantheraml.enable_multi_gpu(strategy="fsdp", debug=True)
    trainer = build(folder, output)
    trainer.train()
    found["shared"] = (
        logged(trainer),
        trainer._strategy.name,
        isinstance(next(trainer.model.parameters()), DTensor),
    )
    pantheraml.disable_multi_gpu()
    pantheraml.enable_multi_gpu(debug=True)
    with pytest.raises(ConfigError) as missed:
        build(folder, output, unused=True).train()
    found["left"] = str(missed.value)
    pantheraml.disable_multi_gpu()
    # Where steps are not repeated, torch finds out: at the second step.
    pantheraml.enable_multi_gpu(debug=True, enable_memory_optimization=False)
    with pytest.raises(RuntimeError) as missed:
        build(folder, output, unused=True, logging_steps=3).train()
    found["missed"] = str(missed.value)
    return found


def test_two_ranks(llama, tmp_path):
    for found in run_ranks(2, work, llama, tmp_path):
        other, count = found["refused"]
        assert "ranks that use" in other and "gloo" in other and "num_processes=3" in count
        assert found["started_by"] == "torchrun"
        assert (
            "After step 2, model.embed_tokens.weight of rank 0 differs from that of rank 1." in found["moved"]
        )
        assert "Each of 2 ranks has loaded the model onto several GPUs" in found["placed"]
        assert len(found["logs"]) == 4
        assert found["shared"] == ([pytest.approx(step, rel=1e-5) for step in found["logs"]], "fsdp", True)
        assert "no gradient to trained weights: unused." in found["left"]
        assert "did not receive grad for rank" in found["missed"] and ".unused" in found["missed"]
