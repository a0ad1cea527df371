"""Device maps in transformers' form: what we write, and what users write."""

from __future__ import annotations

import pytest
import torch

from pantheraml.devices.device_map import Placement, describe
from pantheraml.devices.map_names import as_device_map, read_device_map
from pantheraml.devices.model_parts import ModelParts, PartSizes
from pantheraml.errors import ConfigError
from pantheraml.models.families import FAMILIES
from pantheraml.models.families.gemma3 import GEMMA3
from pantheraml.models.families.llama import LLAMA
from tests import tiny

GIB = 2**30


def placed(embedding, layers, head):
    return Placement(embedding, layers, head, {}, {}, {})


def test_the_map_of_a_placement():
    assert as_device_map(placed(0, (0, 1), 1), LLAMA) == {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.norm": 1,
        "model.rotary_emb": 0,
        "lm_head": 1,
    }
    beside = as_device_map(placed(2, (1, 2), 2), GEMMA3)
    assert beside["model.vision_tower"] == beside["model.multi_modal_projector"] == 2
    assert beside["model.language_model.rotary_emb"] == 1


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.name in tiny.FAMILIES], ids=lambda family: family.name
)
def test_every_module_of_every_family_has_a_place(family):
    """What transformers asks of a map; and reading it gives the placement back."""
    model = tiny.build_model(family.name)
    placement = placed(0, (0, 1), 1)
    mapping = as_device_map(placement, family)
    for name in mapping:
        model.get_submodule(name)
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        assert sum(name.startswith(f"{part}.") for part in mapping) == 1, name
    assert read_device_map(mapping, family, 2) == placement


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"": 1}, placed(1, (1, 1, 1), 1)),
        ({"model": 0, "lm_head": 1}, placed(0, (0, 0, 0), 1)),
        (
            {"model": "cuda:0", "model.layers.2": "1", "lm_head": torch.device("cuda", 1)},
            placed(0, (0, 0, 1), 1),
        ),
        ({"": 0, "model.layers": 1, "lm_head": 1, "model.rotary_emb": 3}, placed(0, (1, 1, 1), 1)),
        ({"model.layers.1": 1, "": 0, "model.layers.2": 1}, placed(0, (0, 1, 1), 0)),
    ],
)
def test_what_users_write(mapping, expected):
    assert read_device_map(mapping, LLAMA, 3) == expected


def test_the_longest_name_counts_and_numbers_are_whole():
    mapping = {"": 0, "model.layers.1": 1}
    with pytest.raises(ConfigError, match="layer 2 on GPU 0, which"):
        read_device_map(mapping, LLAMA, 3)
    many = {"": 0, **{f"model.layers.{index}": 1 for index in range(1, 12)}}
    assert read_device_map(many, LLAMA, 12).layers == (0,) + (1,) * 11


def test_one_name_is_enough_for_a_tied_head():
    layers = {"model.layers": 1}
    for ends in ({"model.embed_tokens": 1}, {"lm_head": 1}, {"model.embed_tokens": 1, "lm_head": 1}):
        assert read_device_map({**layers, **ends}, LLAMA, 2, tied=True) == placed(1, (1, 1), 1)
    with pytest.raises(ConfigError, match=r"it lacks 'lm_head'"):
        read_device_map({**layers, "model.embed_tokens": 1}, LLAMA, 2)
    with pytest.raises(ConfigError, match=r"lacks 'model.embed_tokens', 'lm_head'"):
        read_device_map(layers, LLAMA, 2, tied=True)


def test_a_placement_of_a_user_in_the_table():
    """Nothing is predicted for it; a GPU may hold the head alone."""
    part = PartSizes(GIB, 0, 1.0)
    parts = ModelParts(part, (part,) * 2, part, False, 0, 0, lambda _: 0, lambda _: 0)
    table = describe(read_device_map({"model": 0, "lm_head": 1}, LLAMA, 2), parts)
    assert table.splitlines() == [
        "GPU  layers  weights  peak  limit",
        "  0     0-1      3.0     -      -  embedding",
        "  1       -      1.0     -      -  head",
    ]
