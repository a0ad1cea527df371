"""GRPO on several ranks is GRPO on one: prompts, groups, completions, rewards, advantages, losses, by DDP and FSDP2."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pantheraml.checkpoint.manifest import has_manifest, problems
from pantheraml.errors import ConfigError, HardwareError
from pantheraml.training import generators
from tests import tiny
from tests.distributed.ranks import free_port, run_ranks
from tests.training.grpo_runs import build, figures

# Generations of 12 rows in 3 groups of 4, one of which is cut between two ranks, for two optimizer steps each.
TWICE = dict(steps_per_generation=2, beta=0.04)
SHARED = dict(strategy="fsdp", shard_frozen=True)
# Of all weights, with a checkpoint at the end.
FULL = dict(kind="full", steps_per_generation=2, save_strategy="steps", save_steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", attention_dropout=0.1)


def refused(folder, output):
    """What this rank is told about a generator that cannot be, before any rank waits for another."""
    found = []
    generators.is_vllm_available = lambda: True
    for settings, config in (
        (dict(vllm_server_port=free_port(), vllm_server_timeout=0.1, vllm_mode="server"), None),
        (dict(vllm_mode="server"), SHARED),
    ):
        with pytest.raises((ConfigError, HardwareError)) as error:
            figures(
                folder, output, config, per_device_train_batch_size=2, use_vllm=True,
                vllm_server_host="127.0.0.1", **settings,
            )  # fmt: skip
        found.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        trainer = build(folder, output, per_device_train_batch_size=4)
        trainer.args.per_device_train_batch_size = 3  # as arguments that are changed after they were made
        type(trainer)(trainer.model, trainer.reward_funcs, trainer.args, tokenizer=trainer.processing_class)
    return [*found, str(error.value)]


def work(folder, output):
    return {
        "ddp": figures(
            folder,
            output,
            evaluates=True,
            per_device_train_batch_size=3,
            per_device_eval_batch_size=6,
            **TWICE,
        ),
        "fsdp": figures(folder, output, SHARED, per_device_train_batch_size=3, **TWICE),
        "full": figures(folder, output, dict(strategy="fsdp"), per_device_train_batch_size=3, **FULL),
        "refused": refused(folder, output),
    }


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("ranks")
    return [{**found, "output": output} for found in run_ranks(2, work, folder, output)]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The same in one process: as one micro-batch of a step, and as three."""
    output = tmp_path_factory.mktemp("alone")
    parts = dict(gradient_accumulation_steps=3, steps_per_generation=6, beta=0.04)
    return {
        "lora": figures(
            folder,
            output,
            evaluates=True,
            per_device_train_batch_size=6,
            per_device_eval_batch_size=12,
            **TWICE,
        ),
        "parts": figures(folder, output, per_device_train_batch_size=2, **parts),
        "output": output,
        "full": figures(folder, output, per_device_train_batch_size=6, **FULL),
    }


def assert_same(found, expected):
    """Prompts, completions, rewards and advantages are equal; figures but for the order of sums."""
    assert found["steps"] == expected["steps"]
    assert len(found["logged"]) == len(expected["logged"]) == 4
    for mine, other in zip(found["logged"], expected["logged"], strict=True):
        assert mine == [
            None if value is None else pytest.approx(value, rel=2e-5, abs=2e-6) for value in other
        ]


@pytest.mark.promise("C2")
def test_groups_are_whole_and_their_completions_differ(alone):
    for step in alone["lora"]["steps"]:
        groups = [step["prompt"][start : start + 4] for start in (0, 4, 8)]
        assert len({group[0] for group in groups}) == 3 and all(len(set(group)) == 1 for group in groups)
        assert len(set(step["completion"])) > 9
        assert len(set(step["rewards"]["lengths"])) > 3
    first, second, third, _ = alone["lora"]["steps"]
    assert first == second != third, "a generation serves two steps"
    for start in (0, 4, 8):
        assert sum(first["advantages"][start : start + 4]) == pytest.approx(0, abs=1e-5)


@pytest.mark.promise("C2")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_with_dropout_and_groups_that_are_cut_between_them(alone, ranks, strategy):
    for rank in ranks:
        assert rank[strategy]["strategy"] == strategy
        assert_same(rank[strategy], alone["lora"])


def test_two_ranks_evaluate_as_one(alone, ranks):
    expected = alone["lora"]["evaluated"]
    for rank in ranks:
        found = dict(rank["ddp"]["evaluated"])
        assert found.pop("completions") == expected["completions"]
        assert found == {name: pytest.approx(expected[name], rel=1e-4, abs=1e-6) for name in found}


@pytest.mark.promise("F12")
def test_accumulation_makes_no_difference(alone):
    """But to the entropy and the KL of the log, which TRL averages over micro-batches."""
    trained = [
        {**alone[name], "logged": [line[:3] for line in alone[name]["logged"]]} for name in ("parts", "lora")
    ]
    assert_same(*trained)


@pytest.mark.promise("C2")
def test_all_weights_shared_out_train_as_in_one_process_and_are_saved_whole(alone, ranks):
    for rank in ranks:
        assert_same(rank["full"], alone["full"])
    checkpoints = [one["output"] / "checkpoint-4" for one in (ranks[0], alone)]
    assert all(has_manifest(checkpoint) and not problems(checkpoint) for checkpoint in checkpoints)
    saved, whole = (load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints)
    assert saved.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.allclose(saved[name], weight, atol=2e-4), name


def test_what_cannot_generate_is_refused_on_every_rank(ranks):
    for rank in ranks:
        server, shared, groups = rank["refused"]
        assert "No vLLM server answers at http://127.0.0.1:" in server and "trl vllm-serve" in server
        assert "use_vllm=True was given, and ranks share out the model's weights" in shared
        assert "A generation has 6 rows (3 per device x 2 ranks x 1), and num_generations=4" in groups
        assert "gradient_accumulation_steps=2" in groups


# What TRL's losses, rewards and steps may be; all but bnpo, which is one of each micro-batch.
KINDS = {
    **{name: dict(loss_type=name) for name in ("grpo", "dr_grpo", "cispo", "sapo", "vespo")},
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence"),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "iterations": dict(num_iterations=2),
    "batch": dict(scale_rewards="batch"),
    "gdpo": dict(multi_objective_aggregation="normalize_then_sum"),
    "quantile": dict(top_entropy_quantile=0.5),
    "truncated": dict(mask_truncated_completions=True),
    "several generations a step": dict(steps_per_generation=1, gradient_accumulation_steps=2),
}


def each_kind(folder, output, rows):
    given = dict(per_device_train_batch_size=rows, steps_per_generation=2)
    return {name: figures(folder, output, **{**given, **settings}) for name, settings in KINDS.items()}


@pytest.mark.slow
def test_two_ranks_train_as_one_with_every_loss(folder, tmp_path):
    one = each_kind(folder, tmp_path, 12)
    for rank in run_ranks(2, each_kind, folder, tmp_path, 6):
        for name in KINDS:
            assert_same(rank[name], one[name])
