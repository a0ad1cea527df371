"""What started a process, by tables of the variables that real launchers set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pantheraml.errors import ConfigError
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.process import Process

SCRIPT = Process()
DETECT = Path(__file__).with_name("detect.py")

# torchrun 2.13 --nproc-per-node 2, rank 1
TORCHRUN = {
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "39289",
    "OMP_NUM_THREADS": "1",
    "RANK": "1",
    "ROLE_NAME": "default",
    "ROLE_RANK": "1",
    "ROLE_WORLD_SIZE": "2",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_RUN_ID": "b4c98be7-80ad-43e8-96cc-da2d72d8aa8c",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "WORLD_SIZE": "2",
}
# The last rank of torchrun --nnodes=2 with 2 ranks on one machine and 1 on the other.
UNEVEN = TORCHRUN | {
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "RANK": "2",
    "WORLD_SIZE": "3",
}
# accelerate 1.15 launch --num_processes 1: no rank at all
ACCELERATE = {
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_CPU": "False",
    "OMP_NUM_THREADS": "1",
}
# srun --nodes=2 --gpus-per-node=2, the task on the second node (SLURM 22.05)
SLURM_NODE = {
    "CUDA_VISIBLE_DEVICES": "0,1",
    "ROCR_VISIBLE_DEVICES": "0,1",
    "SLURMD_NODENAME": "node2",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_GPUS": "0,1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
# srun --nodes=2 --ntasks-per-node=2 --gpus-per-task=1, the last task
SLURM_GPU = SLURM_NODE | {
    "CUDA_VISIBLE_DEVICES": "1",
    "ROCR_VISIBLE_DEVICES": "1",
    "SLURM_JOB_ID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_GPUS": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
# sbatch --nodes=2 --gpus-per-node=2 --ntasks-per-node=2: the script, without srun
BATCH = {
    "CUDA_VISIBLE_DEVICES": "0,1",
    "SLURMD_NODENAME": "node1",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_JOB_GPUS": "0,1",
    "SLURM_JOB_ID": "9",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


def detect(variables: dict[str, str], process: Process = SCRIPT) -> LaunchEnvironment:
    return LaunchEnvironment.detect(variables, process, gpus=lambda: pytest.fail("GPUs were counted"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, LaunchEnvironment("python")),
        # What transformers' arguments set in a process of their own accord is not accelerate launch.
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, LaunchEnvironment("python")),
        ({"MASTER_PORT": "29500", "CUDA_VISIBLE_DEVICES": ""}, LaunchEnvironment("python")),
        (TORCHRUN, LaunchEnvironment("torchrun", 1, 1, 2, 2, 0, 1, "localhost", 39289)),
        (UNEVEN, LaunchEnvironment("torchrun", 2, 0, 3, 1, 1, 2, "localhost", 39289)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, LaunchEnvironment("torchrun")),
        (
            # what a test sets for the processes it forks
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "::1", "MASTER_PORT": "1"},
            LaunchEnvironment("torchrun", 1, 1, 4, 4, 0, 1, "::1", 1),
        ),
        (
            {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
            | {"LOCAL_WORLD_SIZE": "4"},
            LaunchEnvironment("torchrun", 5, 1, 8, 4, 1, 2, "a", 1),
        ),
        (ACCELERATE, LaunchEnvironment("accelerate")),
        (
            TORCHRUN | {name: value for name, value in ACCELERATE.items() if name != "ACCELERATE_USE_CPU"},
            LaunchEnvironment("accelerate", 1, 1, 2, 2, 0, 1, "localhost", 39289),
        ),
        (
            TORCHRUN | {"PANTHERAML_AGENT": "/tmp/pantheraml-1"},
            LaunchEnvironment("pantheraml", 1, 1, 2, 2, 0, 1, "localhost", 39289),
        ),
        (SLURM_NODE, LaunchEnvironment("slurm-node", 0, 0, 1, 1, 1, 2, "node1", 20101)),
        (SLURM_GPU, LaunchEnvironment("slurm-gpu", 3, 1, 4, 2, 1, 2, "node1", 20202)),
        # srun torchrun, srun accelerate launch, and the ranks of our own agent: the last to start a process counts.
        (SLURM_NODE | TORCHRUN, LaunchEnvironment("torchrun", 1, 1, 2, 2, 0, 1, "localhost", 39289)),
        (SLURM_NODE | ACCELERATE, LaunchEnvironment("accelerate")),
        (
            SLURM_NODE | TORCHRUN | {"PANTHERAML_AGENT": "/tmp/pantheraml-1"},
            LaunchEnvironment("pantheraml", 1, 1, 2, 2, 0, 1, "localhost", 39289),
        ),
        # A batch script's own choice of where to meet, and the WORLD_SIZE that many of them export.
        (
            SLURM_NODE | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "12345", "WORLD_SIZE": "4"},
            LaunchEnvironment("slurm-node", 0, 0, 1, 1, 1, 2, "10.0.0.7", 12345),
        ),
        # A rank that wrote torch's variables is what it was before; tasks in turn over the nodes are on theirs.
        (
            SLURM_GPU
            | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
            | {"MASTER_ADDR": "node1", "MASTER_PORT": "20202"},
            LaunchEnvironment("slurm-gpu", 1, 0, 4, 2, 1, 2, "node1", 20202),
        ),
    ],
)
def test_tables(variables, expected):
    before = dict(variables)
    assert detect(variables) == expected
    assert variables == before


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"RANK": "0"}, "LOCAL_RANK and WORLD_SIZE are not"),
        ({"WORLD_SIZE": "4"}, "RANK and LOCAL_RANK are not"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "LOCAL_RANK is not"),
        ({"RANK": "0", "LOCAL_RANK": "", "WORLD_SIZE": "4"}, "LOCAL_RANK is not"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, "MASTER_ADDR and MASTER_PORT are not"),
        (TORCHRUN | {"RANK": "2"}, "RANK is 2 of 2"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "RANK is 1 of 0"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 of 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK is 1 of 0"),
        (TORCHRUN | {"GROUP_RANK": "1"}, "The number of this machine is 1 of 1"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (UNEVEN | {"PANTHERAML_AGENT": "/tmp/pantheraml-1"}, "different numbers of GPUs"),
        (SLURM_NODE | {"MASTER_ADDR": "localhost"}, "MASTER_ADDR is 'localhost' in a step of 2 nodes"),
        (SLURM_NODE | {"MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR is '127.0.0.1' in a step of 2 nodes"),
        (SLURM_NODE | {"RANK": "0"}, "LOCAL_RANK and WORLD_SIZE are not"),
    ],
)
def test_what_is_half_set_or_cannot_be_is_an_error(variables, part):
    with pytest.raises(ConfigError) as caught:
        detect(variables)
    assert part in caught.value.got
    assert caught.value.need
    assert caught.value.fix


@pytest.mark.parametrize(
    ("variables", "process", "kind"),
    [
        ({}, Process(ipython=True), "notebook"),
        ({}, Process(pytest=True), "python"),
        ({}, Process(child=True), "python"),
        (SLURM_NODE, Process(ipython=True), "notebook"),
        (SLURM_NODE, Process(child=True), "slurm-node"),
        (BATCH, Process(ipython=True), "notebook"),
    ],
)
def test_who_starts_no_ranks_says_why(variables, process, kind):
    found = detect(variables, process)
    assert (found.kind, found.is_rank, found.world_size) == (kind, False, 1)
    assert found.why_not_rerun == process.why_not_rerun is not None


@pytest.mark.parametrize("variables", [TORCHRUN, ACCELERATE, SLURM_GPU])
def test_a_rank_is_a_rank_in_a_child_too(variables):
    found = detect(variables, Process(child=True))
    assert found.is_rank
    assert found.why_not_rerun is None


def test_a_batch_script_is_one_process_and_says_so():
    found = detect(BATCH)
    assert (found.kind, found.world_size, found.num_nodes) == ("python", 1, 1)
    assert "without srun" in found.note
    assert "single process" in found.note
    assert "all 2 nodes" in found.note
    assert not detect({}).note


def test_the_environment_of_this_process_is_read_by_default(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert LaunchEnvironment.detect().rank == 1


def test_real_launchers(tmp_path):
    """torchrun and accelerate launch, as installed, set what the tables say."""
    folder = Path(sys.executable).parent
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    for kind, world_size, command in (
        (
            "torchrun",
            2,
            [folder / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        ),
        ("accelerate", 2, [*accelerate, "--multi_gpu", "--num_processes=2", "--main_process_port=0"]),
        ("accelerate", 1, [*accelerate, "--num_processes=1"]),
    ):
        done = subprocess.run(
            [*map(str, command), str(DETECT)],
            cwd=DETECT.parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )
        found = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda one: one["rank"])
        assert [one["rank"] for one in found] == list(range(world_size)), done.stderr
        assert {(one["kind"], one["world_size"], one["is_rank"]) for one in found} == {
            (kind, world_size, True)
        }
