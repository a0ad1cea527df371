"""Settings from the planner: true of the run that takes them, and the same on every rank."""

from __future__ import annotations

import json

import pytest
import torch

from pantheraml import MultiGPUConfig, get_optimal_config
from pantheraml.devices.estimate import estimate
from pantheraml.errors import ConfigError, ModelLoadError
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.models import optimal_config
from pantheraml.models.model_size import config_of_size
from pantheraml.models.precision import Precision
from pantheraml.models.weight_sizes import measure_parts
from tests.cli.test_plan import LLAMA_70B

GIB = 2**30


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The configuration of a 70B model, without weights."""
    folder = tmp_path_factory.mktemp("llama-70b")
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return str(folder)


@pytest.mark.parametrize(
    ("gpus", "method", "config"),
    [
        ("8xH200", "lora", MultiGPUConfig(strategy="fsdp", shard_frozen=True)),
        ("16xH200", "full", MultiGPUConfig(strategy="fsdp")),
        ("8xH200", "qlora", MultiGPUConfig(strategy="ddp")),
        ("H200", "qlora", MultiGPUConfig(strategy="none")),
    ],
)
def test_the_plan_is_what_the_run_is_told(large, gpus, method, config):
    found = get_optimal_config(large, gpus=gpus, method=method, max_seq_length=1024, batch_size=6)
    assert found.multi_gpu_config == config and found.use_gradient_checkpointing == "auto"
    rows, passes = found.per_device_train_batch_size, found.gradient_accumulation_steps
    assert rows * passes == 6
    plan, request = found.choice.plan, found.request
    assert plan.memory == estimate(request.parts, plan.layout, plan.work)
    assert plan.fullest.reserved <= found.choice.limit
    assert found.training_arguments == {
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": passes, "optim": "adamw_torch_fused"
    }  # fmt: skip
    said = str(found).splitlines()
    assert said[0].startswith(f"plan of {large} for ") and said[1].split(maxsplit=1)[0] == "plan"


def test_a_split_over_gpus_that_cannot_share():
    """Micro-batches of a pipeline are cut from the rows of one step."""
    found = get_optimal_config(model_size="8B", gpus="4x8.4GB", method="lora", batch_size=4)
    config = found.multi_gpu_config
    assert config == MultiGPUConfig(
        strategy="pipeline", pipeline_parallel=4, micro_batches=config.micro_batches
    )
    assert found.gradient_accumulation_steps == 1 and found.per_device_train_batch_size == 16
    assert 16 % config.micro_batches == 0


@pytest.fixture
def machine(monkeypatch):
    def has(gpus, kind="python", **environment):
        found = LaunchEnvironment(kind, **environment)
        monkeypatch.setattr(LaunchEnvironment, "detect", classmethod(lambda *_: found))
        sizes = {"free": 1, "total": 80 * GIB}
        monkeypatch.setattr(
            optimal_config, "visible_memory", lambda what: dict.fromkeys(range(gpus), sizes[what])
        )

    return has


@pytest.mark.parametrize(
    ("kind", "environment", "count"),
    [
        ("python", {}, 4),
        ("pantheraml", dict(rank=1, world_size=2), 4),  # a pipeline of two GPUs, say
        ("torchrun", dict(rank=1, world_size=2), 2),
        ("slurm-node", dict(num_nodes=2), 8),
    ],
)
def test_the_gpus_that_are_here(machine, kind, environment, count):
    machine(4, kind, **environment)
    found = get_optimal_config(model_size="8B")
    assert [gpu.memory for gpu in found.request.gpus] == [80 * GIB] * count
    found = get_optimal_config(model_size="8B", available_memory="32GB")
    assert [gpu.memory for gpu in found.request.gpus] == [32 * 10**9] * count


def test_without_gpus_they_are_named(machine):
    machine(0)
    with pytest.raises(ConfigError, match="There is no GPU here"):
        get_optimal_config(model_size="7B")
    found = get_optimal_config(model_size="7B", available_memory="32GB")
    assert found.multi_gpu_config.strategy == "none" and len(found.request.gpus) == 1


@pytest.mark.parametrize("size", ["500M", "1B", "7B", "13B", "70B", "900B"])
def test_sizes_are_met(size):
    wanted = float(size[:-1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[size[-1]]
    found = measure_parts(config_of_size(size), Precision("plain", torch.bfloat16))
    assert sum(part.numbers for part in found.all) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "One of them says what is trained"),
        (dict(model_name="a", model_size="7B"), "One of them says what is trained"),
        (dict(model_size="large"), "how many numbers a model has"),
        (dict(model_size="7B", method="lorra"), "Did you mean 'lora'"),
        (
            dict(model_size="7B", gpus="H200", available_memory="32GB"),
            "Each of them says what GPUs there are",
        ),
        (dict(model_size="70B", gpus="T4"), "Nothing fits on 1 x T4"),
    ],
)
def test_what_cannot_be(given, says):
    with pytest.raises(ConfigError, match=says):
        get_optimal_config(**given)


def test_architectures_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2")))
    with pytest.raises(ModelLoadError, match="No family describes"):
        get_optimal_config(str(tmp_path), gpus="H200")
