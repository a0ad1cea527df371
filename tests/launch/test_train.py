"""One script, the same numbers: one process, ranks that we start, torchrun, accelerate launch."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pantheraml.checkpoint.manifest import problems
from pantheraml.checkpoint.names import step_of
from tests import forked, tiny
from tests.launch.test_agent import run

SCRIPT = Path(__file__).with_name("train.py")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """One process's run."""
    output = tmp_path_factory.mktemp("alone")
    return result(output, 1, *forked.run(SCRIPT, model, output, 1))


def result(output, ranks, code, out, err):
    assert code == 0, err
    assert sorted(line for line in out.splitlines() if line.endswith("is done")) == [
        f"rank {rank} is done" for rank in range(ranks)
    ]
    told = json.loads((output / "result.json").read_text())
    return told | {"err": err, "telemetry": (output / "telemetry.jsonl").read_text().splitlines()}


@pytest.mark.promise("A3", "A4")
@pytest.mark.parametrize(
    ("ranks", "launcher", "more"),
    [
        (2, [], []),
        pytest.param(4, [], ["early"], marks=pytest.mark.slow),
        pytest.param(2, TORCHRUN, [], marks=pytest.mark.slow),
        pytest.param(2, ACCELERATE, [], marks=pytest.mark.slow),
    ],
    ids=["python", "python, arguments first", "torchrun", "accelerate"],
)
def test_the_same_script_gives_the_same_numbers(model, alone, tmp_path, ranks, launcher, more):
    words = [SCRIPT, model, tmp_path, ranks, *more]
    found = result(tmp_path, ranks, *(run(*launcher, *words) if launcher else forked.run(*words)))
    assert len(found["logs"]) == len(alone["logs"]) == 4
    for mine, theirs in zip(found["logs"], alone["logs"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert sorted(found["memory"]) == [f"cpu_{rank}" for rank in range(ranks)]
    assert all(row["rss"] > 0.1 for row in found["memory"].values())
    # Everything is said once.
    for line in ("LoRA r=16: ", "rows a step", "step 4, ", f"= {8} rows a step"):
        assert found["err"].count(line) == 1, line
    assert f"{ranks} ranks ({ranks} on " in found["err"]
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    steps = [json.loads(line) for line in found["telemetry"]]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["tokens_per_second"] > 0 and len(step["devices"]) == ranks for step in steps)


def test_a_run_that_is_asked_to_stop_saves_on_all_ranks(model, tmp_path, monkeypatch):
    """Its agent is sent the signal, by a person or a scheduler, and ends as the ranks do."""
    monkeypatch.setenv("MAX_STEPS", "5000")
    with (tmp_path / "said").open("w+") as said:
        agent = forked.start(SCRIPT, model, tmp_path, 2, out=said.fileno(), err=said.fileno())
        steps, end = tmp_path / "telemetry.jsonl", time.monotonic() + 100
        while not (steps.exists() and len(steps.read_text().splitlines()) > 3) and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(agent, signal.SIGTERM)
        code = forked.end(agent)
        said.seek(0)
        text = said.read()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert f"SIGTERM: stopped after step {step_of(checkpoint.name)} of 5000, saved in {checkpoint}; " in text
    assert not problems(checkpoint) and "rank 0 is done" not in text
    assert code == 143 and "SIGTERM: all ranks were ended." in text and "Traceback" not in text
