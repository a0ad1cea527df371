"""The order of a pipeline's forwards and backwards."""

from __future__ import annotations

import pytest

from pantheraml.devices.flight import forwards_ahead
from pantheraml.distributed.pipeline.schedule import Task, one_forward_one_backward

ONE_ROUND = [
    (1, 1, 1),
    (1, 5, 1),
    (2, 1, 1),
    (2, 2, 1),
    (2, 16, 1),
    (3, 2, 1),
    (4, 4, 1),
    (8, 3, 1),
    (8, 16, 1),
]
EVEN = [(2, 4, 2), (2, 16, 2), (4, 16, 2), (8, 16, 2), (4, 8, 3)]
UNEVEN = [(2, 1, 2), (2, 3, 2), (4, 5, 2), (4, 17, 2), (4, 2, 3), (8, 13, 2), (3, 7, 4)]


@pytest.mark.parametrize(("gpus", "micro_batches", "rounds"), ONE_ROUND + EVEN + UNEVEN)
def test_every_task_once_and_after_what_it_waits_for(gpus, micro_batches, rounds):
    order, stages = one_forward_one_backward(gpus, micro_batches, rounds), gpus * rounds
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


@pytest.mark.parametrize(("gpus", "micro_batches", "rounds"), ONE_ROUND + EVEN)
def test_a_gpu_holds_as_many_graphs_as_it_says(gpus, micro_batches, rounds):
    held, most = [0] * gpus, [0] * gpus
    for task in one_forward_one_backward(gpus, micro_batches, rounds):
        gpu = task.stage % gpus
        held[gpu] += 1 if task.is_forward else -1
        most[gpu] = max(most[gpu], held[gpu])
    assert held == [0] * gpus
    assert most == [forwards_ahead(gpus - 1 - gpu, gpus, micro_batches, rounds) for gpu in range(gpus)]


def time_of(order, gpus, stages, backward):
    """When the last of ``order`` ends, each GPU doing its tasks in this order as soon as it can; a forward takes 1."""
    free, done = [0.0] * gpus, {}
    for task in order:
        if task.is_forward:
            before = task._replace(stage=task.stage - 1)
        else:
            before = (
                task._replace(stage=task.stage + 1)
                if task.stage < stages - 1
                else task._replace(is_forward=True)
            )
        gpu = task.stage % gpus
        end = max(free[gpu], done.get(before, 0.0)) + (1.0 if task.is_forward else backward)
        free[gpu] = done[task] = end
    return max(free)


@pytest.mark.parametrize(("gpus", "micro_batches", "rounds"), ONE_ROUND + EVEN)
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_gpus_wait_no_longer_than_they_must(gpus, micro_batches, rounds, backward):
    order = one_forward_one_backward(gpus, micro_batches, rounds)
    least = (micro_batches * rounds + gpus - 1) * (1 + backward)
    assert time_of(order, gpus, gpus * rounds, backward) == least


@pytest.mark.parametrize(("gpus", "micro_batches", "rounds"), UNEVEN)
def test_uneven_rounds_take_no_longer_than_even_ones(gpus, micro_batches, rounds):
    order = one_forward_one_backward(gpus, micro_batches, rounds)
    rounded_up = -(-micro_batches // gpus) * gpus
    assert time_of(order, gpus, gpus * rounds, 2.0) <= 3 * (rounded_up * rounds + gpus - 1)
