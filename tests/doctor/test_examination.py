"""The examination goes on whatever a check does, and tells it as a table, as JSON, and by an exit code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pantheraml.doctor import examination
from pantheraml.doctor.apart import ProbeFailed, call_apart
from pantheraml.doctor.check import Check
from pantheraml.doctor.checks import disk, gpus, port, shared_memory, versions
from pantheraml.doctor.finding import Finding
from pantheraml.doctor.report import print_table, to_json, verdict
from tests.cli.test_app import cli  # noqa: F401 - a fixture
from tests.doctor.probes import dies, hangs, leaves, raises, sleeps, tells, three

ROOT = Path(__file__).parents[2]


def test_a_process_of_its_own(monkeypatch):
    for name in ("RANK", "SLURM_STEP_ID", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert call_apart(tells, 6, seconds=60) == (7, ["MASTER_PORT"]), "the examination of a rank is no rank"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raises, "ConfigError: A thing is there. Another is needed. Type this"),
        (dies, "its process was ended by SIGSEGV, after 'the driver said goodbye'"),
        (leaves, "its process ended with exit code 3"),
    ],
)
def test_functions_that_fail(function, said):
    with pytest.raises(ProbeFailed) as failed:
        call_apart(function, seconds=60)
    assert str(failed.value).startswith(said)


def test_a_function_that_hangs_ends_with_all_that_it_started(tmp_path):
    began = time.monotonic()
    with pytest.raises(ProbeFailed, match="it did not end within 3 s"):
        call_apart(hangs, str(tmp_path / "pid"), seconds=3)
    assert time.monotonic() - began < 20
    child = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def judge(facts):
    return [Finding("letters", "ok", facts)]


def judge_badly(facts):
    raise KeyError("nothing")


def no_gpus():
    return gpus.Facts(None, 0, None, False)


def two_gpus():
    return gpus.Facts(None, 0, None, True, ("MI300X",) * 2, (None, None))


FAST = Check("letters", three, judge, if_it_fails="Type abc.")
COUNT = Check("GPUs", no_gpus, gpus.judge, if_it_fails="Type nvidia-smi.")


def test_checks_that_break_are_red_and_the_others_follow():
    begun = []
    checks = [
        Check("raises", raises, judge, if_it_fails="Type this."),
        Check("dies", dies, judge, if_it_fails="Type that."),
        Check("hangs", sleeps, judge, if_it_fails="Type less.", seconds=0.3),
        Check("misjudges", three, judge_badly, if_it_fails="Report it."),
        FAST,
        Check("large", three, judge, if_it_fails="-", least_gpus=1),
        Check("long", three, judge, if_it_fails="-", is_long=True),
    ]
    found = examination.examine(checks, quick=True, begin=begun.append, count=COUNT)
    rows = {row.check: row for row in found}
    assert list(rows) == ["GPUs", *(check.name for check in checks)]
    red = {name: (row.seen, row.fix) for name, row in rows.items() if row.state == "bad"}
    assert red["raises"] == (
        "the check failed: ConfigError: A thing is there. Another is needed. Type this",
        "Type this.",
    )
    assert "SIGSEGV" in red["dies"][0] and red["dies"][1] == "Type that."
    assert red["hangs"] == ("the check failed: it did not end within 0.3 s", "Type less.")
    assert red["misjudges"] == ("the check failed: nothing", "Report it.")
    assert rows["letters"] == Finding("letters", "ok", "abc") and len(red) == 4
    assert (rows["large"].seen, rows["long"].seen) == ("no GPU", "left out by --quick")
    assert begun == ["GPUs", "raises", "dies", "hangs", "misjudges", "letters"]


def test_checks_are_told_how_many_gpus_there_are():
    check = Check("letters", three, judge, if_it_fails="-", counts=True, least_gpus=2)
    count = Check("GPUs", two_gpus, gpus.judge, if_it_fails="-")
    assert examination.examine([check], count=count)[-1].seen == "c"
    broken = Check("GPUs", dies, gpus.judge, if_it_fails="Type nvidia-smi.")
    first, second = examination.examine([check], count=broken)
    assert (first.state, first.fix, second.state) == ("bad", "Type nvidia-smi.", "skipped")


FOUND = [
    Finding("port", "ok", "a free port"),
    Finding("GPUs", "bad", "names [7], which is not there", "Type export CUDA_VISIBLE_DEVICES=0."),
    Finding("host link", "note", "6 GB/s"),
    Finding("Triton", "skipped", "no GPU"),
]


def test_the_table_and_the_verdict():
    written = io.StringIO()
    print_table(FOUND, Console(file=written, width=100, force_terminal=False))
    lines = written.getvalue().splitlines()
    row = next(number for number, line in enumerate(lines) if "which is not there" in line)
    assert lines[row].split("│")[1].strip() == "bad" and "[7]" in lines[row]
    assert "Type export CUDA_VISIBLE_DEVICES=0." in lines[row + 1]
    assert lines[-1] == "1 row is red: do what is printed there, from the top. 1 thing could be better."
    assert verdict(FOUND[:1]) == "Nothing is wrong."


def test_json():
    report = json.loads(to_json(FOUND))
    assert not report["healthy"] and report["findings"][0] == {
        "check": "port", "state": "ok", "seen": "a free port", "fix": ""
    }  # fmt: skip
    assert json.loads(to_json([FOUND[0], *FOUND[2:]]))["healthy"], "notes and what was left out are not red"


def test_the_command(cli, monkeypatch):  # noqa: F811
    """With the checks that take no time; all of them: below."""
    monkeypatch.delenv("MASTER_PORT", raising=False)
    cheap = (versions.CHECK, shared_memory.CHECK, disk.CHECK, port.CHECK)
    monkeypatch.setattr(examination, "CHECKS", cheap)
    code, out, err = cli("doctor", "--json")
    report = json.loads(out)
    assert (code, err, report["healthy"]) == (0, "", True)
    assert [row["check"] for row in report["findings"]][-1] == "port"
    assert report["findings"][0] == {"check": "GPUs", "state": "skipped", "seen": "no GPU", "fix": ""}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    code, out, _ = cli("doctor")
    assert code == 1 and "Type unset CUDA_VISIBLE_DEVICES." in out and "1 row is red" in out


@pytest.mark.promise("C6", "E6")
@pytest.mark.slow
def test_this_machine_is_green():
    """All checks, by the script among the examples."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/verify_installation.py"), "--json"], env=environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert time.monotonic() - began < 200
    report = json.loads(done.stdout)
    rows = {row["check"]: row for row in report["findings"]}
    assert done.returncode == 0 and report["healthy"], done.stdout
    skipped = {name for name, row in rows.items() if row["state"] == "skipped"}
    assert skipped == {"GPUs", "driver and torch", "host link", "copies between GPUs", "Triton"}
    assert all(rows[name]["seen"].startswith("no GPU") for name in skipped)
    assert {
        rows[name]["state"] for name in ("all-reduce", "bitsandbytes", "attention", "one rank and several")
    } == {"ok"}
