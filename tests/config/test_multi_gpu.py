"""MultiGPUConfig: the guide's fields and defaults, and clear words about what cannot be."""

from __future__ import annotations

import dataclasses

import pytest

from pantheraml.config.multi_gpu import MultiGPUConfig, config_of
from pantheraml.errors import ConfigError


@pytest.mark.promise("A7")
def test_the_guides_fields_and_defaults():
    config = MultiGPUConfig()
    assert (config.backend, config.timeout_minutes, config.auto_device_map) == ("nccl", 30, True)
    assert (config.tensor_parallel, config.pipeline_parallel) == (False, False)
    assert (config.use_gradient_checkpointing, config.find_unused_parameters) == ("auto", False)
    assert config == dataclasses.replace(config) == config_of(None) == config_of(True) == config_of({})
    assert config_of({"num_processes": 3}).num_processes == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.backend = "gloo"


@pytest.mark.promise("A7")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(backend="ncll"), "Did you mean 'nccl'"),
        (dict(strategy="dpp"), "Did you mean 'ddp'"),
        (dict(timeout_minutes=0), "a number above 0"),
        (dict(timeout_minutes=True), "a number above 0"),
        (dict(num_processes=1.5), "a whole number of 1 or more"),
        (dict(num_processes=0), "a whole number of 1 or more"),
        (dict(auto_device_map="yes"), "one of True, False"),
        (dict(find_unused_parameters=1), "one of True, False"),
        (dict(reduce_dtype="bfloat"), "Did you mean 'bfloat16'"),
        (dict(use_gradient_checkpointing="sometimes"), "'offload'"),
    ],
)
def test_what_cannot_be_is_said(settings, says):
    with pytest.raises(ConfigError, match=says):
        MultiGPUConfig(**settings)


@pytest.mark.promise("B1")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            dict(strategy="ddp", tensor_parallel=2),
            "Keep one of them: strategy=.tensor. with tensor_parallel=2",
        ),
        (dict(tensor_parallel=2, pipeline_parallel=2), "Keep one of them"),
        (dict(shard_size=4), "a setting of strategy='fsdp'"),
        (dict(strategy="fsdp", zero_stage=3), "Write strategy='deepspeed', or leave zero_stage out"),
        (dict(cpu_offload=True), "strategy='fsdp' and strategy='deepspeed'"),
        (dict(strategy="fsdp", cpu_offload="optimizer"), "Write cpu_offload=True"),
        (dict(strategy="fsdp", reduce_dtype="bfloat16"), "a setting of strategy='ddp'"),
        (dict(strategy="deepspeed", zero_stage=0, cpu_offload=True), "Stage 0 shards nothing"),
    ],
)
def test_settings_of_another_strategy_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        MultiGPUConfig(**settings)


def test_a_degree_names_its_strategy():
    assert (
        MultiGPUConfig(tensor_parallel=2).way
        == MultiGPUConfig(strategy="tensor", tensor_parallel=2).way
        == "tensor"
    )
    assert MultiGPUConfig(pipeline_parallel=True).way == "pipeline"
    assert MultiGPUConfig(tensor_parallel=1).way == "auto"


def test_other_things_are_no_config():
    with pytest.raises(ConfigError, match="'num_procesess' was given as a field"):
        config_of({"num_procesess": 2})
    with pytest.raises(ConfigError, match="They are a MultiGPUConfig"):
        config_of(4)
