"""Disks, shared memory, ports and versions, with faults that are real where a CPU machine can have them."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from pantheraml.devices.nvml import GIB
from pantheraml.doctor.apart import call_apart
from pantheraml.doctor.checks import disk, port, shared_memory, versions
from pantheraml.doctor.known_bad import KNOWN_BAD
from tests.small_disk import small_disk


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 4 MiB in memory."""
    with small_disk(tmp_path, "4M"):
        yield tmp_path


def test_shared_memory_that_is_small_or_full(tmpfs):
    (row,) = shared_memory.judge(shared_memory.probe(2, tmpfs))
    assert row.state == "bad" and "0.00 of 0.00 GiB free" in row.seen and "--shm-size=16g" in row.fix
    (row,) = shared_memory.judge(shared_memory.probe(1, tmpfs))
    assert row.state == "note", "one rank needs little of it"
    (tmpfs / "full").write_bytes(bytes(4 * 2**20))
    (row,) = shared_memory.judge(shared_memory.probe(1, tmpfs))
    assert row.state == "bad" and "cannot be written" in row.seen and f"remount,size=16G {tmpfs}" in row.fix


def test_shared_memory_by_its_size():
    def judged(gpus, free):
        return shared_memory.judge(shared_memory.Facts(Path("/dev/shm"), gpus, GIB * 2, free))[0]

    assert judged(2, GIB).state == "ok"
    assert (
        judged(2, GIB // 16).state == "bad"
        and "1 GiB is needed by several ranks" in judged(2, GIB // 16).seen
    )
    assert shared_memory.judge(shared_memory.probe(0, Path("/not/there")))[0].state == "skipped"


def test_a_disk_that_is_full(tmpfs):
    (tmpfs / "full").write_bytes(bytes(4 * 2**20))
    place = disk.look_at(tmpfs / "not" / "yet")
    row, *_ = disk.judge((place,), disk.PURPOSES[:1])
    assert row.state == "bad" and row.check == "disk: current folder" and "cannot be written" in row.seen
    assert "another output_dir" in row.fix
    (row,) = disk.judge((place,), disk.PURPOSES[1:2])
    assert row.state == "note", "models that are there are read"


@pytest.mark.parametrize(("number", "fix"), [(0, "output_dir"), (1, "HF_HOME"), (2, "TMPDIR")])
def test_a_disk_with_little_room(tmp_path, number, fix):
    (purpose,) = disk.PURPOSES[number : number + 1]
    free = (purpose.least - 1, purpose.least, purpose.enough)
    rows = [disk.judge((disk.Place(tmp_path, size, None),), (purpose,))[0] for size in free]
    assert [row.state for row in rows] == ["bad", "note", "ok"] and fix in rows[0].fix and not rows[2].fix


def test_the_disks_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here, cache, temporary = disk.probe()
    assert here.folder == tmp_path and here.free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert {here.failure, cache.failure, temporary.failure} == {None}


def test_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        number = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(number))
        (row,) = port.judge(call_apart(port.probe, seconds=30))
    assert (
        row.state == "bad" and f"MASTER_PORT={number} cannot be used: " in row.seen and "in use" in row.seen
    )
    assert row.fix.startswith("Type unset MASTER_PORT")
    monkeypatch.setenv("MASTER_PORT", "train")
    assert port.judge(port.probe())[0].state == "bad"
    monkeypatch.delenv("MASTER_PORT")
    assert port.judge(port.probe())[0].state == "ok"


def test_a_host_that_does_not_reach_itself(monkeypatch):
    monkeypatch.setattr(port, "_HOST", "192.0.2.1")  # an address that nobody has
    monkeypatch.setattr(port, "_SECONDS", 0.2)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    (row,) = port.judge(port.probe())
    assert row.state == "bad" and "getent hosts" in row.fix


def test_versions_of_this_environment():
    facts = versions.probe(0)
    assert facts.installed["trl"] and "torch" in " ".join(facts.required or ())
    assert not [row for row in versions.judge(facts) if row.state == "bad"]


def install(folder, **packages):
    """Leave what pip leaves of packages, and nothing else of them."""
    for name, version in packages.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_version_out_of_range_and_one_known_to_fail(monkeypatch, tmp_path):
    """By the metadata of packages that come first on the path."""
    install(tmp_path, trl="0.9.6", vllm="0.33.1", torch="2.13.0+cpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = versions.judge(call_apart(versions.probe, 0, seconds=60))
    rows = {row.seen.split()[0]: row for row in found if row.state == "bad"}
    assert (
        rows["trl"].seen.startswith("trl 0.9.6, supported is >=1.15")
        and "pip install 'trl>=1.15'" in rows["trl"].fix
    )
    assert "needs torch 2.14" in rows["vllm"].seen and "vllm<0.33" in rows["vllm"].fix


@pytest.mark.parametrize(
    ("installed", "gpus", "state", "fix"),
    [
        (dict(triton="3.9.0", torch="2.13.0+cpu"), 0, "bad", "triton>=3.7.1,<3.8"),
        (dict(triton="3.7.1", torch="2.11.0+cu130"), 1, "bad", "triton==3.6.*"),
        (dict(triton="3.6.0", torch="2.11.0+cpu", numpy="2.5.2"), 0, "note", "numpy<2.4"),
        (dict(triton="3.7.1", torch="2.13.0", trl="1.15.0"), 0, "bad", "trl>=1.16"),
        (dict(xformers="0.0.35", torch="2.13.0"), 1, "note", "pip uninstall xformers"),
        (dict(vllm="0.30.0", torch="2.11.0"), 1, "bad", "torch==2.13.0"),
        (dict(vllm="0.33.0", torch="2.13.0"), 1, "bad", "vllm<0.33"),
    ],
)
def test_each_known_bad_version(installed, gpus, state, fix):
    (row,) = versions.judge(versions.Facts(installed, (), gpus))
    assert (row.state, row.check) == (state, "versions") and fix in row.fix


@pytest.mark.parametrize(
    "installed",
    [
        dict(triton="3.7.1", torch="2.13.0", trl="1.16.0", numpy="2.4.6"),
        dict(triton="3.6.0", torch="2.11.0", numpy="2.3.0"),
        dict(xformers="0.0.35", torch="2.10.0", vllm="0.20"),
        dict(vllm="0.30.0", torch="2.13.0+cu130"),
    ],
)
def test_good_versions(installed):
    (row,) = versions.judge(versions.Facts(installed, (), 0))
    assert row.state == "ok"


def test_every_row_of_the_table_is_tested_above():
    assert len(KNOWN_BAD) == 7


def test_what_is_not_installed_is_said():
    (row,) = versions.judge(versions.Facts({}, ("peft>=0.21",), 0))
    assert (
        row.state == "bad" and row.seen == "peft is not installed" and "pip install 'peft>=0.21'" in row.fix
    )
    (row,) = versions.judge(versions.Facts({}, None, 0))
    assert row.state == "note" and "pip install -e ." in row.fix
