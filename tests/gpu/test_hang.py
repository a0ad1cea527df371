"""A run on two GPUs of which one rank's host sleeps for ever: NCCL's kernels wait on the other, whose host waits."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.launch.test_agent import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
SCRIPT = Path(__file__).with_name("hanging_train.py")


@pytest.mark.parametrize("where", ["loader", "backward"])
def test_a_rank_that_sleeps_is_named(llama, tmp_path, where):
    """In front of a step, and within one; the other's host runs ahead until it asks its GPU for a number."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(llama), str(tmp_path), where], env=environment(), capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip
    ended = time.time()
    assert done.returncode == 124, done.stderr
    report = (tmp_path / "hang-report-step4.txt").read_text()
    head = report.splitlines()[0]
    assert re.match(r"rank 1 of 2 \(\S+, pid \d+\) has not moved for \d+ s at step 4: it is in ", head), (
        report
    )
    assert "hanging_train.py" in head and "sleeps()" in head and "rank 0 waits in " in head, report
    assert "nccl:" in report and done.stderr.count("the run hangs") == 1, report
    assert ended - float((tmp_path / "slept").read_text()) < 60
    pids = [int(file.read_text()) for file in tmp_path.glob("pid*")]
    # With its process ends what it holds of a GPU.
    assert len(pids) == 2 and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_run_that_is_slow_goes_on(llama, tmp_path):
    """Kernels are compiled in its first step, which takes longer than hang_seconds."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(llama), str(tmp_path), "nowhere"], env=environment(), capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not list(tmp_path.glob("hang*")), done.stderr
