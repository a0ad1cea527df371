"""The plan grid: its runs, its table, and the strategies that it leaves to the config to refuse."""

from __future__ import annotations

import argparse
import json
import subprocess

import pytest

from benchmarks import plan_grid, plan_run
from benchmarks.plan_cases import FAMILIES, METHODS, PlanCase, config_of, grid
from benchmarks.shapes import save_random
from pantheraml.devices import estimate
from pantheraml.devices.layout import Layout
from pantheraml.devices.zero import Zero

GIB = 2**30


def test_24_runs_in_which_everything_meets():
    cases = grid(list(FAMILIES), list(METHODS), ["none"], "real")
    assert len(cases) == len(set(cases)) == 24
    assert {(case.family, case.method) for case in cases} == {(f, m) for f in FAMILIES for m in METHODS}
    assert len({(case.method, case.seq) for case in cases}) == 8
    assert {case.recompute for case in cases} == {"auto", True, False}
    assert len(grid(["llama"], ["lora", "full"], ["ddp", "fsdp"], "tiny")) == 8


def test_runs_in_this_process(tmp_path, monkeypatch):
    """Two runs of two methods; one that cannot be says why."""
    monkeypatch.setattr(plan_run, "STEPS", 1)
    folder = tmp_path / "model"
    save_random(config_of("qwen3", "tiny"), folder, device="cpu")
    cases = [PlanCase("qwen3", "lora", 2, 16, True), PlanCase("qwen3", "full", 1, 48, "auto")]
    (tmp_path / "cases.json").write_text(
        json.dumps(
            {"shape": "tiny", "folder": str(folder), "gpus": 1, "cases": [vars(case) for case in cases]}
        )
    )
    plan_run.main(tmp_path / "cases.json", tmp_path / "result.json")
    lora, full = json.loads((tmp_path / "result.json").read_text())
    assert (lora["status"], full["status"]) == ("ok", "ok")
    assert (lora["recomputing"], full["recomputing"]) == (2, 0)
    assert lora["measured"] is None and 0 < lora["planned"] < full["planned"]
    table = plan_grid.markdown([lora, full])
    assert "| qwen3 lora 16 x 2, recompute True | none | 2 |" in table
    assert "cannot be measured" in plan_grid.told(plan_grid.summary([lora, full]))
    broken = plan_run.run(PlanCase("qwen3", "lora", 1, 16, True), tmp_path / "nothing", "tiny")
    assert broken["status"] == "failed" and "nothing" in broken["reason"]


@pytest.mark.parametrize(
    ("method", "rows", "seq", "recomputing", "measured"),
    [
        ("lora", 1, 16384, 10, 5.51),
        ("qlora", 4, 2048, 0, 6.90),
        ("full", 4, 2048, 10, 13.48),
        ("lora", 4, 2048, 0, 7.53),
        ("qlora", 1, 16384, 0, 10.86),
    ],
)
def test_peaks_of_deepspeed(monkeypatch, method, rows, seq, recomputing, measured):
    """ZeRO-2 on two H200s, less what earlier runs of the process had left. Buckets were DeepSpeed's own then."""
    monkeypatch.setattr(
        estimate, "_zero", lambda parts, layout: Zero(layout.zero_stage, layout.shard, 500_000_000)
    )
    case = PlanCase("qwen3", method, rows, seq, True, "deepspeed")
    assert plan_run.planned(case, "real", 2, recomputing) / GIB == pytest.approx(measured, rel=0.01)


def test_what_runs_is_what_is_planned():
    """The layout is that of the very settings that the run gets."""
    for method, frozen in (("lora", True), ("full", None)):
        fsdp, zero = (PlanCase("llama", method, 1, 16, True, name) for name in ("fsdp", "deepspeed"))
        assert plan_run.config_for("fsdp", 2, method).shard_frozen is frozen
        assert plan_run.layout_of(fsdp, 2) == Layout("fsdp", data=2, shard=2, shard_frozen=True)
        assert plan_run.layout_of(zero, 2) == Layout("deepspeed", data=2, shard=2, zero_stage=2)
        assert plan_run.config_for("deepspeed", 2, method).zero_stage == 2
    pipeline = PlanCase("llama", "lora", 1, 16, True, "pipeline")
    assert plan_run.layout_of(pipeline, 2) == Layout("pipeline", pipeline=2)


@pytest.mark.parametrize("strategy", ["ddp", "pipeline"])
def test_a_pipeline_is_started_as_one_process(tmp_path, monkeypatch, strategy):
    started = []

    def start(words, **_):
        started.extend(words)
        return subprocess.CompletedProcess(words, 1, stdout="")

    monkeypatch.setattr(plan_grid.subprocess, "run", start)
    options = argparse.Namespace(shape="tiny", gpus=2, cpu=True, timeout=1)
    (found,) = plan_grid.run_family([PlanCase("llama", "lora", 1, 16, True, strategy)], options, tmp_path)
    assert found["status"] == "failed"
    assert ("--nproc_per_node=2" in started) == (strategy == "ddp")


def line(planned, predicted, measured):
    case = PlanCase("llama", "lora", 4, 2048, "auto")
    sizes = dict(planned=planned * GIB, predicted=predicted * GIB, measured=measured * GIB)
    return {**vars(case), "status": "ok", "recomputing": 0, "seconds": 9.0, **sizes}


def test_errors_and_shares():
    lines = [line(9.6, 10.0, 10.0), line(10.4, 10.7, 10.0), line(8.5, 10.0, 10.0)]
    lines += [{**line(1, 1, 1), "status": "not run", "reason": "no GPU", "measured": None}]
    found = plan_grid.summary(lines)
    assert (found["runs"], found["ok"]) == (4, 3)
    assert found["planned"] == pytest.approx(dict(measured=3, within_5=2 / 3, within_10=2 / 3, worst=-15.0))
    assert found["predicted"] == pytest.approx(dict(measured=3, within_5=2 / 3, within_10=1.0, worst=7.0))
    assert "| 9.60 | 10.00 | 10.00 | -4.0 % | +0.0 % | 9 |" in plan_grid.markdown(lines)
    assert "not run: no GPU" in plan_grid.markdown(lines)
    assert "planned: 67% within 5 %, 67% within 10 %, worst -15.0 %." in plan_grid.told(found)


def test_the_config_says_which_strategies_there_are():
    from pantheraml import MultiGPUConfig
    from pantheraml.errors import PantheraMLError

    assert plan_grid.why_not("ddp", 2) is None and plan_grid.why_not("none", 1) is None
    assert "for one GPU" in plan_grid.why_not("none", 2)
    for strategy in ("fsdp", "deepspeed"):
        try:
            MultiGPUConfig(strategy=strategy)
            is_there = True
        except PantheraMLError:
            is_there = False
        assert (plan_grid.why_not(strategy, 2) is None) == is_there


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    words = ["--shape=tiny", "--cpu", "--families=llama,gemma2", f"--json={tmp_path / 'grid.json'}"]
    monkeypatch.setattr("sys.argv", ["plan_grid", *words])
    assert plan_grid.main() == 0
    told = json.loads((tmp_path / "grid.json").read_text())
    assert told["summary"]["runs"] == told["summary"]["ok"] == 12
    assert "12 of 12 runs were made" in capsys.readouterr().out
