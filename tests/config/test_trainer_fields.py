"""The trainer section against the SFTConfig of the installed TRL."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from pantheraml.config.names import KNOWN_ELSEWHERE
from pantheraml.config.problems import json_schema
from pantheraml.config.run import RunConfig
from pantheraml.config.trainer import OUR_FIELDS, TrainerSettings


@pytest.fixture(scope="module")
def fields() -> dict[str, dataclasses.Field]:
    from trl import SFTConfig

    return {field.name: field for field in dataclasses.fields(SFTConfig)}


def test_every_declared_field_exists(fields):
    assert set(TrainerSettings.model_fields) - set(fields) == OUR_FIELDS


def test_choices_are_those_of_the_library(fields):
    from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy

    known = {
        "eval_strategy": [choice.value for choice in IntervalStrategy],
        "logging_strategy": [choice.value for choice in IntervalStrategy],
        "save_strategy": [choice.value for choice in SaveStrategy],
        "hub_strategy": [choice.value for choice in HubStrategy],
        "packing_strategy": fields["packing_strategy"].metadata["choices"],
        "train_sampling_strategy": fields["train_sampling_strategy"].metadata["choices"],
    }
    for name, choices in known.items():
        ours, _none = typing.get_args(TrainerSettings.model_fields[name].annotation)
        assert sorted(typing.get_args(ours)) == sorted(choices), name


def test_the_defaults_of_the_library_are_values_we_take(fields):
    # "auto" came after the oldest TRL; leaving the setting out means the same where it is known.
    names = set(TrainerSettings.model_fields) - OUR_FIELDS - {"pad_to_multiple_of"}
    defaults = {name: fields[name].default for name in names}
    assert TrainerSettings(**defaults).given().keys() <= defaults.keys()


def test_older_names_point_to_settings_that_exist():
    sections = {name: json_schema()["$defs"] for name in RunConfig.model_fields}
    models = {
        "model": "ModelSettings",
        "lora": "LoraSettings",
        "data": "DataSettings",
        "save": "SaveSettings",
        "multi_gpu": "MultiGPUSettings",
    }
    models["trainer"] = "TrainerSettings"
    for old, hint in KNOWN_ELSEWHERE.items():
        section, _, rest = hint.partition(".")
        setting = rest.replace(":", " ").replace(",", " ").split()[0]
        settings = sections[section][models[section]]["properties"]
        assert setting in settings, old
        # A hint for a name that is a setting would never be shown.
        assert not any(old in part["properties"] for part in json_schema()["$defs"].values()), old
