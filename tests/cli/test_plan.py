"""``pantheraml plan``, as a user runs it: no GPU, no weights."""

from __future__ import annotations

import json

import pytest
import torch

from pantheraml.cli.app import main
from pantheraml.devices.peak_memory import MemoryEstimate
from pantheraml.training import probe as probing
from pantheraml.training.probe import Probe
from tests import tiny

LLAMA_70B = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=8192,
    intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A folder with a configuration and nothing else."""
    folder = tmp_path / "llama-70b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return str(folder)


@pytest.fixture
def plan(capsys, monkeypatch):
    """``plan(model, ...)`` -> exit code, standard output, standard error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what was printed before
        with pytest.raises(SystemExit) as left:
            main(["plan", *words])
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


def test_a_plan_for_people(plan, model):
    code, out, err = plan(model, "--gpus", "8xH200", "--seq", "4096")
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "plan fsdp over 8, frozen weights sharded why a copy on each GPU would need" in said
    assert "none of 80 layers recompute; memory is fullest at head and loss" in said
    assert "runner-up tensor parallel 4 x data 2: 0." in said
    table = dict(
        line.rsplit(maxsplit=1) for line in out.splitlines() if line.startswith(("weights", "on the card"))
    )
    assert 20 < float(table["weights"]) < 23 and 75 < float(table["on the card"]) < 100
    assert len(out.splitlines()) < 30


def test_a_plan_for_machines(plan, model):
    words = ["--gpus=4x80GB", "--method=qlora", "--seq=2048", "--batch=2", "--optim=adamw_8bit", "--json"]
    code, out, err = plan(model, *words)
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["method"], said["seq"], said["batch"], said["optim"]) == ("qlora", 2048, 2, "adamw_8bit")
    assert said["gpu"] == {"name": "80GB", "memory": 80 * 10**9, "count": 4}
    chosen = said["plan"]
    assert chosen["strategy"] == "ddp" and chosen["data"] == 4
    assert chosen["micro_batch_rows"] * chosen["micro_batches"] == 2
    (memory,) = chosen["memory"]
    assert memory["reserved"] <= said["limit"] < said["gpu"]["memory"]
    parts = {name: size for name, size in memory.items() if name not in ("allocated", "reserved", "moment")}
    assert sum(parts.values()) == memory["reserved"]
    assert said["runner_up"]["strategy"] == "fsdp" and said["note"] is None


def test_stages_are_columns_and_recompute_is_obeyed(plan, model):
    words = ["--gpus=4xH200", "--strategy=pipeline", "--recompute=true"]
    code, out, _ = plan(model, *words)
    assert code == 0
    assert "pipeline of" in out and "stage 0" in out and "80 of 80 layers recompute" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to probe")
def test_a_probe_without_a_gpu_leaves_the_plan_as_it_is(plan, model):
    code, out, _ = plan(model, "--gpus=8xH200", "--probe", "--json")
    said = json.loads(out)
    assert code == 0 and "Peaks are measured on GPUs alone" in said["probe"]["reason"]
    assert said | {"probe": None} == json.loads(plan(model, "--gpus=8xH200", "--json")[1])
    code, out, _ = plan(model, "--gpus=8xH200", "--probe")
    assert code == 0 and "probe" in out and "Run this command with --probe" in " ".join(out.split())


def test_a_probe_is_part_of_the_plan(plan, model, monkeypatch):
    """What a GPU would have measured here is given."""
    estimated = MemoryEstimate(2**30, 0, 0, 0)
    found = Probe("NVIDIA H200", 1, 2048, 0, estimated, 2**31)
    monkeypatch.setattr(probing, "probe", lambda *_: found)
    code, out, _ = plan(model, "--gpus=8xH200", "--method=qlora", "--probe", "--json")
    said = json.loads(out)
    assert code == 0 and said["probe"]["ratio"] == 2.0 and said["probe"]["measured"] == 2**31
    assert said["plan"]["memory"][0]["reserved"] * 2 <= 0.95 * said["gpu"]["memory"]
    assert said["limit"] == int(0.95 * said["gpu"]["memory"] / 2)
    out = plan(model, "--gpus=8xH200", "--method=qlora", "--probe")[1]
    assert "2.00 GiB allocated, 1.00 estimated (2.000 of it" in " ".join(out.split())


def test_what_fits_nowhere(plan, model):
    code, out, err = plan(model, "--gpus=2x24GB", "--method=full")
    assert (code, out) == (2, "")
    assert err.startswith("pantheraml: Nothing fits on 2 x 24GB") and err.count(" saves ") == 3
    assert "--method lora saves" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus=8xH201"], "Did you mean 'H200'"),
        (["--gpus=2xH200", "--method=lorra"], "Did you mean 'lora'"),
        (["--gpus=2xH200", "--recompute=maybe"], "It is one of auto, true, false"),
        (["--gpus=2xH200", "--strategy=magic"], "strategy='magic'"),
        (["--gpus=2xH200", "--seq=0"], "seq=0 was given"),
    ],
)
def test_words_that_cannot_be(plan, model, words, said):
    code, _, err = plan(model, *words)
    assert code == 2 and said in err and "Traceback" not in err


def test_models_that_cannot_be_planned(plan, tmp_path):
    assert plan("org/not-here", "--gpus=H200")[0] == 2
    code, _, err = plan(str(tmp_path), "--gpus=H200")
    assert code == 2 and "holds no config.json" in err
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2")))
    code, _, err = plan(str(tmp_path), "--gpus=H200")
    assert code == 2 and "No family describes" in err


def test_weights_that_are_here_are_compared_by_their_headers(plan, tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "model", "llama")
    words = [str(folder), "--gpus=T4", "--json"]
    assert json.loads(plan(*words)[1])["note"] is None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    assert "the configuration asks for" in json.loads(plan(*words)[1])["note"]
    (folder / "model.safetensors").write_bytes(b"short")
    assert "a file of the weights" in json.loads(plan(*words)[1])["note"]
