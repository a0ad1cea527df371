"""Plans that are chosen are run as they say; what does not fit is a line that says so."""

from __future__ import annotations

import json

import pytest

from benchmarks import plan_chosen


def main(monkeypatch, *words: str) -> int:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["plan_chosen", "--shapes=tiny", "--seq=32", "--cpu", *words])
    return plan_chosen.main()


@pytest.mark.slow
def test_chosen_plans_are_run(tmp_path, monkeypatch, capsys):
    file = tmp_path / "chosen.json"
    assert main(monkeypatch, "--methods=lora", "--gpus=1,2", "--steps=3", f"--json={file}") == 0
    one, two = json.loads(file.read_text())["lines"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert (one["layout"], two["layout"]) == ("one GPU", "ddp, a copy on each of 2")
    assert one["batch"] * one["accumulation"] * 32 == 8192, "about 8,192 tokens for each GPU"
    assert not one["ran_out"] and two["grad_norm"] > 0
    assert "| ok |" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_and_told(monkeypatch, capsys):
    assert main(monkeypatch, "--methods=full", "--gpus=1", "--as=1GiB", "--seq=4000000") == 0
    assert "| tiny | full | 1 | refused: Nothing fits on 1 x" in capsys.readouterr().out


def test_a_run_that_fails_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr(plan_chosen, "LOADS", {"lora": "bf17"})
    assert main(monkeypatch, "--methods=lora", "--gpus=1") == 1
    assert "invalid choice" in capsys.readouterr().out


def test_memory_that_ran_out_is_told():
    line = dict(shape="a", method="full", gpus=1, layout="one GPU", batch=2, accumulation=1, planned=2**30)
    line |= dict(status="ok", allocated_gib=0.5, tok_s=9.0, grad_norm=1.0, ran_out=True)
    assert plan_chosen.markdown([line]).endswith("| 1.00 | 0.50 | +100.0 % | 9 | 1.0000 | ran out |")
