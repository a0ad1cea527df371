"""GRPO's ways to generate are timed by the same work; one that fails says how."""

from __future__ import annotations

import json

import pytest

from benchmarks import grpo


@pytest.mark.slow
def test_ways_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "out.json"
    words = ["--shape=tiny", "--cpu", "--prompts=2", "--group=4", "--prompt=16", "--tokens=8", "--steps=3"]
    monkeypatch.setattr("sys.argv", ["grpo", *words, "--ways=fused,plain", f"--json={file}"])
    assert grpo.main() == 0
    fused, plain = json.loads(file.read_text())["lines"]
    assert fused["tokens"] == plain["tokens"] == 2 * 4 * 8, "every completion is as long as it may be"
    assert fused["grad_norm"] > 0 and plain["tok_s"] > 0
    assert "| plain |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_way_that_fails_says_how(tmp_path):
    line = grpo.run("fused", [f"--model={tmp_path / 'nothing'}", "--cpu"], 100)
    assert line["status"] == "code 1" and "nothing" in grpo.markdown([line])
