"""An unchanged script of TRL's trains on two ranks, and on none of ours after ``disable_multi_gpu``."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import pantheraml
from pantheraml.hooks.sft_scripts import HookedSFTTrainer
from pantheraml.training.head import needs_cpu_head
from tests.hooks.work import ROWS, SETTINGS, grpo, logged
from tests.launch.test_agent import run

# TRL 1.15 computes the head of its own trainer in Triton only.
IS_OLD = needs_cpu_head(torch.device("cpu"))


@pytest.fixture(scope="module")
def alone(checkpoints, tmp_path_factory):
    """The losses of TRL's own trainer in one process, with the rows of a step of two ranks; and its reference."""
    output = tmp_path_factory.mktemp("alone")
    if IS_OLD:
        pantheraml.enable_multi_gpu(num_gpus=1)
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    args = SFTConfig(str(output), per_device_train_batch_size=4, use_cpu=True, **SETTINGS)
    trainer = SFTTrainer(model, args, train_dataset=ROWS)
    trainer.train()
    pantheraml.disable_multi_gpu()
    assert isinstance(trainer, HookedSFTTrainer) == IS_OLD
    return logged(trainer)


@pytest.fixture(scope="module")
def ranks(checkpoints, tmp_path_factory):
    """What each of two ranks found, which plain python has started."""
    output = tmp_path_factory.mktemp("ranks")
    words = [
        "-W",
        "ignore",
        "-m",
        "tests.hooks.script",
        checkpoints("llama"),
        output,
        *(() if IS_OLD else ["more"]),
    ]
    code, _, err = run(*words)
    assert code == 0, err
    assert "starting 2 ranks of this script" in err
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.promise("C1")
def test_losses_are_those_of_one_process(alone, ranks):
    for rank in ranks:
        assert len(rank["logs"]) == len(alone) == 4
        for mine, theirs in zip(rank["logs"], alone, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.promise("C1")
def test_every_argument_acts(ranks):
    for number, found in enumerate(ranks):
        began, ended = found["began"], found["ended"]
        assert began["enabled"] and began["trainers"] == [] and ended["trainers"] == ["SFTTrainer"]
        assert (began["world_size"], began["rank"], began["started_by"]) == (2, number, "pantheraml")
        assert "gloo" in began["backend"] and began["device"] == "cpu"
        assert began["changed"] == ["SFTTrainer.__init__", "Trainer.__init__"]
        assert began["config"]["hang_seconds"] == 0
        assert found["finds_unused"] and found["names_unused"]
        assert "SameWeights" in found["callbacks"]
        assert found["given"] == 7, "the script's own arguments are left as they are"


@pytest.mark.promise("C1")
def test_disabled_ranks_are_trls(ranks):
    for found in ranks:
        after = found["after"]
        assert found["restored"] and after["world_size"] == 2
        assert (after["enabled"], after["changed"], after["config"]) == (False, [], None)


@pytest.mark.skipif(IS_OLD, reason="TRL 1.15 computes its heads in Triton only")
def test_other_trainers_train_on_the_ranks(ranks):
    for name in ("grpo", "own"):
        first, second = (found[name] for found in ranks)
        assert first == second and first["ranks"] == 2 and len(first["logs"]) == 1
    assert ranks[0]["grpo"]["kind"] == "GRPOTrainer" and ranks[0]["own"]["kind"] == "SFTTrainer"


@pytest.mark.promise("C2")
def test_an_unchanged_grpo_script_trains_on_two_ranks_as_on_one(checkpoints, ranks, tmp_path):
    pantheraml.enable_grpo_support()
    one = grpo(checkpoints("llama"), tmp_path, 4)
    for rank in ranks:
        found = rank["supported"]
        assert found["changed"] == ["GRPOTrainer.__init__", "GRPOConfig.__post_init__"]
        assert (found["kind"], found["trainers"], found["strategy"]) == (
            "HookedGRPOTrainer",
            ["GRPOTrainer"],
            "ddp",
        )
        assert found["completions"] == list(one._logs["completion"])
        for mine, theirs in zip(found["logs"], logged(one), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
