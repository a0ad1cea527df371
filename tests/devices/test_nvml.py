"""NVML by its C interface, against a library that is compiled here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pantheraml.devices.nvml import NVML, GPUState, open_nvml

COMPILER = shutil.which("cc")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """Path of the compiled stand-in."""
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("nvml") / "libnvml-stand-in.so"
    source = Path(__file__).with_name("nvml.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


def test_gpus_as_the_driver_tells(stand_in):
    nvml = NVML(stand_in)
    assert nvml.gpus() == [("GPU-aaaa1111-0000", False), ("GPU-bbbb2222-0000", True)]
    first, second = (nvml.state(gpu.uuid) for gpu in nvml.gpus())
    assert (first.used, first.total, first.power, first.temperature) == (3.0, 8.0, 250.5, 61)
    assert first.processes == {100: 2.0, 101: None}, "of one of two it is not known how much it holds"
    assert second.power is None and second.processes == {}
    assert (first.name, second.name) == ("NVIDIA H200", "")
    assert nvml.state("GPU-cccc") is None


def test_the_driver_and_the_wires(stand_in):
    nvml = NVML(stand_in)
    assert nvml.driver() == ("580.159.04", (13, 1))
    assert nvml.wires("GPU-aaaa1111-0000") == (17, 5, 16), "one of 18 links is down"
    assert nvml.wires("GPU-bbbb2222-0000") == (17, 5, None)
    assert nvml.wires("GPU-cccc") is None


def test_others_on_a_gpu_are_seen():
    def others(used, processes, reserved):
        state = GPUState(used, 80.0, power=None, temperature=None, processes=processes)
        return state.used_by_others(7, reserved)

    assert others(20.0, {7: 12.0, 8: 6.5, 9: None}, 11.5) == 6.5
    assert others(12.6, {7: 12.0}, 11.5) == 0
    # In a container the driver names no process, or others than ours.
    assert others(13.0, {}, 11.5) == 0
    assert others(20.0, {4711: 12.0}, 11.5) == 8.5


def test_a_machine_without_a_driver():
    with pytest.raises(OSError, match="libnvidia-not-there"):
        NVML("libnvidia-not-there.so.1")
    assert open_nvml() is open_nvml()
