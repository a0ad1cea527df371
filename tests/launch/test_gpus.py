"""Counting GPUs as CUDA would, by a small library that answers as NVML does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pantheraml.launch.gpus import Gpu, count_visible, num_visible_gpus, read_gpus

WHOLE = [Gpu(f"GPU-{letter}0000000-aaaa", False) for letter in "0123"]
ALIKE = [Gpu("GPU-ab12", False), Gpu("GPU-ab34", False), Gpu("GPU-cd56", False)]
SPLIT = [gpu._replace(is_split=True) for gpu in WHOLE[:2]]


@pytest.mark.promise("A3", "B8")
@pytest.mark.parametrize(
    ("gpus", "selection", "count"),
    [
        (WHOLE, None, 4),
        (WHOLE, "", 0),
        (WHOLE, "-1", 0),
        (WHOLE, "NoDevFiles", 0),
        (WHOLE, "2", 1),
        (WHOLE, " 1, 0 ", 2),
        (WHOLE, "3,2,1,0", 4),
        # up to the first entry that names none
        (WHOLE, "0,7,1", 1),
        (WHOLE, "0,-1,1", 1),
        (WHOLE, "0,,1", 1),
        (WHOLE, "0,GPU-1,2", 1),
        (WHOLE, "1x,+2", 2),
        (WHOLE, "0,1,0", 0),
        (WHOLE, "GPU-00000000-aaaa,GPU-3", 2),
        (WHOLE, "GPU-0,1", 1),
        (WHOLE, "GPU-9", 0),
        (ALIKE, "GPU-cd,GPU-ab", 1),
        (ALIKE, "GPU-ab3,GPU-ab1", 2),
        (ALIKE, "GPU-ab3,GPU-ab34", 0),
        # one slice at most
        (SPLIT, None, 1),
        (SPLIT, "0,1", 1),
        (SPLIT, "MIG-1fe2,MIG-2ab3", 1),
        (SPLIT, "MIG-GPU-00000000/1/0", 1),
        (SPLIT, "", 0),
        ([*WHOLE[:2], *SPLIT], None, 2),
        ([], None, 0),
        ([], "0,1", 0),
        ([], "MIG-1fe2", 0),
    ],
)
def test_selections(gpus, selection, count):
    assert count_visible(gpus, selection) == count


def test_without_a_driver(tmp_path):
    nothing, amd = tmp_path / "nothing", tmp_path / "kfd"
    amd.touch()
    assert num_visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, str(nothing), nothing) == 0
    assert num_visible_gpus({"HIP_VISIBLE_DEVICES": "0"}, str(nothing), nothing) is None
    assert num_visible_gpus({"ROCR_VISIBLE_DEVICES": "0,1"}, str(nothing), nothing) is None
    assert num_visible_gpus({}, str(nothing), amd) is None


NVML = """
#include <stdio.h>
#include <string.h>
static int opened;
int nvmlInit_v2(void) { opened++; return INIT; }
int nvmlShutdown(void) { opened--; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = COUNT; return opened == 1 ? 0 : 1; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index == 2) return 4; /* no permission */
    *handle = (void *)(0x7f0000000000 + index);
    return 0;
}
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length) {
    return snprintf(uuid, length, "GPU-%llx", (unsigned long long)handle) < length ? 0 : 7;
}
int nvmlDeviceGetMigMode(void *handle, unsigned *mode, unsigned *pending) {
    unsigned index = (unsigned long long)handle & 15;
    *mode = *pending = index != 1;
    return index == 0 ? 3 : 0; /* 3: not supported */
}
"""


@pytest.fixture
def nvml(tmp_path):
    """``nvml(init, count)`` -> path of a library whose nvmlInit answers ``init``; ``count`` GPUs."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")

    def build(init: int, count: int = 4) -> str:
        source, library = tmp_path / "nvml.c", tmp_path / f"libnvml-{init}-{count}.so"
        source.write_text(NVML.replace("INIT", str(init)).replace("COUNT", str(count)))
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
        return str(library)

    return build


def test_nvml_is_asked(nvml, tmp_path):
    library, nothing = nvml(0), tmp_path / "nothing"
    assert read_gpus(library) == (
        Gpu("GPU-7f0000000000", False),
        Gpu("GPU-7f0000000001", False),
        Gpu("GPU-7f0000000003", True),
    )
    # SLURM sets AMD's variables beside NVIDIA's GPUs
    assert num_visible_gpus({"ROCR_VISIBLE_DEVICES": "0,1"}, library, nothing) == 2
    assert num_visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-7f0000000001"}, library, nothing) == 1


def test_a_driver_without_gpus_is_an_answer(nvml, tmp_path):
    assert num_visible_gpus({"ROCR_VISIBLE_DEVICES": "0,1"}, nvml(0, count=0), tmp_path / "nothing") == 0


def test_a_driver_that_does_not_work(nvml, tmp_path):
    assert num_visible_gpus({}, nvml(18), tmp_path / "nothing") == 0
    other = tmp_path / "text.so"
    other.write_text("not a library")
    assert num_visible_gpus({}, str(other), tmp_path / "nothing") == 0


@pytest.mark.promise("A3")
def test_counting_changes_nothing_and_loads_no_torch():
    program = (
        "import os, sys; before = dict(os.environ)\n"
        "from pantheraml.launch.gpus import num_visible_gpus; num_visible_gpus()\n"
        "assert dict(os.environ) == before; assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], env=environment, check=True
    )
