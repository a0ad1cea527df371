"""What tasks find out about themselves in a real SLURM of two nodes with two GPUs each."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from pantheraml.launch.slurm_lists import expand_hosts
from tests.launch import slurm_cluster
from tests.launch.slurm_cluster import Cluster

pytestmark = pytest.mark.skipif(bool(slurm_cluster.why_not()), reason=slurm_cluster.why_not())

ROOT = Path(__file__).parents[2]
# PYTHONPATH reaches the tasks: srun and sbatch hand the environment on.
DETECT = f"env PYTHONPATH={ROOT} {sys.executable} {ROOT}/tests/launch/detect.py"


@pytest.fixture(scope="module")
def cluster():
    # A short path: it holds sockets.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with Cluster(folder) as found:
            yield found
    finally:
        shutil.rmtree(folder)


def said(output: str) -> list[dict]:
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda one: (one.get("rank", 0), one.get("node_rank", 0), one["host"]))


def tasks(cluster: Cluster, options: str, **variables: str) -> list[dict]:
    """What each task of ``srun OPTIONS python detect.py`` says, by rank."""
    done = cluster.run("srun", *options.split(), *DETECT.split(), variables=variables)
    found = said(done.stdout)
    assert found, done.stderr
    return found


def batch(cluster: Cluster, folder: Path, options: str, *lines: str) -> list[dict]:
    """What the processes of a batch script say."""
    script = folder / "job.sbatch"
    script.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    cluster.end(cluster.submit(f"--output={folder}/%j.out", *options.split(), script))
    text = "".join(file.read_text() for file in sorted(folder.glob("*.out")))
    found = said(text)
    assert found, text
    return found


def column(found: list[dict], *names: str) -> list[tuple]:
    return [tuple(one[name] for name in names) for one in found]


@pytest.mark.promise("A5")
def test_one_task_a_node_starts_the_ranks_of_its_node(cluster):
    found = tasks(cluster, "--nodes=2 --gpus-per-node=2")
    assert column(found, "kind", "is_rank", "host", "node_rank", "num_nodes") == [
        ("slurm-node", False, "node1", 0, 2),
        ("slurm-node", False, "node2", 1, 2),
    ]
    assert {one["master_addr"] for one in found} == {"node1"}
    assert len({one["master_port"] for one in found}) == 1
    assert 20000 <= found[0]["master_port"] <= 29999
    assert not any(one["torch"] for one in found)


@pytest.mark.promise("A5")
def test_one_task_a_gpu_is_a_rank(cluster):
    found = tasks(cluster, "--nodes=2 --ntasks-per-node=2 --gpus-per-task=1")
    assert column(found, "kind", "rank", "local_rank", "node_rank", "host") == [
        ("slurm-gpu", 0, 0, 0, "node1"),
        ("slurm-gpu", 1, 1, 0, "node1"),
        ("slurm-gpu", 2, 0, 1, "node2"),
        ("slurm-gpu", 3, 1, 1, "node2"),
    ]
    assert set(column(found, "world_size", "local_world_size", "num_nodes", "master_addr")) == {
        (4, 2, 2, "node1")
    }


def test_tasks_in_turn_over_the_nodes(cluster):
    found = tasks(cluster, "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --distribution=cyclic")
    assert column(found, "rank", "local_rank", "host") == [
        (0, 0, "node1"),
        (1, 0, "node2"),
        (2, 1, "node1"),
        (3, 1, "node2"),
    ]


def test_the_step_counts_and_not_the_job(cluster, tmp_path):
    lines = [f"srun --nodes=1 --ntasks=1 {DETECT}", f"srun --ntasks=2 --ntasks-per-node=1 {DETECT}"]
    found = batch(cluster, tmp_path, "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2", *lines)
    assert sorted(column(found, "kind", "num_nodes", "node_rank")) == [
        ("slurm-node", 1, 0),
        ("slurm-node", 2, 0),
        ("slurm-node", 2, 1),
    ]
    # two steps of one job do not meet
    assert len({one["master_port"] for one in found}) == 2


def test_the_jobs_of_an_array_do_not_meet(cluster, tmp_path):
    found = batch(cluster, tmp_path, "--array=1-2 --nodes=1 --ntasks=2 --gpus-per-task=1", f"srun {DETECT}")
    assert (
        sorted(column(found, "kind", "rank", "world_size"))
        == [("slurm-gpu", 0, 2)] * 2 + [("slurm-gpu", 1, 2)] * 2
    )
    assert len({one["master_port"] for one in found}) == 2


def test_a_batch_script_without_srun_is_one_process(cluster, tmp_path):
    (found,) = batch(cluster, tmp_path, "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2", DETECT)
    assert (found["kind"], found["world_size"], found["is_rank"]) == ("python", 1, False)
    assert "without srun" in found["note"]
    assert "all 2 nodes" in found["note"]


def test_a_batch_script_submitted_from_within_a_step(cluster, tmp_path):
    """It inherits that step's variables, which are not its own."""
    script = tmp_path / "inner.sbatch"
    script.write_text(f"#!/bin/bash\n{DETECT}\n")
    submit = f"sbatch --parsable --nodes=1 --nodelist=node2 --output={tmp_path}/inner.out {script}"
    job = cluster.run(
        "srun", "--nodes=1", "--ntasks=1", "--nodelist=node1", "sh", "-c", submit
    ).stdout.strip()
    cluster.end(job)
    (found,) = said((tmp_path / "inner.out").read_text())
    assert (found["kind"], found["host"], found["num_nodes"]) == ("python", "node2", 1)
    assert "the GPUs of node2 alone" in found["note"]


def test_the_shell_of_salloc_is_one_process(cluster, tmp_path):
    output = tmp_path / "said"
    shown = cluster.type(f"{DETECT} > {output}\nexit\n", "salloc", "--nodes=2", "--gpus-per-node=2")
    assert output.exists(), shown
    (found,) = said(output.read_text())
    assert (found["kind"], found["world_size"]) == ("python", 1)
    assert "the GPUs of node1 alone" in found["note"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("--nodes=2 --ntasks-per-node=2 --gres=gpu:1", "2 tasks on this node, where the step has 1 GPU."),
        ("--nodes=1 --ntasks=3 --gpus-per-node=2", "3 tasks on this node, where the step has 2 GPUs."),
        ("--nodes=2 --ntasks=3", "different numbers of tasks (node1: 2, node2: 1)"),
    ],
)
def test_a_layout_that_is_neither_says_what_to_type(cluster, options, part):
    found = tasks(cluster, options)
    assert all(part in one["error"] for one in found)
    assert all("Type srun --" in one["error"] for one in found)


def test_a_missing_variable_is_named(cluster):
    command = f"unset SLURM_STEP_NODELIST; {DETECT}"
    (found,) = said(cluster.run("srun", "--ntasks=1", "sh", "-c", command).stdout)
    assert "SLURM_STEP_NODELIST is not set" in found["error"]


@pytest.mark.parametrize(
    "text", ["node[1-2]", "n[08-11,3]", "a,b[1,2],c", "r[1-2]c[01-02],z9", "n[9-11],n[099-101]"]
)
def test_hosts_are_read_as_slurm_reads_them(cluster, text):
    assert expand_hosts(text) == cluster.run("scontrol", "show", "hostnames", text).stdout.split()
