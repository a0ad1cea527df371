"""The printed run file on one GPU and on two: each has a process of its own, which takes what a run on one takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.host_memory import watch
from benchmarks.process_memory import stays_at_home
from tests import tiny
from tests.config.test_load import GUIDE
from tests.launch.test_agent import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
SIZES = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.save_checkpoint(folder, **SIZES, max_position_embeddings=512)


def run(folder, model, devices):
    """What was said, each process's GiB of each GPU by the driver, and the devices of the last logged step."""
    folder.mkdir()
    (folder / "run.yaml").write_text(GUIDE.replace("unsloth/Llama-3.2-1B-Instruct", str(model)))
    with (folder / "said").open("w+") as said:
        master = subprocess.Popen(
            [sys.executable, "-m", "pantheraml.train", "run.yaml", f"devices={devices}"],
            cwd=folder, env=environment(), stdout=said, stderr=said,
        )  # fmt: skip
        _, by_gpu = watch(master, time.monotonic() + 280)
    text = (folder / "said").read_text()
    assert master.returncode == 0, text
    (line,) = (folder / "debug_output" / "telemetry.jsonl").read_text().splitlines()
    return text, by_gpu, json.loads(line)["devices"]


@pytest.mark.promise("D1", "D2", "D3")
def test_each_process_has_its_own_gpu_and_takes_what_one_takes(model, tmp_path):
    _, alone, one = run(tmp_path / "one", model, "[0]")
    text, together, two = run(tmp_path / "two", model, "[0, 1]")
    assert "starting 2 ranks" in text and text.count("Training has ended.") == 1
    assert one.keys() == {"gpu_0"} and two.keys() == {"gpu_0", "gpu_1"}
    for row in two.values():
        # GiB: before the first step DDP sends weights around in pieces of 250 MiB. A second copy would be another 0.4.
        assert row["peak_allocated"] == pytest.approx(one["gpu_0"]["peak_allocated"], abs=0.26), (one, two)
    if not alone:
        pytest.skip("this driver does not list processes")
    # The master has no context, and neither worker one on the other's GPU.
    assert len(alone) == 1 and stays_at_home(alone)
    assert len(together) == 2 and stays_at_home(together)
