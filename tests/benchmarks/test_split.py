"""The benchmark of split models runs on a CPU, where one process has one device, and tells what failed."""

from __future__ import annotations

import json

import pytest

from benchmarks import split
from tests import tiny


@pytest.mark.slow
def test_one_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = tiny.save_checkpoint(tmp_path / "model", "llama")
    words = [
        "--gpus=1",
        "--cpu",
        "--precision=float32",
        "--seq=16",
        "--batch=2",
        "--micro-batches=2",
        "--steps=3",
    ]
    monkeypatch.setattr("sys.argv", ["split", f"--model={model}", *words, f"--json={tmp_path / 'out.json'}"])
    assert split.main() == 0
    (line,) = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert line["tok_s"] > 0 and line["grad_norm"] > 0 and line["host_ms"] is None
    assert "| 1 | " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["split", f"--model={tmp_path / 'nothing'}", *words])
    assert split.main() == 1
    assert "code 1" in capsys.readouterr().out
