"""``max_memory`` as users write it; what is wrong with it is in tests/errors."""

from __future__ import annotations

import pytest

from pantheraml.devices.memory_limits import read_limits
from pantheraml.errors import ConfigError

GIB = 2**30
FREE = {1: 70 * GIB, 0: 80 * GIB}


def test_without_limits_it_is_what_is_free():
    limits = read_limits(None, FREE)
    assert limits == FREE and list(limits) == [0, 1]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (12345, 12345),
        ("10GB", 10**10),
        ("10GiB", 10 * GIB),
        (" 10 gib ", 10 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("500MB", 5 * 10**8),
        ("500MiB", 500 * 2**20),
        ("64KB", 64000),
        ("64KiB", 2**16),
        ("100B", 100),
        ("1TB", 80 * GIB),
        ("1TiB", 80 * GIB),
        (2**50, 80 * GIB),
    ],
)
def test_sizes(size, expected):
    assert read_limits({0: size}, FREE) == {0: expected}


@pytest.mark.parametrize("name", [1, "1", "cuda:1"])
def test_names_of_gpus(name):
    assert read_limits({name: "1GB"}, FREE) == {1: 10**9}


def test_gpus_come_in_order_and_the_host_gets_nothing():
    limits = read_limits({"cpu": "100GB", 1: "1GB", "0": 5}, FREE)
    assert list(limits.items()) == [(0, 5), (1, 10**9)]


@pytest.mark.parametrize(
    "name", [True, 1.0, -1, "-1", "gpu0", "cuda", "cuda:", "disk", "mps", "", None, (0,)]
)
def test_what_names_no_gpu(name):
    with pytest.raises(ConfigError, match="as the name of a GPU"):
        read_limits({name: "1GB"}, FREE)


@pytest.mark.parametrize(
    "size", [True, 1.5, -1, None, "", "10", "10GG", "ten GB", "-1GB", "1e3GB", "10GB 5MB", b"1GB"]
)
def test_what_is_no_size(size):
    for name in (0, "cpu"):
        with pytest.raises(ConfigError, match=r"max_memory\[.*\] is"):
            read_limits({name: size}, FREE)


def test_less_than_a_byte_is_nothing():
    with pytest.raises(ConfigError, match="gives GPU 0 nothing"):
        read_limits({0: "0.1B"}, FREE)
    assert read_limits({"cpu": 0, 0: 1}, FREE) == {0: 1}
