"""The benchmarks of long runs: curves of one run in several layouts, and memory over time."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import curves, soak
from benchmarks.shapes import make_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_llama(folder, shape="tiny", device="cpu")
    return str(folder)


def test_one_layout(model, tmp_path, monkeypatch):
    words = ["--ranks=1", "--batch=2", f"--model={model}", "--steps=3", "--rows=4", "--seq=64"]
    monkeypatch.setattr(sys, "argv", ["curves", *words, f"--output={tmp_path}"])
    assert curves.main() == 0
    found = json.loads((tmp_path / "curve.json").read_text())
    assert len(found["loss"]) == len(found["grad_norm"]) == 3
    assert all(5 < loss < 7 for loss in found["loss"])  # ln 512


def test_pieces_of_text_are_the_same_each_time():
    found = curves.texts(50, 300)
    assert found == curves.texts(60, 300)[:50]
    assert len(set(found)) == 50
    assert all(100 <= len(text) < 300 for text in found)


def test_layouts_are_compared_with_the_first():
    first = {"layout": "1x4", "loss": [2.0, 1.0], "grad_norm": [1.0, 4.0]}
    other = {"layout": "2x4", "loss": [2.0, 1.5], "grad_norm": [1.0, 5.0]}
    lines = curves.table([first, other, {"layout": "4x4", "failed": "code 3"}]).splitlines()
    assert "| 5.0e-01 | 2.5e-01 | 2.5e-01 of it |" in lines[3]
    assert "code 3" in lines[4]


@pytest.mark.slow
def test_soak(model, tmp_path, monkeypatch, capsys):
    file = tmp_path / "soak.json"
    words = ["--minutes", "0.02", "--every", "0", "--save-steps", "2", "--workers", "0", "--most", "1e9"]
    monkeypatch.setattr(sys, "argv", ["soak", "--model", model, "--json", str(file), *words])
    assert soak.main() == 0
    looks = json.loads(file.read_text())["looks"]
    assert len(looks) >= 2
    assert all(one["host"] > 50 * soak.MIB for one in looks)
    assert "MiB a minute" in capsys.readouterr().out
