"""``srun python script.py`` on a real SLURM of two nodes: each task an agent of its node's ranks, or a rank itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.launch import slurm_cluster
from tests.launch.slurm_cluster import Cluster

pytestmark = pytest.mark.skipif(bool(slurm_cluster.why_not()), reason=slurm_cluster.why_not())

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("script.py")


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: it holds sockets
    try:
        with Cluster(folder) as found:
            yield found
    finally:
        shutil.rmtree(folder)


def srun(cluster, options, *words):
    program = ["env", f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", sys.executable, SCRIPT, *words]
    return cluster.run("srun", *options.split(), *program)


@pytest.mark.promise("A5")
def test_one_task_a_node_starts_the_ranks_of_both_nodes(cluster):
    done = srun(cluster, "--nodes=2 --gpus-per-node=2", 2, "end")
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d)/4 total=10.0", done.stdout)) == list("0123")
    for node in range(2):
        assert (
            f"starting 2 ranks of this script on node{node + 1} (node {node} of 2, met at node1:"
            in done.stderr
        )


@pytest.mark.promise("A5")
def test_one_task_a_gpu_is_a_rank(cluster):
    done = srun(cluster, "--nodes=2 --ntasks-per-node=2 --gpus-per-task=1", 2, "end")
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d)/4 total=10.0", done.stdout)) == list("0123")
    assert "starting" not in done.stderr


@pytest.mark.promise("A5")
@pytest.mark.parametrize("options", ["--gpus-per-node=2", "--ntasks-per-node=2 --gpus-per-task=1"])
def test_a_rank_that_fails_ends_the_job_with_its_code(cluster, options):
    done = srun(cluster, f"--nodes=2 {options}", 2, "exit")  # srun gives the largest code
    assert done.returncode == 3, done.stderr


def sbatch(cluster, folder, script, options, *words, **variables):
    """The number of the job of a batch script of the examples, which prints to ``job.out`` in the folder it runs in.

    ``words`` are what stands behind the script's name.
    """
    folder.mkdir(exist_ok=True)
    for name in ("examples", "pantheraml"):
        (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables |= dict(PATH=path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return cluster.submit(
        f"--output={folder / 'job.out'}", f"--chdir={folder}", *options.split(), ROOT / "examples" / script, *words,
        variables=variables,
    )  # fmt: skip


def end(cluster, folder, job):
    """What a job that ends well has printed."""
    states = cluster.end(job)
    text = (folder / "job.out").read_text()
    assert states == {"COMPLETED"}, text
    return text


@pytest.mark.promise("E4")
@pytest.mark.parametrize(
    ("script", "options", "ranks"),
    [
        ("one_task_a_node", "--gpus-per-node=2 --cpus-per-task=1", 2),  # no GPU is real here: one rank a node
        pytest.param("one_task_a_gpu", "--ntasks-per-node=2 --cpus-per-task=1", 4, marks=pytest.mark.slow),
    ],
)
def test_the_batch_scripts_of_the_examples(cluster, tmp_path, script, options, ranks):
    """As they are printed, but for the sizes of these nodes."""
    text = end(cluster, tmp_path, sbatch(cluster, tmp_path, f"slurm/{script}.sbatch", options, MAX_STEPS="2"))
    assert f"2 x 4 x {ranks} = {8 * ranks} rows a step" in text
    assert (tmp_path / "outputs/multi-gpu/adapter/adapter_model.safetensors").is_file()


@pytest.mark.promise("E4")
@pytest.mark.slow
def test_the_batch_script_of_any_model(cluster, tmp_path):
    """On two nodes, with settings small enough for CPUs."""
    words = "mixed_precision=no grid_size=5 episode_length=5 n_transit=20 unseen_goals=4 learners_per_goal=2 " \
        "learner_episodes=4 tf_n_embd=16 train_batch_size=4 num_workers=0 train_steps=2"  # fmt: skip
    script = "algorithm_distillation/multi_gpu_train.slurm"
    options = "--nodes=2 --gpus-per-node=2 --cpus-per-task=1"
    text = end(cluster, tmp_path, sbatch(cluster, tmp_path, script, options, *words.split()))
    assert text.count("Histories a step: 4 x 2 x 1 = 8 ") == 1 and text.count("step 2: return") == 1
    assert (tmp_path / "runs/darkroom/checkpoint.pt").is_file()


def wait_for(there, seconds=200):
    latest = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < latest
        time.sleep(0.2)


def steps(folder):
    """The losses of a run so far, by step."""
    file = folder / "outputs/multi-gpu/run/telemetry.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_a_job_that_is_asked_to_is_saved_requeued_and_goes_on(cluster, tmp_path):
    """With the losses of a job that was left alone."""
    options, size = "--gpus-per-node=2 --cpus-per-task=1", dict(MAX_STEPS="40")
    asked, alone = tmp_path / "asked", tmp_path / "alone"
    job = sbatch(cluster, asked, "slurm/requeue.sbatch", options, **size)
    other = sbatch(cluster, alone, "slurm/requeue.sbatch", options, **size)

    wait_for(lambda: len(steps(asked)) > 1)
    cluster.run("scancel", "--signal=USR1", job)
    wait_for(lambda: "Reason=BeginTime" in cluster.run("scontrol", "show", "job", job).stdout)
    time.sleep(3)  # SLURM itself would wait for two minutes
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    end(cluster, alone, other)
    text = end(cluster, asked, job)
    stopped = int(re.search(r"SIGUSR1: stopped after step (\d+) of 40, saved in outputs", text)[1])
    mine, theirs = steps(asked), steps(alone)
    assert sorted(mine.keys() | theirs.keys()) == sorted({*theirs, stopped}) and 10 <= stopped < 35
    for step in theirs:
        if step <= stopped or step >= stopped + 5:  # the line between tells of fewer steps
            assert mine[step] == pytest.approx(theirs[step], rel=2e-6), step
    assert (asked / "outputs/multi-gpu/adapter/adapter_model.safetensors").is_file()
