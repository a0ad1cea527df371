"""The scaling benchmark runs on CPU ranks and tells what failed."""

from __future__ import annotations

import json

from benchmarks import scaling
from tests import tiny


def test_two_ranks_and_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = tiny.save_checkpoint(tmp_path / "model", "llama")
    words = ["--gpus=1,2", "--cpu", "--precision=float32", "--seq=16", "--batch=2", "--steps=3"]
    monkeypatch.setattr(
        "sys.argv", ["scaling", f"--model={model}", *words, f"--json={tmp_path / 'out.json'}"]
    )
    assert scaling.main() == 0
    lines = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert [(line["ranks"], len(line["devices"])) for line in lines] == [(1, 1), (2, 2)]
    assert all(line["tok_s"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert "| 1 | python |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["scaling", f"--model={tmp_path / 'nothing'}", "--gpus=1", *words[1:]])
    assert scaling.main() == 1
    assert "code 1" in capsys.readouterr().out
