"""Ranks that die are started again, and their run goes on as if nothing had been: real processes under the agent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.config.multi_gpu_section import MultiGPUSettings
from pantheraml.errors import ConfigError
from tests.distributed.ranks import run_ranks
from tests.launch import restarts
from tests.launch.test_agent import environment

SCRIPT = Path(__file__).with_name("restarted.py")


@pytest.mark.promise("C5")
def test_a_run_goes_on_after_ranks_have_died(llama, tmp_path):
    """From its own last whole checkpoint (another run's lies beside it), at last on fewer ranks."""
    whole, output = tmp_path / "whole", tmp_path / "output"
    want = run_ranks(2, restarts.train, llama, whole)[0]
    shutil.copytree(whole / "checkpoint-6", output / "checkpoint-6")
    shutil.copy(whole / "latest.json", output)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(llama), str(output)], env=environment(), capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in (
        "rank 1 was ended by SIGKILL",
        "after step 4; the ranks are started again (restart 1 of 2)",
        "the ranks were started again: going on with checkpoint-2.",
        "rank 1 left with exit code 0",
        "after step 4, and not by the end of its program",
        "the ranks are started again, 1 instead of 2 (restart 2 of 2)",
        "the ranks were started again: going on with checkpoint-4.",
    ):
        assert said in done.stderr, (said, done.stderr)
    start, ranks, logs = json.loads((output / "result.json").read_text())
    assert (start, ranks) == (2, 1)
    assert [log["step"] for log in logs] == [log["step"] for log in want] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(logs, want, strict=True):
        assert [mine[name] for name in ("loss", "grad_norm", "learning_rate")] == pytest.approx(
            [theirs[name] for name in ("loss", "grad_norm", "learning_rate")], rel=2e-6
        )


def test_max_restarts():
    assert MultiGPUConfig().max_restarts == MultiGPUSettings().to_config().max_restarts == 0
    assert MultiGPUSettings(max_restarts=3).to_config().max_restarts == 3
    for wrong in (-1, True, 1.5, "3"):
        with pytest.raises(ConfigError, match=r"max_restarts.*a whole number of 0 or more"):
            MultiGPUConfig(max_restarts=wrong)
