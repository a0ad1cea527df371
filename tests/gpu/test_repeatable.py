"""On a GPU, two deterministic runs are equal bit by bit: every loss, every gradient norm, every trained weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.gpu.repeated_run import CASES, ON_RANKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def run(*words):
    """What ``repeated_run`` says, started by ``words``."""
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_equal(found, cases):
    assert found.keys() == cases.keys()
    for name, case in found.items():
        assert case["of"] > 0 and torch.isfinite(torch.tensor(case["last"])).all(), name
        assert (case["steps"], case["weights"]) == ([], 0), name


def test_two_runs_are_equal(tmp_path):
    assert_equal(run("-m", "tests.gpu.repeated_run", str(tmp_path)), CASES)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_runs_of_several_gpus_are_equal(tmp_path):
    """By DDP and FSDP2, whose sums over ranks NCCL makes in one order."""
    ranks = str(min(4, torch.cuda.device_count()))
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    assert_equal(run(*launch, "-m", "tests.gpu.repeated_run", str(tmp_path)), ON_RANKS)


def test_without_the_variable_it_is_refused(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.repeated_run", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "Type CUBLAS_WORKSPACE_CONFIG=:4096:8" in done.stderr
