"""Two GPUs compute each layer together through NCCL: the figures, the tokens and the merged model of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.launch.test_agent import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
SCRIPT = Path(__file__).with_name("tensor_train.py")


def train(folder, output, degree, dtype):
    output.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(output), str(degree), dtype],
        env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((output / "found.json").read_text()), load_file(output / "merged" / "model.safetensors")


# Steps of Adam after the first let a gradient's last bits decide the sign of what is nearly zero.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", (2e-5, 2e-4)), ("bfloat16", (2e-2, 2e-2))])
def test_two_gpus_equal_one(tmp_path, dtype, tolerance):
    sizes = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
                 num_key_value_heads=4)  # fmt: skip
    folder = tiny.save_checkpoint(tmp_path / "model", "llama", **sizes)
    one, merged = train(folder, tmp_path / "one", 1, dtype)
    two, gathered = train(folder, tmp_path / "two", 2, dtype)
    for step, (mine, theirs) in enumerate(zip(two["logs"], one["logs"], strict=True)):
        assert mine == pytest.approx(theirs, rel=tolerance[step > 0]), (two["logs"], one["logs"])
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=tolerance[1])
    assert two["held"] < 0.51 * one["held"]
    assert merged.keys() == gathered.keys()
    for name, value in merged.items():
        torch.testing.assert_close(gathered[name], value, rtol=2e-2, atol=2e-3)
    if dtype == "float32":
        assert two["tokens"] == one["tokens"]
