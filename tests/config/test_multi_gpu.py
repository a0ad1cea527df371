"""MultiGPUConfig: the guide's fields and defaults, and clear words about what cannot be."""

from __future__ import annotations

import dataclasses

import pytest

from pantheraml.config.multi_gpu import MultiGPUConfig, config_of
from pantheraml.errors import ConfigError, NotYetError


def test_the_guides_fields_and_defaults():
    config = MultiGPUConfig()
    assert (config.backend, config.timeout_minutes, config.auto_device_map) == ("nccl", 30, True)
    assert (config.tensor_parallel, config.pipeline_parallel) == (False, False)
    assert (config.use_gradient_checkpointing, config.find_unused_parameters) == ("auto", False)
    assert config == dataclasses.replace(config) == config_of(None) == config_of(True) == config_of({})
    assert config_of({"num_processes": 3}).num_processes == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.backend = "gloo"


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


@pytest.mark.parametrize(
    "settings",
    [dict(tensor_parallel=True), dict(pipeline_parallel=2), dict(strategy="fsdp")],
)
def test_what_comes_later_is_refused(settings):
    with pytest.raises(NotYetError, match=next(iter(settings))):
        MultiGPUConfig(**settings)


def test_other_things_are_no_config():
    with pytest.raises(ConfigError, match="'num_procesess' was given as a field"):
        config_of({"num_procesess": 2})
    with pytest.raises(ConfigError, match="They are a MultiGPUConfig"):
        config_of(4)
