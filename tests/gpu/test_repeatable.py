"""On a GPU, two deterministic runs are equal bit by bit: every loss, every gradient norm, every trained weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.gpu.repeated_run import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_two_runs_are_equal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.repeated_run", str(tmp_path)],
        env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == CASES.keys()
    for name, case in found.items():
        assert case["of"] > 0 and torch.isfinite(torch.tensor(case["last"])).all(), name
        assert (case["steps"], case["weights"]) == ([], 0), name


def test_without_the_variable_it_is_refused(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.repeated_run", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "Type CUBLAS_WORKSPACE_CONFIG=:4096:8" in done.stderr
