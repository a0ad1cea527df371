"""The benchmark of the example runs on CPU ranks, and tells what failed."""

from __future__ import annotations

import json

import pytest

from benchmarks import distillation

SMALL = [
    "grid_size=5", "episode_length=5", "n_transit=20", "unseen_goals=4", "learners_per_goal=2", "learner_episodes=4",
    "tf_n_embd=16", "train_batch_size=4", "log_every=5",
]  # fmt: skip


@pytest.mark.promise("E5")
@pytest.mark.slow
def test_runs_are_timed_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--gpus=1,2", "--cpu", "--steps=20", "--ways=python,accelerate", *SMALL]
    monkeypatch.setattr("sys.argv", ["distillation", *words, f"--json={tmp_path / 'out.json'}"])
    assert distillation.main() == 0, capsys.readouterr().out
    lines = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert [(line["ranks"], line["processes"], line["histories_per_step"]) for line in lines] == [
        (1, 1, 4), (1, 1, 4), (2, 2, 8), (2, 2, 8)
    ]  # fmt: skip
    assert all(line["ms_per_step"] > 0 for line in lines)
    monkeypatch.setattr("sys.argv", ["distillation", "--gpus=1", "--cpu", "tf_n_head=3"])
    assert distillation.main() == 1
    assert "| 1 | python | code 1: " in capsys.readouterr().out


@pytest.mark.promise("E5")
def test_the_table_compares_the_same_work():
    one = {
        "ranks": 1,
        "way": "python",
        "status": "ok",
        "device": "CPU",
        "histories_per_step": 512,
        "ms_per_step": 72.0,
    }
    two = {**one, "ranks": 2, "histories_per_step": 1024, "ms_per_step": 80.0}
    for line in (one, two):
        line["transitions_per_second"] = line["histories_per_step"] * 240 / line["ms_per_step"] * 1e3
    rows = distillation.markdown([one, two]).splitlines()
    assert rows[2].endswith("| 1.00 | 1.00 |") and rows[3].endswith("| 1.80 | 0.56 |")
