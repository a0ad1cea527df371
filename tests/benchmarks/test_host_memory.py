"""The benchmark of host memory looks at whole trees of processes, and tells what failed."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import pytest

from benchmarks import host_memory
from pantheraml.config.load import load_config

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
TREE = """\
import subprocess, sys, time
held = b"x" * 2**28
if len(sys.argv) > 1:
    time.sleep(1.5)
else:
    subprocess.run([sys.executable, sys.argv[0], "child"], check=True)
"""


@linux
def test_processes_are_watched_with_those_they_start(tmp_path):
    (tmp_path / "tree.py").write_text(TREE)
    master = subprocess.Popen([sys.executable, str(tmp_path / "tree.py")])
    peak, _ = host_memory.watch(master, time.monotonic() + 60)
    assert master.returncode == 0 and 0.5 < peak < 0.7
    asleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    host_memory.watch(asleep, time.monotonic())
    assert asleep.returncode < 0, "what takes too long is ended"


def test_run_files_are_right(tmp_path):
    for cpu in (False, True):
        (tmp_path / "run.yaml").write_text(host_memory.run_file("model", 2, cpu))
        config = load_config(tmp_path / "run.yaml")
        assert config.multi_gpu.num_processes == 2 and config.device == ("cpu" if cpu else None)


def test_copies_are_counted_beside_a_tiny_model(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20))
    found = {str(tmp_path): 3.0 + 1.5 / 1024}

    def once(model, ranks, options):
        line = {"ranks": ranks, "status": "ok", "host_gib": found.get(model, 3.0), "devices": {"cpu_0": {}}}
        return {**line, "gpu_processes_gib": [], "own_gpu_only": None}

    monkeypatch.setattr(host_memory, "run_once", once)
    monkeypatch.setattr(host_memory, "checkpoint", lambda shape: "tiny")
    line = host_memory.run(str(tmp_path), 2, argparse.Namespace())
    assert line["copies"] == pytest.approx(1.5)
    assert "| 2 | 0.00 | 3.00 | 3.00 | 1.50 |" in host_memory.markdown([line])
    failed = {"ranks": 2, "status": "code 1", "printed": "first\nno such model"}
    assert "code 1: no such model" in host_memory.markdown([failed])
