"""Plain python starts the ranks: real processes, their output, exit codes and signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from pantheraml.launch import stopping
from pantheraml.launch.environment import AGENT

SCRIPT = Path(__file__).with_name("script.py")
ROOT = SCRIPT.parents[2]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def run(*words, cwd=None, stdin=None, **variables):
    """Exit code, standard output and standard error of ``python words``."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment(**variables),
        input=stdin,
        timeout=100, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.promise("A3", "A15")
def test_a_plain_script_becomes_several_ranks(tmp_path):
    """With its arguments (also those that torchrun takes for its own), its flags, its folder and its environment."""
    passed = {"CUDA_VISIBLE_DEVICES": "", "TORCH_DISTRIBUTED_DEBUG": "INFO", "NCCL_DEBUG": "INFO"}
    (tmp_path / "below").mkdir()
    copy = tmp_path / "below" / "train.py"
    copy.write_text(SCRIPT.read_text())
    (tmp_path / "temporary").mkdir()
    words = ("-O", "below/train.py", 2, "--n", "--log", "x", "--chdir", "end")
    places = {"TMPDIR": str(tmp_path / "temporary")}
    code, out, err = run(*words, cwd=tmp_path, TELL=" ".join(passed), **passed, **places)
    lines = sorted(line for line in out.splitlines() if line.startswith("rank"))
    assert code == 0, err
    assert lines == [
        f"rank {rank}/2 total=3.0 cwd={tmp_path} argv=['2', '--n', '--log', 'x', '--chdir', 'end'] flags=1"
        for rank in range(2)
    ]
    assert err.count("starting 2 ranks") == 1
    told = [f"{name}={value} on {rank}" for name, value in passed.items() for rank in range(2)]
    assert [line for line in told if line not in out.splitlines()] == []
    left = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert [name for name in left if name.startswith(("pantheraml", "torchelastic"))] == []


def test_the_first_rank_speaks_before_they_have_met():
    """A script may plan or load before the call that needs ranks, and each of them comes by."""
    said = {
        rank: run("-c", "from pantheraml.log import say; say('here')", RANK=rank)[2] for rank in ("0", "1")
    }
    assert "here" in said["0"] and said["1"] == ""


def test_a_module_becomes_several_ranks():
    code, out, err = run("-m", "tests.launch.script", 2, "second", cwd=ROOT)
    assert code == 0, err
    assert len(re.findall(r"rank [01]/2", out)) == 2 and out.count("again 0 nccl") == 2


def test_one_process_stays_one():
    code, out, err = run(SCRIPT, 1, "end")
    assert code == 0 and "rank 0/1 total=1" in out and "starting" not in err


@pytest.mark.promise("A3", "D1")
@pytest.mark.parametrize(
    ("end", "code", "says", "tracebacks"),
    [
        ("raise", 1, "rank 1 ended with exit code 1", 1),
        ("all", 1, "ended with exit code 1", 1),
        ("exit", 3, "rank 1 ended with exit code 3", None),
        ("term", 143, "rank 1 was ended by SIGTERM", None),
        ("left", 1, "rank 1 left with exit code 0", 0),
    ],
)
def test_a_rank_that_fails_ends_the_run(tmp_path, end, code, says, tracebacks):
    """And with it all others, which hear no SIGTERM, and the processes that the ranks have started."""
    began = time.monotonic()
    found, _, err = run(SCRIPT, 2, end, READY=str(tmp_path))
    assert found == code, err
    when = "" if end == "all" else " after step 3"
    assert re.search(rf"{says} on {socket.gethostname()}{when}[;,].*the other ranks were ended", err), err
    if tracebacks is not None:
        assert err.count("Traceback (most recent call last)") == tracebacks
    if tracebacks:
        assert err.index("Traceback") < err.index(says)
        assert "ValueError: the second rank fails" in err or end == "all"
    children = [int(file.name) for file in tmp_path.iterdir()]
    assert len(children) == (0 if end == "all" else 2) and not [pid for pid in children if lives(pid)]
    assert time.monotonic() - began < 60


def lives(pid):
    """Whether a process runs; one that has ended may wait for whoever inherits it."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.promise("A3")
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_signals_end_every_rank(tmp_path, sent, code):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "2", "wait"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(READY=str(tmp_path)),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = {int(pid) for pid in subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()}  # fmt: skip
    process.send_signal(sent)
    _, err = process.communicate(timeout=45)
    assert process.returncode == code
    assert "Traceback" not in err
    if sent == signal.SIGKILL:  # the system tells the ranks
        while any(map(lives, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        assert f"{sent.name}: all ranks were ended" in err
    assert children and not any(map(lives, children))


def test_ranks_that_save_are_waited_for(tmp_path):
    """Ctrl-C once is passed on, and nothing more; twice ends them."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "2", "saves"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(READY=str(tmp_path)),
    )  # fmt: skip
    for ready in ({"0", "1"}, {"0", "1", "0 noted", "1 noted"}):
        deadline = time.monotonic() + 60
        while {path.name for path in tmp_path.iterdir()} != ready and time.monotonic() < deadline:
            time.sleep(0.05)
        if "0 noted" in ready:
            time.sleep(1)
            assert process.poll() is None, "they may take their time"
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=45)
    assert process.returncode == 130
    assert "SIGINT: all ranks were ended" in err and "Traceback" not in err


def test_ranks_that_do_not_end_are_not_waited_for_for_ever(tmp_path, monkeypatch):
    """After ten minutes (here half a second) the agent hears a second signal, its own; elastic's way is taken then."""
    monkeypatch.setattr(stopping, "_LONGEST_SAVE", 0.5)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-uc", deaf], env=environment(**{AGENT: str(tmp_path)}), stdout=subprocess.PIPE
    ) as rank:
        rank.stdout.readline()
        with pytest.raises(SignalException), stopping.PassedOn(tmp_path) as requests:
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.heard == signal.SIGTERM and stopping.read_stop(tmp_path) == "SIGTERM was sent."
            time.sleep(30)
        assert rank.poll() is None
        rank.kill()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_first_rank_goes_first():
    code, out, _ = run(SCRIPT, 3, "first")
    order = [line for line in out.splitlines() if line.startswith("in ")]
    assert code == 0 and order[0] == "in 0" and sorted(order) == ["in 0", "in 1", "in 2"]


def test_a_program_from_standard_input_is_refused():
    program = "from pantheraml.config.multi_gpu import MultiGPUConfig\n"
    program += "from pantheraml.distributed.process_group import setup_multi_gpu\n"
    program += "setup_multi_gpu(MultiGPUConfig(num_processes=2))\n"
    code, _, err = run("-", stdin=program)
    assert code == 1 and "the program came from standard input" in err


@pytest.mark.promise("A4")
def test_torchrun_starts_the_ranks_itself():
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", SCRIPT, "2", "end"]
    code, out, err = run(*words)
    assert code == 0, err
    assert len(re.findall(r"rank [01]/2 total=3.0", out)) == 2 and "starting" not in err


@pytest.mark.promise("A4", "B8")
def test_accelerate_starts_the_ranks_itself():
    words = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0"]
    words += ["--mixed_precision=no", "--dynamo_backend=no", SCRIPT, "2", "end"]
    code, out, err = run("-m", "accelerate.commands.launch", *words)
    assert code == 0, err
    assert len(re.findall(r"rank [01]/2 total=3.0", out)) == 2
