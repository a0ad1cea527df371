"""The order of a pipeline's forwards and backwards."""

from __future__ import annotations

import pytest

from pantheraml.distributed.pipeline.schedule import Task, in_flight, one_forward_one_backward

LAYOUTS = [(1, 1), (1, 5), (2, 1), (2, 2), (2, 16), (3, 2), (4, 4), (4, 16), (8, 3), (8, 16)]


@pytest.mark.parametrize(("stages", "micro_batches"), LAYOUTS)
def test_every_task_once_and_after_what_it_waits_for(stages, micro_batches):
    order = one_forward_one_backward(stages, micro_batches)
    assert len(set(order)) == len(order) == 2 * stages * micro_batches
    place = {task: at for at, task in enumerate(order)}
    for task, at in place.items():
        stage, index, is_forward = task
        if is_forward and stage > 0:
            assert place[Task(stage - 1, index, True)] < at
        if not is_forward:
            assert place[Task(stage, index, True)] < at
            if stage < stages - 1:
                assert place[Task(stage + 1, index, False)] < at


@pytest.mark.parametrize(("stages", "micro_batches"), LAYOUTS)
def test_a_stage_holds_as_many_micro_batches_as_it_says(stages, micro_batches):
    held, most = [0] * stages, [0] * stages
    for task in one_forward_one_backward(stages, micro_batches):
        held[task.stage] += 1 if task.is_forward else -1
        most[task.stage] = max(most[task.stage], held[task.stage])
    assert held == [0] * stages
    assert most == [in_flight(stage, stages, micro_batches) for stage in range(stages)]


def time_of(order, stages, forward=1.0, backward=2.0):
    """When the last of ``order`` ends, each stage doing its tasks in this order as soon as it can."""
    free, done = [0.0] * stages, {}
    for task in order:
        step = -1 if task.is_forward else 1
        before = done.get(task._replace(stage=task.stage + step), 0.0)
        end = max(free[task.stage], before) + (forward if task.is_forward else backward)
        free[task.stage] = done[task] = end
    return max(free)


@pytest.mark.parametrize(("stages", "micro_batches"), LAYOUTS)
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_stages_wait_no_longer_than_they_must(stages, micro_batches, backward):
    order = one_forward_one_backward(stages, micro_batches)
    assert time_of(order, stages, backward=backward) == (micro_batches + stages - 1) * (1 + backward)
