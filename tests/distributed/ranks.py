"""Run a function on several gloo ranks: processes forked after the imports, which take a second instead of fifteen."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from datetime import timedelta


def free_port() -> int:
    """A TCP port that nobody on this machine listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def run_ranks(world_size, function, *arguments, timeout=240, grouped=None):
    """What ``function(*arguments)`` returned on each rank of a gloo group, by rank.

    One rank runs here, without a group, unless it is to be ``grouped``, as torchrun's only one is. Several have none
    with ``grouped=False``: the function makes it.
    """
    if world_size == 1 and not grouped:
        return [function(*arguments)]
    context = multiprocessing.get_context("fork")
    queue, port, leave = context.Queue(), free_port(), context.Event()
    processes = [
        context.Process(
            target=_rank, args=(queue, leave, rank, world_size, port, grouped, function, arguments)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(queue.get(timeout=timeout) for _ in processes)
    finally:
        leave.set()
        for process in processes:
            process.join(10)
            process.kill()
    failed = [text for text in found.values() if isinstance(text, Failure)]
    assert not failed, "\n".join(failed)
    return [found[rank] for rank in range(world_size)]


class Failure(str):
    """The traceback of a rank."""


def _rank(queue, leave, rank, world_size, port, grouped, function, arguments):
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        if grouped is not False:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        result = function(*arguments)
        if grouped is not False:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        result = Failure(f"rank {rank}:\n{traceback.format_exc()}")
    queue.put((rank, result))
    queue.close()
    queue.join_thread()
    # Rank 0 holds the group's store, which another may still be reading. One that failed leaves at once: the others
    # would wait for it.
    if not isinstance(result, Failure):
        leave.wait(60)
    os._exit(0)
