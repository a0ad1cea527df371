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
    different = {name: case for name, case in found.items() if case["steps"] or case["weights"]}
    assert not different, different


def test_two_runs_are_equal(tmp_path):
    assert_equal(run("-m", "tests.gpu.repeated_run", str(tmp_path)), CASES)


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_runs_of_several_gpus_are_equal(tmp_path, ranks):
    """By DDP and FSDP2, whose sums over ranks NCCL makes in one order."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA GPUs")
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    assert_equal(run(*launch, "-m", "tests.gpu.repeated_run", str(tmp_path)), ON_RANKS)


def test_without_the_variable_it_is_refused(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.repeated_run", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "Type CUBLAS_WORKSPACE_CONFIG=:4096:8" in done.stderr
