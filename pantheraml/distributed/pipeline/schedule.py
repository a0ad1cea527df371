"""The order in which one host launches the forwards and backwards of micro-batches on the stages of a pipeline.

1F1B (Narayanan et al. 2019, "PipeDream"): a GPU begins with some forwards, then does a backward after each forward, and
ends with the backwards that are left. So it holds what a few micro-batches keep, however many there are. With one stage
on each of N GPUs, (N - 1) / (M + N - 1) of the time of M micro-batches is spent waiting. With several stages on each,
which a token comes to in rounds (Narayanan et al. 2021), the waiting is divided by their number.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pantheraml.devices.flight import forwards_ahead

# A backward takes about twice as long as a forward; where layers recompute three times. Only the order hangs on it.
_FORWARD, _BACKWARD = 1, 2


class Task(NamedTuple):
    """One forward or backward of one micro-batch on one stage."""

    stage: int
    micro_batch: int
    is_forward: bool


@lru_cache(maxsize=64)
def one_forward_one_backward(gpus: int, micro_batches: int, rounds: int = 1) -> tuple[Task, ...]:
    """All tasks of a step, each after those it waits for, in the order in which GPUs come to them.

    Launched in this order by one host, no GPU waits for a launch while the host launches what another one comes to
    later.

    Args:
        gpus: of the pipeline, 1 or more.
        micro_batches: of the step, 1 or more.
        rounds: stages of each GPU; stage s is on GPU s modulo ``gpus``.
    """
    waiting = [_of_gpu(gpu, gpus, micro_batches, rounds) for gpu in range(gpus)]
    free = [0] * gpus
    done: dict[Task, int] = {}
    order: list[Task] = []
    while any(waiting):
        heads = [tasks[0] for tasks in waiting if tasks]
        # Where rounds do not come out even, all may wait for one another: then whatever can be done is done earlier.
        can = _ready(heads, done, gpus, rounds) or _ready(
            [task for tasks in waiting for task in tasks], done, gpus, rounds
        )
        start, _, task = min(
            (max(free[task.stage % gpus], at), -(task.stage % gpus), task) for at, task in can
        )
        waiting[task.stage % gpus].remove(task)
        free[task.stage % gpus] = done[task] = start + (_FORWARD if task.is_forward else _BACKWARD)
        order.append(task)
    return tuple(order)


def _of_gpu(gpu: int, gpus: int, micro_batches: int, rounds: int) -> list[Task]:
    """The tasks of one GPU, in its order: it takes as many micro-batches as there are GPUs through all its stages."""
    groups = [range(at, min(at + gpus, micro_batches)) for at in range(0, micro_batches, gpus)]
    stages = [turn * gpus + gpu for turn in range(rounds)]
    forwards = [Task(stage, one, True) for group in groups for stage in stages for one in group]
    backwards = [Task(stage, one, False) for group in groups for stage in reversed(stages) for one in group]
    ahead = forwards_ahead(gpus - 1 - gpu, gpus, micro_batches, rounds)
    steady = [task for pair in zip(backwards, forwards[ahead:], strict=False) for task in pair]
    return forwards[:ahead] + steady + backwards[len(forwards) - ahead :]


def _ready(tasks: list[Task], done: dict[Task, int], gpus: int, rounds: int) -> list[tuple[int, Task]]:
    """Those of ``tasks`` whose inputs are launched, each with the time when they are there."""
    found: list[tuple[int, Task]] = []
    for task in tasks:
        before = _before(task, gpus * rounds)
        if before is None or before in done:
            found.append((0 if before is None else done[before], task))
    return found


def _before(task: Task, stages: int) -> Task | None:
    """What ``task`` waits for."""
    if task.is_forward:
        return task._replace(stage=task.stage - 1) if task.stage > 0 else None
    if task.stage < stages - 1:
        return task._replace(stage=task.stage + 1)
    return task._replace(is_forward=True)
