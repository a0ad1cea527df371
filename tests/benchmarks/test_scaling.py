"""The scaling benchmark runs on CPU ranks, counts whole processes' memory and tells what failed."""

from __future__ import annotations

import json
import mmap
import sys
import time

import pytest

from benchmarks import scaling
from benchmarks.process_memory import (
    HostWatch,
    host_share,
    peak_together,
    processes_by_gpu,
    stays_at_home,
)
from pantheraml.devices.nvml import NVML
from tests import tiny
from tests.devices.test_nvml import stand_in  # noqa: F401
from tests.distributed.ranks import run_ranks


@pytest.mark.slow
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
    assert all(line["telemetry_ms"] > 0 and line["own_gpu_only"] is None for line in lines)
    assert all(0 < line["host_gib"][0] <= line["host_gib"][1] for line in lines)
    for line in lines:
        assert list(line["passed_s"]) == [
            "process",
            "rank",
            "libraries",
            "model",
            "trainer",
            "plan",
            "first step",
        ]
        assert sorted(line["passed_s"].values()) == list(line["passed_s"].values())
    assert "| 1 | python |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["scaling", f"--model={tmp_path / 'nothing'}", "--gpus=1", *words[1:]])
    assert scaling.main() == 1
    assert "code 1" in capsys.readouterr().out


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")


@linux
def test_the_shares_of_ranks_add_up_to_one_copy(tmp_path):
    """256 MiB of a file, mapped and read by three processes: a third each; what one writes is its own."""
    size = 2**28
    (tmp_path / "file").write_bytes(b"x" * size)

    def share():
        import torch.distributed as dist

        before = host_share()
        with (tmp_path / "file").open("rb") as file:
            pages = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        assert pages[::4096].count(b"x") == size // 4096
        dist.barrier()
        mapped = host_share()
        dist.barrier()
        with HostWatch() as watch:
            own = bytearray(b"y") * size
            time.sleep(0.5)
            del own
        after = host_share()
        dist.barrier()  # the share of a process that has ended falls to the others
        return before, mapped, watch.seen, after

    found = run_ranks(3, share)
    assert sum(mapped - before for before, mapped, _, _ in found) == pytest.approx(size / 2**30, rel=0.3)
    for _, mapped, seen, after in found:
        # Libraries that other programs mapped, too, fall to us when these end: a tenth of a GiB is room for that.
        assert after == pytest.approx(mapped, abs=0.1)
        assert peak_together([seen]) - mapped > 0.8 * size / 2**30


def test_runs_at_the_same_time_are_one_line(monkeypatch):
    speeds = {"0": 10.0, "5": 8.0, "7": 9.0}

    def once(way, ranks, gpus, options, model):
        return {"way": way, "status": "ok", "ranks": ranks, "tok_s": speeds[gpus], "ms": 80 / speeds[gpus]}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,5,7,9")
    monkeypatch.setattr(scaling, "run_once", once)
    line = scaling.run("alone", 3, None, "model")
    assert (line["ranks"], line["tok_s"], line["ms"]) == (3, 27.0, 10.0)
    assert line["tok_s_of_each"] == [10.0, 8.0, 9.0]
    assert scaling.visible(2) == "0,5" and scaling.visible(1, 3) == "9"
    failed = {"status": "code 1", "ranks": 1, "printed": "no"}
    assert scaling.together([line, failed]) == failed | {"ranks": 2}


def test_a_peak_together_is_of_one_moment():
    """Ranks that hold a copy one after the other never hold two."""
    early, late = [(0.0, 1.0), (1.0, 9.0), (2.0, 1.0)], [(0.5, 1.0), (3.0, 9.0), (4.0, 2.0)]
    assert peak_together([early, late]) == 10.0
    assert peak_together([early, [(at - 2.0, share) for at, share in late]]) == 18.0
    assert peak_together([early]) == 9.0
    assert peak_together([]) is peak_together([early, []]) is None


def test_a_share_is_read_from_the_rollup(tmp_path):
    (tmp_path / "rollup").write_text("55d0-7ff [rollup]\nRss:  900 kB\nPss:  524288 kB\nPss_Anon: 1 kB\n")
    assert host_share(tmp_path / "rollup") == 0.5
    assert host_share(tmp_path / "nothing") is None


def test_processes_on_gpus(stand_in):  # noqa: F811
    by_gpu = processes_by_gpu(["GPU-aaaa1111-0000", "GPU-cccc"], NVML(stand_in))
    assert by_gpu == {"GPU-aaaa1111-0000": {100: 2.0, 101: None}}
    assert stays_at_home(by_gpu) is False, "two processes on one GPU"
    assert processes_by_gpu(["GPU-aaaa1111-0000"], None) == {} and stays_at_home({}) is None
    assert stays_at_home({"a": {1: 2.0}, "b": {2: 2.0}}) is True
    assert stays_at_home({"a": {1: 2.0}, "b": {1: 0.5}}) is False
