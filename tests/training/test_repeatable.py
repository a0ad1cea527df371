"""Deterministic training: what it switches on, and off again, what it passes over, and two runs that are one."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from pantheraml.errors import ConfigError
from pantheraml.training.repeatable import check_cublas
from tests import tiny
from tests.gpu.repeated_run import differences, train
from tests.training.test_checkpoints import build, folder  # noqa: F401 - a fixture


def flags():
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


class Asks(TrainerCallback):
    def __init__(self, fails):
        self.found, self._fails = [], fails

    def on_step_end(self, args, state, control, **_):
        self.found.append(flags())
        if self._fails:
            raise RuntimeError("ended by a test")


@pytest.mark.parametrize("fails", [False, True])
def test_torch_is_told_while_it_trains(folder, tmp_path, fails):  # noqa: F811
    before = flags()
    asks = Asks(fails)
    trainer = build(folder, tmp_path, deterministic=True, max_steps=1, save_strategy="no")
    trainer.add_callback(asks)
    if fails:
        with pytest.raises(RuntimeError, match="ended by a test"):
            trainer.train()
    else:
        trainer.train()
    assert asks.found == [(True, True, False)]
    assert flags() == before == (False, False, False)


class Refused(TrainerCallback):
    def on_step_end(self, *_, **__):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_what_has_no_fixed_order_is_refused(folder, tmp_path):  # noqa: F811
    for settings in ({}, dict(deterministic=True)):
        trainer = build(folder, tmp_path, max_steps=1, save_strategy="no", **settings)
        trainer.add_callback(Refused())
        if settings:
            with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
                trainer.train()
        else:
            trainer.train()


def test_two_runs_are_equal(tmp_path):
    llama = tiny.save_checkpoint(tmp_path / "llama", "llama")
    load = dict(load_in_4bit=False, device_map="cpu")
    runs = [train(llama, tmp_path, load, dict(lora_dropout=0.2, use_cpu=True)) for _ in range(2)]
    found = differences(*runs)
    assert found["of"] > 0 and (found["steps"], found["weights"]) == ([], 0)
    other = differences(runs[0], train(llama, tmp_path, load, dict(lora_dropout=0.2, use_cpu=True, seed=1)))
    assert len(other["steps"]) == 8 and other["weights"] == other["of"], "another seed is another run"


def test_a_gpu_needs_cublas_to_be_told():
    cuda = torch.device("cuda")
    for told in (":4096:8", ":16:8"):
        check_cublas(cuda, {"CUBLAS_WORKSPACE_CONFIG": told})
    check_cublas(torch.device("cpu"), {})
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG is :0:0"):
        check_cublas(cuda, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"})
