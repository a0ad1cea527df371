"""What SLURM says of the step this process is a task of: its hosts, its tasks, where ranks meet.

Only variables of the *step* (one ``srun``) count. Those of the job are there in a batch script, too, which is a single
process however many tasks the job asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pantheraml.errors import ConfigError
from pantheraml.launch.slurm_lists import expand_counts, expand_hosts
from pantheraml.launch.variables import missing, whole_number

# Ranks meet at one of these ports: below those that Linux gives to connections by itself (32768 and up).
FIRST_PORT, NUM_PORTS = 20000, 10000
# A prime, so that consecutive jobs are far apart: the steps of one job are neighbours.
_JOB_STRIDE = 101

# Steps that nobody asked srun for: the batch script, salloc's shell on a node.
_FIRST_RESERVED_STEP = 0xFFFFFFF0

_NEEDED = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
)


@dataclass(frozen=True)
class Step:
    """One task's view of its step.

    Attributes:
        job: number of the job; each task of an array has its own.
        step: number of the step in the job.
        hosts: names of the step's nodes.
        tasks: tasks on each of them.
        rank: number of this task in the step.
        local_rank: its number on its node.
        node_rank: number of its node in ``hosts``.
        gpus_on_node: GPUs the step has on this node; None where SLURM does not count GPUs.
        gpus_seen: those of them that this task sees; None where SLURM did not choose.
    """

    job: int
    step: int
    hosts: tuple[str, ...]
    tasks: tuple[int, ...]
    rank: int
    local_rank: int
    node_rank: int
    gpus_on_node: int | None = None
    gpus_seen: int | None = None

    @property
    def port(self) -> int:
        """Where its ranks meet, on its first host: 20000 to 29999, by the numbers of job and step."""
        return FIRST_PORT + (self.job * _JOB_STRIDE + self.step) % NUM_PORTS


def read_step(variables: Mapping[str, str]) -> Step | None:
    """The step this process is a task of; None outside of SLURM and in a batch script or salloc's shell.

    Raises:
        ConfigError: variables are missing, or contradict each other.
    """
    if not variables.get("SLURM_STEP_ID") or whole_number(variables, "SLURM_STEP_ID") >= _FIRST_RESERVED_STEP:
        return None
    lacking = missing(variables, _NEEDED)
    if lacking:
        raise ConfigError(
            got=f"SLURM_STEP_ID says that srun started this process, but {' and '.join(lacking)} "
            f"{'is' if len(lacking) == 1 else 'are'} not set.",
            need="The hosts and the number of this task are read from them.",
            fix="Let srun start Python directly, in an environment that keeps all variables SLURM_*.",
        )
    if _is_left_over(variables):
        return None
    step = Step(
        job=whole_number(variables, "SLURM_JOB_ID"),
        step=whole_number(variables, "SLURM_STEP_ID"),
        hosts=tuple(expand_hosts(variables["SLURM_STEP_NODELIST"])),
        tasks=tuple(expand_counts(variables["SLURM_STEP_TASKS_PER_NODE"])),
        rank=whole_number(variables, "SLURM_PROCID"),
        local_rank=whole_number(variables, "SLURM_LOCALID"),
        node_rank=whole_number(variables, "SLURM_NODEID"),
        gpus_on_node=_gpus_on_node(variables),
        gpus_seen=_gpus_seen(variables),
    )
    _check(step, whole_number(variables, "SLURM_STEP_NUM_TASKS"))
    return step


def bare_job(variables: Mapping[str, str]) -> str:
    """That this process is alone in its job because no ``srun`` started it, as sentences; empty if that is not so."""
    if not variables.get("SLURM_JOB_ID") or read_step(variables) is not None:
        return ""
    node = variables.get("SLURMD_NODENAME")
    where = f"the GPUs of {node} alone" if node else "the GPUs of the machine you type on, none of the job's"
    nodes = variables.get("SLURM_JOB_NUM_NODES", "1")
    count = "its node" if nodes == "1" else f"all {nodes} nodes"
    return (
        f"SLURM's job {variables['SLURM_JOB_ID']} runs this program without srun: it is a single process and can use "
        f"{where}. To use {count} through SLURM, write srun --ntasks-per-node=1 before python."
    )


def layout(step: Step, visible_gpus: Callable[[], int | None]) -> Literal["slurm-node", "slurm-gpu"]:
    """Whether this task starts the ranks of its node, or is a rank.

    Args:
        step: this task's view.
        visible_gpus: counts GPUs; called where SLURM does not.

    Raises:
        ConfigError: the tasks and GPUs are laid out in neither way.
    """
    if len(set(step.tasks)) > 1:
        counts = ", ".join(f"{host}: {count}" for host, count in zip(step.hosts, step.tasks, strict=True))
        raise ConfigError(
            got=f"SLURM gave the nodes of this step different numbers of tasks ({counts}).",
            need="Every node has the same number of ranks.",
            fix=f"Type srun --nodes={len(step.hosts)} --ntasks-per-node=1 --gpus-per-node=N, with N GPUs on each.",
        )
    tasks = step.tasks[step.node_rank]
    if tasks == 1:
        return "slurm-node"
    gpus = step.gpus_on_node if step.gpus_on_node is not None else visible_gpus()
    if not gpus:  # ranks on CPUs
        return "slurm-gpu"
    if tasks != gpus or step.gpus_seen not in (None, 1, gpus):
        sees = "" if step.gpus_seen in (None, gpus) else f", and this task sees {step.gpus_seen} of them"
        raise ConfigError(
            got=f"SLURM started {tasks} tasks on this node, where the step has {gpus} GPU{'s' * (gpus > 1)}{sees}.",
            need="Either one task a node starts a rank for each of its GPUs, or each task has one GPU and is a rank.",
            fix=f"Type srun --ntasks-per-node=1 --gpus-per-node={gpus} or srun --ntasks-per-node={gpus} "
            "--gpus-per-task=1.",
        )
    return "slurm-gpu"


def _gpus_on_node(variables: Mapping[str, str]) -> int | None:
    return whole_number(variables, "SLURM_GPUS_ON_NODE") if variables.get("SLURM_GPUS_ON_NODE") else None


def _gpus_seen(variables: Mapping[str, str]) -> int | None:
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if variables.get(name):
            return len(variables[name].split(","))
    return None


def _is_left_over(variables: Mapping[str, str]) -> bool:
    """Whether the step's variables are of a step in which this job was submitted: sbatch hands them on."""
    hosts = expand_hosts(variables["SLURM_STEP_NODELIST"])
    node_rank = whole_number(variables, "SLURM_NODEID")
    node = variables.get("SLURMD_NODENAME")
    if node and node_rank < len(hosts) and hosts[node_rank] != node:
        return True
    job = variables.get("SLURM_JOB_NODELIST")
    return bool(job) and not set(hosts) <= set(expand_hosts(str(job)))


def _check(step: Step, num_tasks: int) -> None:
    faults = {
        f"{len(step.hosts)} hosts but tasks on {len(step.tasks)}": len(step.hosts) != len(step.tasks),
        f"{num_tasks} tasks but {sum(step.tasks)} on its nodes": sum(step.tasks) != num_tasks,
        f"task {step.rank} of {num_tasks}": step.rank >= num_tasks,
        f"node {step.node_rank} of {len(step.hosts)}": step.node_rank >= len(step.hosts),
    }
    found = [fault for fault, is_there in faults.items() if is_there]
    if not found and step.local_rank >= step.tasks[step.node_rank]:
        found = [f"task {step.local_rank} of {step.tasks[step.node_rank]} on its node"]
    if found:
        raise ConfigError(
            got=f"The variables of SLURM's step {step.job}.{step.step} contradict each other: {'; '.join(found)}.",
            need="They say where the ranks meet and which of them this is.",
            fix="Start Python by srun itself, and do not export SLURM_* variables in the batch script.",
        )
