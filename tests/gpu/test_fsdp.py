"""Weights shared out between two GPUs: the training of one GPU, in the memory that the plan says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pantheraml.checkpoint.manifest import problems
from tests.launch.test_agent import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
SCRIPT = Path(__file__).with_name("shared_train.py")


def train(folder_of_model, folder, ranks, kind, resume=None, **config):
    """What rank 0 of a run says, that saves after steps 3 and 6: losses, gradient norms, bytes of layers, the peak."""
    folder.mkdir()
    given = [folder_of_model, folder, ranks, kind, json.dumps(config), *([] if resume is None else [resume])]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, given)],
        env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.parametrize("kind", ["float32", "bf16", "nf4", "fp8", "full"])
def test_two_gpus_train_as_one(wide_llama, tmp_path, kind):
    one = train(wide_llama, tmp_path / "one", 1, kind)
    two = train(wide_llama, tmp_path / "two", 2, kind, strategy="fsdp", shard_frozen=True)
    tolerance = 2e-5 if kind == "float32" else 2e-2
    for mine, theirs in zip(two["figures"], one["figures"], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    assert two["layers"] < 0.53 * one["layers"]
    assert "shared out" in two["said"]
    # What is trained is computed by fused layers, too, in what it is gathered in.
    assert two["fused"] == 8 * ["torch.float32" if kind == "float32" else "torch.bfloat16"]


def test_layers_in_host_memory(wide_llama, tmp_path):
    here = train(wide_llama, tmp_path / "here", 2, "bf16", strategy="fsdp", shard_frozen=True)
    away = train(
        wide_llama, tmp_path / "away", 2, "bf16", strategy="fsdp", shard_frozen=True, cpu_offload=True
    )
    assert away["figures"] == here["figures"]
    assert away["peak"] < here["peak"]


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_a_run_goes_on_from_the_parts_of_its_ranks(wide_llama, tmp_path, cpu_offload):
    shared = {"strategy": "fsdp", "cpu_offload": cpu_offload}
    whole = train(wide_llama, tmp_path / "whole", 2, "full", **shared)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert len(list(checkpoint.rglob("*.distcp"))) == 2 and not problems(checkpoint)
    again = train(wide_llama, tmp_path / "again", 2, "full", checkpoint, **shared)
    one = train(wide_llama, tmp_path / "one", 1, "full", checkpoint)
    for name, found, within in (("again", again, 1e-4), ("one", one, 2e-2)):
        for mine, theirs in zip(found["figures"][3:], whole["figures"][3:], strict=True):
            assert mine == pytest.approx(theirs, rel=within), name


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    from tests import tiny

    sizes = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8)
    return tiny.save_checkpoint(tmp_path_factory.mktemp("wide"), "llama", **sizes, num_key_value_heads=4)
