"""GPUs, driver and torch, from facts; and a list of GPUs on a machine that has none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pantheraml.devices.nvml import Driver, Gpu
from pantheraml.doctor.checks import builds, gpus
from pantheraml.doctor.examination import examine

TWO = (Gpu("GPU-aaaa", False), Gpu("GPU-bbbb", False))
WELL = gpus.Facts(TWO, 2, None, True, ("NVIDIA H200",) * 2, (None, None))
CPU = gpus.Facts(None, 0, None, False)


def only(found):
    (row,) = found
    return row


def test_machines_that_are_well():
    assert only(gpus.judge(WELL)).seen == "2 x NVIDIA H200"
    one = replace(WELL, selection="1", names=("NVIDIA H200",), failures=(None,))
    assert only(gpus.judge(one)).seen == "1 x NVIDIA H200; 1 more hidden by CUDA_VISIBLE_DEVICES=1"
    # AMD's, of which NVML knows nothing, and a slice of a GPU.
    amd = gpus.Facts(None, 0, "0", True, ("MI300X",), (None,))
    split = gpus.Facts((Gpu("GPU-aaaa", True),), 1, "MIG-1234", True, ("H200 MIG 1g",), (None,))
    assert {only(gpus.judge(one)).state for one in (WELL, one, amd, split)} == {"ok"}
    for selection in (None, "", "-1", "NoDevFiles"):
        row = only(gpus.judge(replace(CPU, selection=selection)))
        assert (row.state, row.seen) == ("skipped", "no GPU")


@pytest.mark.parametrize("selection", ["", "-1", "-1,0"])
def test_gpus_that_are_hidden(selection):
    row = only(gpus.judge(replace(WELL, selection=selection, names=(), failures=())))
    assert row.state == "note" and "all 2 are hidden" in row.seen and "unset CUDA_VISIBLE_DEVICES" in row.fix


@pytest.mark.parametrize(
    ("facts", "seen", "fix"),
    [
        (dict(selection="0,7", names=("H200",), failures=(None,)), "names 7, which is not there: CUDA shows 1 of 2",
         "Type export CUDA_VISIBLE_DEVICES=0,1"),
        (dict(selection="1,1", names=(), failures=()), "names 1 twice: CUDA shows 0 of 2", "VISIBLE_DEVICES=0,1"),
        (dict(selection="GPU-cc", names=(), failures=()), "names GPU-cc, which is not there", "VISIBLE_DEVICES=0,1"),
        (dict(has_cuda=False, names=(), failures=()), "the driver shows 2, torch counts 0", "a torch that is built"),
        (dict(names=("H200",), failures=(None,)), "the driver shows 2, torch counts 1", "torch.cuda.init()"),
        (dict(failures=(None, "RuntimeError: CUDA error: no kernel image is available")), "GPU 1 (NVIDIA H200)",
         "built for NVIDIA H200"),
        (dict(failures=("AcceleratorError: CUDA error: uncorrectable ECC error", None)), "GPU 0", "nvidia-smi -i 0 -q"),
        (dict(driver=None, names=(), failures=(), has_cuda=False), "2 of NVIDIA on the PCI bus, and no driver",
         "Type nvidia-smi"),
    ],
)  # fmt: skip
def test_each_fault_is_red_and_names_its_fix(facts, seen, fix):
    row = only(gpus.judge(replace(WELL, **facts)))
    assert row.state == "bad" and seen in row.seen and fix in row.fix


def test_a_gpu_that_is_not_there_for_real(monkeypatch):
    """In the process of the probe, as `pantheraml doctor` does."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    row = only(examine(()))
    assert row.state == "bad" and "names a GPU, and there is no NVIDIA driver" in row.seen
    assert row.fix == "Type unset CUDA_VISIBLE_DEVICES."


def test_the_bus_is_read(tmp_path):
    for name, vendor, kind in (
        ("0", "0x10de", "0x030200"),
        ("1", "0x10de", "0x040300"),
        ("2", "0x8086", "0x030000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert gpus.num_on_bus(tmp_path) == 1, "a sound device of NVIDIA and a GPU of Intel do not count"
    assert gpus.num_on_bus(tmp_path / "none") == 0


def build(torch="2.13.0+cu130", cuda="13.0", driver=(13, 1), **more):
    return builds.Facts(Driver("580.159.04", driver), 2, torch, cuda, **more)


def test_builds_that_fit():
    assert "driver 580.159.04 (CUDA 13.1), torch 2.13.0+cu130 (CUDA 13.0)" in only(builds.judge(build())).seen
    # All minor versions of a major one run.
    assert only(builds.judge(build(cuda="13.2", driver=(13, 0)))).state == "ok"
    assert only(builds.judge(build(torch="2.11.0+cu128", cuda="12.8"))).state == "ok"
    assert only(builds.judge(builds.Facts(None, 0, "2.11.0+rocm7", None, "7.0"))).state == "ok"
    assert only(builds.judge(builds.Facts(None, 0, "2.13.0+cpu"))).state == "skipped"


@pytest.mark.parametrize(
    ("facts", "seen", "fix"),
    [
        (build("2.13.0+cpu", None), "is built for the CPU", "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"),
        (build("2.13.0+cpu", None, (12, 4)), "is built for the CPU", "/whl/cu126"),
        (build(driver=(12, 8)), "is built for CUDA 13.0", "Update the driver to 580 or newer, or type pip install"),
        (builds.Facts(Driver("580", (13, 0)), 1, None), "torch is not installed", "pip install 'torch"),
    ],
)  # fmt: skip
def test_builds_that_do_not_fit(facts, seen, fix):
    row = only(builds.judge(facts))
    assert row.state == "bad" and seen in row.seen and fix in row.fix


def test_the_build_of_torch_is_read_from_its_own_file():
    import torch

    facts = builds.probe()
    assert (facts.torch, facts.cuda) == (torch.__version__, torch.version.cuda)
