"""SLURM's short forms, and the layouts of tasks and GPUs."""

from __future__ import annotations

import pytest

from pantheraml.errors import ConfigError
from pantheraml.launch.slurm import bare_job, layout, read_step
from pantheraml.launch.slurm_lists import expand_counts, expand_hosts
from tests.launch.test_environment import BATCH, SLURM_GPU, SLURM_NODE


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", "node1"),
        ("node[1-3,07],gpu-a[01-02]b", "node1 node2 node3 node07 gpu-a01b gpu-a02b"),
        ("n[08-11,3]", "n08 n09 n10 n11 n3"),
        ("n[9-11]", "n9 n10 n11"),
        ("a,b[1,2],c", "a b1 b2 c"),
        ("r[1-2]c[01-02],z9", "r1c01 r1c02 r2c01 r2c02 z9"),
        ("gpu[2].cluster.org", "gpu2.cluster.org"),
    ],
)
def test_hosts(text, hosts):
    assert expand_hosts(text) == hosts.split()


@pytest.mark.parametrize("text", ["", "a,", "node[1-2", "node1-2]", "node[1-x]", "node[]", "node[1-2][a]"])
def test_hosts_that_slurm_does_not_write(text):
    with pytest.raises(ConfigError, match="not a list that SLURM writes"):
        expand_hosts(text)


def test_counts():
    assert expand_counts("2(x2),1") == [2, 2, 1]
    assert expand_counts("4") == [4]
    assert expand_counts("1,2(x3)") == [1, 2, 2, 2]
    for text in ("", "2(x)", "two", "2(x2"):
        with pytest.raises(ConfigError):
            expand_counts(text)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_NODEID"])
def test_missing_variables_are_named(name):
    with pytest.raises(ConfigError, match=f"but {name} is not set"):
        read_step({key: value for key, value in SLURM_NODE.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"SLURM_STEP_NUM_TASKS": "3"}, "3 tasks but 2 on its nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, "2 hosts but tasks on 1"),
        ({"SLURM_PROCID": "2"}, "task 2 of 2"),
        ({"SLURM_NODEID": "2"}, "node 2 of 2"),
        ({"SLURM_LOCALID": "1"}, "task 1 of 1 on its node"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
    ],
)
def test_variables_that_contradict_each_other(changes, part):
    with pytest.raises(ConfigError) as caught:
        read_step(SLURM_NODE | changes)
    assert part in caught.value.got


@pytest.mark.parametrize(
    "variables",
    [
        {},
        BATCH,
        # a shell of salloc on a node of the job: the step has a number that no srun gets
        SLURM_NODE | {"SLURM_STEP_ID": "4294967290"},
        # sbatch, typed within a step, hands the variables of that step on
        SLURM_NODE | {"SLURMD_NODENAME": "node7", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node7"},
        SLURM_NODE | {"SLURM_JOB_NODELIST": "node[2-5]"},
        # ... also where the new job has that step's node, and others
        SLURM_NODE
        | {"SLURM_STEP_NODELIST": "node2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
        | {"SLURMD_NODENAME": "node1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"},
    ],
)
def test_no_step(variables):
    assert read_step(variables) is None


def test_who_is_alone_in_a_job_is_told_how_not_to_be():
    assert not bare_job({})
    assert not bare_job(SLURM_NODE)
    assert "the GPUs of node1 alone" in bare_job(BATCH)
    assert "all 2 nodes" in bare_job(BATCH)
    assert "its node" in bare_job(BATCH | {"SLURM_JOB_NUM_NODES": "1"})
    shell = {name: value for name, value in BATCH.items() if name != "SLURMD_NODENAME"}
    assert "none of the job's" in bare_job(shell)


def test_jobs_and_steps_meet_at_ports_of_their_own():
    def port(job: int, step: int) -> int:
        found = read_step(SLURM_NODE | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        assert found is not None
        return found.port

    ports = {port(job, step) for job in range(70_000_000, 70_000_090) for step in range(100)}
    assert len(ports) == 90 * 100
    assert 20000 <= min(ports) <= max(ports) <= 29999


@pytest.mark.promise("A5")
@pytest.mark.parametrize(
    ("tasks", "gpus", "seen", "counted", "expected"),
    [
        (1, "4", "0,1,2,3", None, "slurm-node"),
        (1, "1", "0", None, "slurm-node"),
        (1, None, None, None, "slurm-node"),
        (4, "4", "2", None, "slurm-gpu"),
        (4, "4", "0,1,2,3", None, "slurm-gpu"),
        # a cluster whose SLURM knows nothing of its GPUs
        (4, None, None, 4, "slurm-gpu"),
        # no GPUs: ranks on CPUs; GPUs only torch can count
        (4, None, None, 0, "slurm-gpu"),
        (4, None, None, None, "slurm-gpu"),
        (2, "4", "0,1,2,3", None, "2 tasks on this node, where the step has 4 GPUs."),
        (2, "4", "0,1", None, "where the step has 4 GPUs, and this task sees 2 of them"),
        (4, "4", "0,1", None, "this task sees 2 of them"),
        (2, "1", "0", None, "2 tasks on this node, where the step has 1 GPU."),
        (8, None, None, 4, "8 tasks on this node, where the step has 4 GPUs."),
    ],
)
def test_layouts(tasks, gpus, seen, counted, expected):
    given = {"SLURM_GPUS_ON_NODE": gpus, "CUDA_VISIBLE_DEVICES": seen, "ROCR_VISIBLE_DEVICES": seen}
    variables = {name: value for name, value in SLURM_GPU.items() if name not in given}
    variables |= {name: value for name, value in given.items() if value is not None}
    variables |= {"SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)", "SLURM_STEP_NUM_TASKS": str(2 * tasks)}
    variables |= {"SLURM_PROCID": str(2 * tasks - 1), "SLURM_LOCALID": str(tasks - 1)}
    step = read_step(variables)
    if expected.startswith("slurm"):
        assert layout(step, lambda: counted) == expected
        return
    with pytest.raises(ConfigError) as caught:
        layout(step, lambda: counted)
    assert expected in caught.value.got
    assert f"srun --ntasks-per-node=1 --gpus-per-node={gpus or counted}" in caught.value.fix


def test_nodes_with_different_numbers_of_tasks():
    step = read_step(SLURM_GPU | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_PROCID": "2"})
    with pytest.raises(ConfigError, match=r"different numbers of tasks \(node1: 1, node2: 3\)"):
        layout(step, lambda: None)
