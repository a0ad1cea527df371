"""``srun python script.py`` on a real SLURM of two nodes: each task an agent of its node's ranks, or a rank itself."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
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


def test_one_task_a_node_starts_the_ranks_of_both_nodes(cluster):
    done = srun(cluster, "--nodes=2 --gpus-per-node=2", 2, "end")
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d)/4 total=10.0", done.stdout)) == list("0123")
    for node in range(2):
        assert (
            f"starting 2 ranks of this script on node{node + 1} (node {node} of 2, met at node1:"
            in done.stderr
        )


def test_one_task_a_gpu_is_a_rank(cluster):
    done = srun(cluster, "--nodes=2 --ntasks-per-node=2 --gpus-per-task=1", 2, "end")
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d)/4 total=10.0", done.stdout)) == list("0123")
    assert "starting" not in done.stderr


@pytest.mark.parametrize("options", ["--gpus-per-node=2", "--ntasks-per-node=2 --gpus-per-task=1"])
def test_a_rank_that_fails_ends_the_job_with_its_code(cluster, options):
    done = srun(cluster, f"--nodes=2 {options}", 2, "exit")  # srun gives the largest code
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize(
    ("script", "options", "ranks"),
    [
        ("one_task_a_node", "--gpus-per-node=2 --cpus-per-task=1", 2),  # no GPU is real here: one rank a node
        ("one_task_a_gpu", "--ntasks-per-node=2 --cpus-per-task=1", 4),
    ],
)
def test_the_batch_scripts_of_the_examples(cluster, tmp_path, script, options, ranks):
    """As they are printed, but for the sizes of these nodes."""
    printed = tmp_path / "job.out"
    variables = dict(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
        MAX_STEPS="2", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    for name in ("examples", "pantheraml"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = cluster.run(
        "sbatch", "--wait", f"--output={printed}", f"--chdir={tmp_path}", *options.split(),
        ROOT / "examples" / "slurm" / f"{script}.sbatch", variables=variables, seconds=200,
    )  # fmt: skip
    text = printed.read_text()
    assert done.returncode == 0, text
    assert f"2 x 4 x {ranks} = {8 * ranks} rows a step" in text
    assert (tmp_path / "outputs/multi-gpu/adapter/adapter_model.safetensors").is_file()
