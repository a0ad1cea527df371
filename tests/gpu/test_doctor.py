"""``pantheraml doctor`` on machines with GPUs: green where all is well, red where a fault is seeded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from pantheraml.doctor.checks import host_link, peer_copies
from pantheraml.doctor.examination import examine
from pantheraml.doctor.links import pcie_link, read_peer_link, read_wires
from tests.launch.test_agent import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPUS = torch.cuda.device_count()


def doctor(*words, **variables):
    done = subprocess.run(
        [sys.executable, "-m", "pantheraml", "doctor", "--json", *words], env={**environment(), **variables},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    bad = [row for row in report["findings"] if row["state"] == "bad"]
    assert not bad, done.stdout
    assert done.returncode == 0 and report["healthy"]
    return {row["check"]: row for row in report["findings"]}


def test_all_gpus_are_green():
    rows = doctor()
    states = {name: row["state"] for name, row in rows.items()}
    left_out = {name for name, state in states.items() if state == "skipped"}
    assert left_out == (set() if GPUS > 1 else {"copies between GPUs"}), states
    assert f"{GPUS} x {torch.cuda.get_device_name()}" in rows["GPUs"]["seen"]
    assert f"torch {torch.__version__}" in rows["driver and torch"]["seen"]
    assert torch.cuda.get_device_name() in rows["bitsandbytes"]["seen"]
    assert f"cuda:{GPUS - 1}" in rows["Triton"]["seen"]
    assert "torch-flash" in rows["attention"]["seen"].split("(")[0]
    if GPUS > 1:
        assert f"{GPUS} ranks (nccl) are right" in rows["all-reduce"]["seen"]
        assert f"{GPUS} ranks (GPUs)" in rows["one rank and several"]["seen"]
        assert f"{GPUS * (GPUS - 1)} ways, the same bytes on each" in rows["copies between GPUs"]["seen"]


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
def test_one_gpu_of_several():
    rows = doctor("--quick", CUDA_VISIBLE_DEVICES="0")
    assert "1 more hidden" in rows["GPUs"]["seen"] or GPUS > 2
    assert rows["copies between GPUs"] == {
        "check": "copies between GPUs", "state": "skipped", "seen": "one GPU", "fix": ""
    }  # fmt: skip
    assert "gloo" in rows["all-reduce"]["seen"] and rows["one rank and several"]["state"] == "skipped"


def test_a_list_that_names_a_gpu_which_is_not_there(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,99")
    (row,) = examine(())
    assert row.state == "bad" and "names 99, which is not there" in row.seen
    assert row.fix.startswith("Type export CUDA_VISIBLE_DEVICES=0")


def test_hidden_gpus_are_a_note(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = examine(())
    assert row.state == "note" and "unset CUDA_VISIBLE_DEVICES" in row.fix
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def flip(source, target):
    """A copy that turns one bit."""
    target.copy_(source)
    target[target.numel() // 2] ^= 1


def test_a_copy_to_the_host_that_turns_a_bit():
    link = host_link.measure("cuda:0", pcie_link(read_wires(0)), 0, size=2**20, copy=flip)
    (row,) = host_link.judge((link,))
    assert row.state == "bad" and "Do not train on GPU 0" in row.fix


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
def test_a_copy_between_gpus_that_turns_a_bit():
    copy = peer_copies.measure((0, 1), read_peer_link(0, 1), ("cuda:0", "cuda:1"), size=2**20, copy=flip)
    row = peer_copies.judge((copy,))[0]
    assert row.state == "bad" and "0 to 1" in row.seen and "NCCL_P2P_DISABLE=1" in row.fix
