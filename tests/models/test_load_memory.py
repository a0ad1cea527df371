"""Loading holds no second copy of the weights: private memory of a fresh process, sampled from outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

ROOT = Path(__file__).parents[2]
GIB = 2**30

# Every tensor is cut from one block of random numbers: real values, written as fast as the disk takes them.
WRITE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=13,
    num_attention_heads=16, num_key_value_heads=4, dtype="bfloat16", architectures=["LlamaForCausalLM"])
config.save_pretrained(folder)
with torch.device("meta"):
    shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).named_parameters()}
block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
shards, size = [{}], 0
for name, shape in shapes.items():
    if size + 2 * shape.numel() > 100e6 and shards[-1]:
        shards.append({})
        size = 0
    shards[-1][name], size = shape, size + 2 * shape.numel()
where = {}
for number, shard in enumerate(shards, start=1):
    file = f"model-{number:05}-of-{len(shards):05}.safetensors"
    tensors = {name: block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape).clone()
               for name, shape in shard.items()}
    save_file(tensors, folder / file, {"format": "pt"})
    where |= dict.fromkeys(shard, file)
index = {"metadata": {"total_size": 2 * sum(shape.numel() for shape in shapes.values())}, "weight_map": where}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
"""

LOAD = """
import json, resource, sys
import torch, transformers, peft, bitsandbytes
from pantheraml import FastLanguageModel

def private():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

torch.zeros(10) @ torch.zeros(10)
print("BEFORE", private(), flush=True)
model, _ = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length=64, device_map="cpu", **json.loads(sys.argv[2]))
weights = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
state = [weight.quant_state for weight in model.parameters() if getattr(weight, "quant_state", None) is not None]
weights += sum(one.absmax.nbytes + (one.state2.absmax.nbytes if one.nested else 0) for one in state)
print("AFTER", private(), weights, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
with torch.no_grad():
    print("LOGITS", model.eval()(torch.arange(8)[None]).logits.abs().sum().item())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of 0.72 billion parameters in bfloat16: 1.45 GB in shards of at most 131 MB."""
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 4e9:
        pytest.skip("less than 4 GB of disk are free")
    tiny.build_tokenizer().save_pretrained(folder)
    subprocess.run([sys.executable, "-c", WRITE, str(folder)], check=True, timeout=240)
    yield folder
    shutil.rmtree(folder)


def load(folder: Path, flags: dict) -> dict[str, float]:
    """Bytes of a load in a fresh process: weights, private memory before, at its peak and after, peak RSS."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(folder), json.dumps(flags)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        peak = max(peak, 1024 * int(found[1])) if found else peak
        time.sleep(0.002)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    before, (after, weights, rss) = int(lines["BEFORE"][0]), map(int, lines["AFTER"])
    assert float(lines["LOGITS"][0]) > 0
    return {"weights": weights, "before": before, "peak": peak, "after": after, "rss": rss}


@pytest.mark.parametrize(
    ("flags", "bytes_each"),
    [
        ({"load_in_16bit": True}, 2.0),
        ({"load_in_4bit": False, "dtype": "float32"}, 4.0),
        ({"load_in_4bit": True, "dtype": "bfloat16"}, 0.8),
    ],
)
def test_no_second_copy_of_the_weights_is_held(checkpoint, flags, bytes_each, record_property):
    sizes = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert len(sizes) > 8 and sum(sizes) > 1.4e9
    found = load(checkpoint, flags)
    assert found["weights"] < 1.02 * bytes_each * sum(sizes) / 2
    most = found["weights"] + 1.2 * max(sizes) + GIB / 2
    assert most - found["weights"] < sum(sizes), "a second copy would not fit under the bound"
    private = found["peak"] - found["before"]
    figures = {
        name: round(value / GIB, 3) for name, value in {**found, "private": private, "most": most}.items()
    }
    print(flags, figures)
    for name, value in figures.items():
        record_property(name, value)
    assert private <= most
