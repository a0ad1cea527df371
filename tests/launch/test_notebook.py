"""Typed programs start ranks for a function: real interactive Pythons, fed by a pipe, and what comes back to them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pantheraml import MultiGPUConfig, notebook_launch
from pantheraml.errors import ConfigError, RunStopped
from pantheraml.launch.stopping import note_stop
from tests import tiny
from tests.launch.test_agent import environment, run

TYPED = """
import os
from pantheraml import MultiGPUConfig, all_reduce_scalar, get_rank, notebook_launch, setup_multi_gpu
from pantheraml.launch.environment import LaunchEnvironment
factor = 10
class Mine(Exception): pass

def add(number):
    import torch, torch.distributed as dist
    total = all_reduce_scalar(get_rank() + number)
    found = LaunchEnvironment.detect()
    return [total * factor, torch.ones(2), found.kind, found.world_size, dist.get_backend(), Mine]

def fail():
    if get_rank() == 1:
        raise Mine("typed")
    all_reduce_scalar(1.0)

def leave():
    if get_rank() == 1:
        os._exit(7)
    all_reduce_scalar(1.0)

def show(*values):
    print("found", *values)

before = dict(os.environ)
total, tensor, *rest, kind = notebook_launch(add, 1, num_processes=2)
show(total, tensor.sum().item(), *rest, kind is Mine)
show(notebook_launch(add, 5, config=MultiGPUConfig(num_processes=3, backend="gloo"))[0], before == os.environ)
try:
    notebook_launch(fail, num_processes=2)
except Mine as error:
    show(repr(error), "in fail" in str(error.__cause__))

try:
    notebook_launch(leave, num_processes=2)
except RuntimeError as error:
    show(error)

try:
    notebook_launch(lambda: notebook_launch(add, 1, num_processes=2), num_processes=1)
except ValueError as error:
    show(error)

try:
    setup_multi_gpu(MultiGPUConfig(num_processes=2))
except ValueError as error:
    show(error)

"""


@pytest.mark.parametrize(
    "words", [["-i"], pytest.param(["-"], marks=pytest.mark.slow)], ids=["interactive", "piped"]
)
def test_a_typed_function_runs_on_ranks(words):
    code, out, err = run(*words, stdin=TYPED)
    assert code == 0, err
    found = [line.removeprefix("found ") for line in out.splitlines() if line.startswith("found")]
    assert found[:3] == ["30.0 2.0 pantheraml 2 gloo True", "180.0 True", "Mine('typed') True"], err
    assert found[3].startswith("rank 1 ended with exit code 7 on ")
    assert found[4].startswith("notebook_launch was called by rank 0 of 1.")
    assert "2 ranks were asked for" in found[5] and "write notebook_launch(fn)" in found[5]
    assert err.count("starting 2 ranks of this function") == 3  # of both ranks' output, the main one's alone


TRAINS = """
from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments, notebook_launch
from datasets import Dataset
early = PantheraMLTrainingArguments(
    per_device_train_batch_size=2, max_steps=3, logging_steps=1, output_dir={output!r}, report_to="none",
    save_strategy="no", learning_rate=1e-3,
)
rows = Dataset.from_dict({{"text": [f"The capital number {{i}} is {{i * 7}}." for i in range(21)]}})
def train(accumulation):
    import copy
    args = copy.copy(early)
    args.gradient_accumulation_steps = accumulation
    model, tokenizer = FastLanguageModel.from_pretrained(
        {model!r}, max_seq_length=64, load_in_4bit=False, use_multi_gpu=True
    )
    trainer = PantheraMLDistributedTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
    trainer.train()
    memory = trainer.get_model_memory_usage()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], sorted(memory)

for ranks in (1, 2):
    print("found", *notebook_launch(train, 4 // ranks, num_processes=ranks))

"""


@pytest.mark.slow
def test_the_trainer_gives_the_same_numbers_on_any_number_of_ranks(tmp_path):
    """With rows and arguments that were made in the notebook, for a process that is no rank."""
    model = tiny.save_checkpoint(tmp_path / "model", "llama")
    code, out, err = run("-i", stdin=TRAINS.format(model=str(model), output=str(tmp_path / "out")))
    assert code == 0, err
    one, two = (line.removeprefix("found ") for line in out.splitlines() if line.startswith("found"))
    losses = [[float(number) for number in re.findall(r"\d+\.\d+(?:e-\d+)?", line)] for line in (one, two)]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert one.endswith("['cpu']") and two.endswith("['cpu_0', 'cpu_1']")


WAITS = """
import os, pathlib, time
from pantheraml import get_rank, notebook_launch
def wait():
    pathlib.Path({folder!r}, str(os.getpid())).touch()
    time.sleep(100)

try:
    notebook_launch(wait, num_processes=2)
except KeyboardInterrupt:
    print("found interrupt", flush=True)

try:
    time.sleep(100)
except KeyboardInterrupt:
    print("found another", flush=True)

"""


def test_ctrl_c_ends_the_ranks_and_not_the_notebook(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-i"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    process.stdin.write(WAITS.format(folder=str(tmp_path)))
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [file.name for file in tmp_path.iterdir()]
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "found interrupt\n"
    assert len(ranks) == 2 and not any(Path("/proc", rank).exists() for rank in ranks)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out == "found another\n" and process.returncode == 0, err


def test_what_cannot_be_sent_is_named():
    rows = (number for number in range(3))
    with pytest.raises(ConfigError, match=r"cannot be sent to other processes.*argument 1 cannot be copied"):
        notebook_launch(print, 1, rows, num_processes=2)
    with pytest.raises(ConfigError, match="num_processes=2 and a config with 3"):
        notebook_launch(print, num_processes=2, config=MultiGPUConfig(num_processes=3))


def give_back_what_cannot_be_copied():
    return (number for number in range(3))


def test_a_result_that_cannot_come_back_is_refused():
    with pytest.raises(ConfigError, match="What rank 0 returned cannot be sent back"):
        notebook_launch(give_back_what_cannot_be_copied, num_processes=1)


def stop_as_a_run_does():
    note_stop("STOP: stopped after step 3.")
    sys.exit(75)


def test_a_run_that_was_stopped_did_not_fail():
    with pytest.raises(RunStopped, match="STOP: stopped after step 3") as stopped:
        notebook_launch(stop_as_a_run_does, num_processes=1)
    assert stopped.value.code == 75


def test_one_process_where_the_strategy_is_none():
    from pantheraml import get_world_size

    assert notebook_launch(get_world_size, config=MultiGPUConfig(num_processes=2, strategy="none")) == 1


def test_nodes_of_slurm_are_refused():
    step = dict(
        SLURM_JOB_ID="7", SLURM_STEP_ID="0", SLURM_STEP_NODELIST="node[1-2]", SLURM_STEP_NUM_TASKS="2",
        SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-i"], input="import pantheraml\npantheraml.notebook_launch(print)\n", text=True,
        capture_output=True, env=environment(**step), timeout=60, check=False,
    )  # fmt: skip
    assert "notebook_launch was called on 2 nodes of SLURM" in done.stderr
