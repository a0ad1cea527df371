"""Plain scripts and launchers on several GPUs: the numbers of one, each rank on its own, the speed of several."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pantheraml.devices.speed import products_per_second
from tests import tiny
from tests.launch.test_agent import ROOT, environment, run
from tests.launch.test_train import ACCELERATE, SCRIPT, TORCHRUN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
# What several GPUs have to reach of one. A model so small waits for its host, so the benchmark takes layers of 8B.
SPEED = {2: 1.8, 4: 3.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def train(model, output, ranks, launcher=()):
    visible = ",".join(map(str, range(ranks)))
    code, _, err = run(*launcher, SCRIPT, model, output, ranks, CUDA_VISIBLE_DEVICES=visible)
    assert code == 0, err
    return json.loads((output / "result.json").read_text())


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return train(model, tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.promise("A3", "A4", "A11")
@pytest.mark.parametrize("launcher", [[], TORCHRUN, ACCELERATE], ids=["python", "torchrun", "accelerate"])
def test_two_gpus_train_as_one_however_they_are_started(model, alone, tmp_path, launcher):
    found = train(model, tmp_path, 2, launcher)
    assert len(found["logs"]) == len(alone["logs"]) == 4
    for mine, theirs in zip(found["logs"], alone["logs"], strict=True):
        # Sums of other micro-batches, in the precision of the products of this GPU.
        assert mine == pytest.approx(theirs, rel=1e-3), (mine, theirs)
    assert sorted(found["memory"]) == ["gpu_0", "gpu_1"], "those of all ranks"
    assert all(
        0 < gpu["allocated"] <= gpu["peak_allocated"] < gpu["total"] for gpu in found["memory"].values()
    )


@pytest.mark.promise("B9")
def test_a_gpu_that_is_busy_is_measured_slower():
    """Another stream of products takes its part of the GPU."""
    device = torch.device("cuda", 1)
    free = products_per_second(device, torch.bfloat16)
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, env=environment()) as busy:
        try:
            assert busy.stdout is not None and busy.stdout.readline()
            beside = products_per_second(device, torch.bfloat16)
        finally:
            busy.kill()
    assert free > 1e13 and beside < 0.8 * free, f"{beside:.3g} beside another one, {free:.3g} alone"


BUSY = """
import torch
left = torch.ones(8192, 8192, device="cuda:1", dtype=torch.bfloat16)
for turn in range(10**6):
    found = left @ left
    if turn % 8 == 7:
        torch.cuda.synchronize(1)
    if turn == 8:
        print("busy", flush=True)
"""


def benchmark(tmp_path: Path, *words: str) -> list[dict]:
    file = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", *words, "--json", str(file)], cwd=ROOT, env=environment(), capture_output=True,
        text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    print(done.stdout)
    return json.loads(file.read_text())["lines"]


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.promise("C8")
def test_several_gpus_are_as_much_faster(tmp_path):
    ranks = 4 if torch.cuda.device_count() >= 4 else 2
    one, several = benchmark(tmp_path, "benchmarks.scaling", "--layers=16", f"--gpus=1,{ranks}")
    assert several["tok_s"] >= SPEED[ranks] * one["tok_s"]
    assert several["own_gpu_only"] and several["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.promise("E5")
def test_any_model_is_timed_on_several_gpus(tmp_path):
    counts = [count for count in (1, 2, 4, 8) if count <= torch.cuda.device_count()]
    lines = benchmark(tmp_path, "benchmarks.distillation", f"--gpus={','.join(map(str, counts))}")
    assert [line["ranks"] for line in lines] == counts
    speeds = [line["transitions_per_second"] for line in lines]
    assert speeds == sorted(speeds), "more GPUs are faster"
