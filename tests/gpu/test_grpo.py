"""GRPO on GPUs: two train as one, and the reward of the example rises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pantheraml.models.state import get_state
from tests import tiny
from tests.gpu.test_out_of_memory import LENGTH, WIDE, Limit
from tests.launch.test_agent import environment
from tests.training.grpo_runs import build

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).with_name("grpo_train.py")
EXAMPLE = Path(__file__).parents[2] / "examples/grpo_arithmetic.py"


def run(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=290, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train(model, folder, ranks, **settings):
    folder.mkdir()
    run(SCRIPT, model, folder, ranks, json.dumps(settings))
    return json.loads((folder / "figures.json").read_text())


def test_the_reward_of_the_example_rises(tmp_path):
    out = run(EXAMPLE, "--num-gpus", "1", "--output", tmp_path)
    first, *_, last = [float(line.split()[1]) for line in out.splitlines() if line.startswith("reward ")]
    assert first < 0.25 and last > 0.6


def test_completions_are_generated_by_recorded_steps(tmp_path):
    model = tiny.save_checkpoint(tmp_path / "llama", "llama")
    trainer = build(
        model, tmp_path, loading={"device_map": None}, use_cpu=False, bf16=True, per_device_train_batch_size=8
    )
    trainer.train()
    assert not trainer.generation_config.disable_compile and trainer.model.training
    assert not get_state(trainer.model).decoding.report()


def trained_within(folder, output, more):
    """Figures of each step, the most tokens of a pass, and the bytes that training took; see ``Limit``."""
    limit = Limit(more)
    trainer = build(
        folder, output, loading={"device_map": None, "dtype": "float32", "max_seq_length": LENGTH}, recompute=False,
        use_cpu=False, ends=[2], callbacks=[limit], per_device_train_batch_size=16, max_steps=2, beta=0.04,
        max_completion_length=512, learning_rate=1e-4,
    )  # fmt: skip
    try:
        trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    figures = [[line[name] for name in ("loss", "grad_norm", "reward", "kl", "entropy")] for line in logs]
    return figures, trainer._limit.most, limit.taken()


def test_a_step_that_does_not_fit_is_repeated(tmp_path):
    model = tiny.save_checkpoint(tmp_path / "wide", "llama", **WIDE)
    wanted, most, taken = trained_within(model, tmp_path, None)
    assert most > 10**9
    found, most, _ = trained_within(model, tmp_path, 0.5 * taken)
    assert most < 16 * 512, "it did run out of memory"
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.promise("C2")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_train_as_one(tmp_path):
    model = tiny.save_checkpoint(tmp_path / "llama", "llama")
    one = train(model, tmp_path / "one", 1)
    for name, settings in {"ddp": {}, "fsdp": {"strategy": "fsdp", "shard_frozen": True}}.items():
        two = train(model, tmp_path / name, 2, **settings)
        assert two["strategy"] == name and two["steps"] == one["steps"]
        for mine, theirs in zip(two["logged"], one["logged"], strict=True):
            assert mine == [
                None if value is None else pytest.approx(value, rel=1e-3, abs=1e-4) for value in theirs
            ]
