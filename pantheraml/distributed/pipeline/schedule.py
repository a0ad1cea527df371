"""The order in which one host launches the forwards and backwards of micro-batches on the stages of a pipeline.

1F1B (Narayanan et al. 2019, "PipeDream"): stage s of N begins with N - s forwards, then does a backward after each
forward, and ends with the backwards that are left. So it holds what N - s micro-batches keep, however many there are,
and of the time of M micro-batches the part (N - 1) / (M + N - 1) is spent waiting.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

# A backward takes about twice as long as a forward; where layers recompute three times. Only the order hangs on it.
_FORWARD, _BACKWARD = 1, 2


class Task(NamedTuple):
    """One forward or backward of one micro-batch on one stage."""

    stage: int
    micro_batch: int
    is_forward: bool


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """How many micro-batches stage ``stage`` holds at a time."""
    return min(stages - stage, micro_batches)


@lru_cache(maxsize=64)
def one_forward_one_backward(stages: int, micro_batches: int) -> tuple[Task, ...]:
    """All tasks of a step, each after those it waits for, in the order in which stages come to them.

    Launched in this order by one host, no stage waits for a launch while the host launches what another one comes to
    later.

    Args:
        stages: of the pipeline, 1 or more.
        micro_batches: of the step, 1 or more.
    """
    waiting = [_of_stage(stage, stages, micro_batches) for stage in range(stages)]
    free = [0] * stages
    done: dict[Task, int] = {}
    order: list[Task] = []
    while len(order) < 2 * stages * micro_batches:
        starts: list[tuple[int, int, Task]] = []
        for task in (tasks[0] for tasks in waiting if tasks):
            before = _before(task, stages)
            if before is None or before in done:
                ready = 0 if before is None else done[before]
                starts.append((max(free[task.stage], ready), -task.stage, task))
        start, _, task = min(starts)
        waiting[task.stage].pop(0)
        free[task.stage] = done[task] = start + (_FORWARD if task.is_forward else _BACKWARD)
        order.append(task)
    return tuple(order)


def _of_stage(stage: int, stages: int, micro_batches: int) -> list[Task]:
    """The tasks of one stage, in its order."""
    ahead = in_flight(stage, stages, micro_batches)
    forwards = [Task(stage, index, True) for index in range(micro_batches)]
    backwards = [Task(stage, index, False) for index in range(micro_batches)]
    steady = [task for pair in zip(backwards, forwards[ahead:], strict=False) for task in pair]
    return forwards[:ahead] + steady + backwards[micro_batches - ahead :]


def _before(task: Task, stages: int) -> Task | None:
    """What must be launched on another stage before ``task``."""
    if task.is_forward:
        return task._replace(stage=task.stage - 1) if task.stage > 0 else None
    return task._replace(stage=task.stage + 1) if task.stage < stages - 1 else None
