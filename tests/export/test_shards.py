"""Shards are written as tensors come, and no more than one is held."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

from pantheraml.errors import ConfigError
from pantheraml.export.shards import parse_size, write_shards


@pytest.mark.promise("F8")
def test_at_most_one_shard_is_in_memory(tmp_path):
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def produce():
        nonlocal most
        for number in range(20):
            tensor = torch.full((250,), float(number))
            alive.add(tensor.untyped_storage())
            most = max(most, len(alive))
            yield f"t{number:02d}", tensor

    write_shards(tmp_path, produce(), 3000)  # three tensors of 1000 bytes
    assert most <= 5
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 5000, "total_size": 20_000}
    assert len(set(index["weight_map"].values())) == 7
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / file)[name].unique().tolist() == [float(name[1:])]
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "model-00001-of-00007.safetensors"


def test_one_file_needs_no_index(tmp_path):
    write_shards(tmp_path, [("a", torch.ones(3)), ("b", torch.ones(3).bfloat16())], "1MB")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["b"].dtype == torch.bfloat16


def test_a_large_tensor_gets_its_own_file(tmp_path):
    write_shards(tmp_path, [("a", torch.ones(2)), ("big", torch.ones(999)), ("c", torch.ones(2))], 100)
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [1, 1, 1]


@pytest.mark.parametrize(
    "size, count", [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), (123, 123)]
)
def test_sizes(size, count):
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", 0, "0GB", "5 apples"])
def test_wrong_sizes(size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(size)
