"""What ranks say to one another, on gloo; and the same functions in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

import pantheraml
from pantheraml import MultiGPUConfig
from pantheraml.distributed import process_group as group
from pantheraml.distributed.questions import Question
from pantheraml.errors import ConfigError
from tests.distributed.ranks import free_port, run_ranks


def everything():
    rank = pantheraml.get_rank()
    pantheraml.setup_multi_gpu()
    pantheraml.barrier()
    return dict(
        rank=rank,
        local_rank=pantheraml.get_local_rank(),
        world_size=pantheraml.get_world_size(),
        main=pantheraml.is_main_process(),
        available=pantheraml.is_distributed_available(),
        sums=[pantheraml.all_reduce_scalar(rank + 0.5, op) for op in ("sum", "mean", "max", "min")],
        told=pantheraml.broadcast_object({"from": rank}, source=pantheraml.get_world_size() - 1),
        gathered=group.gather_objects(rank),
    )


@pytest.mark.promise("A1")
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_same_functions_with_and_without_ranks(ranks):
    for rank, found in enumerate(run_ranks(ranks, everything)):
        assert (found["rank"], found["local_rank"], found["world_size"]) == (rank, rank, ranks)
        assert found["main"] == (rank == 0) and found["available"] == (ranks > 1)
        last = ranks - 1
        total = sum(one + 0.5 for one in range(ranks))
        assert found["sums"] == [total, total / ranks, last + 0.5, 0.5]
        assert found["told"] == {"from": last} and found["gathered"] == list(range(ranks))


def test_another_reduction_is_refused():
    with pytest.raises(ConfigError, match="all_reduce_scalar"):
        pantheraml.all_reduce_scalar(1.0, "product")


def wait_for_one_that_fails():
    try:
        with group.main_process_first():
            if group.get_rank() == 0:
                raise OSError("no such model")
    except (OSError, RuntimeError) as error:
        return str(error)
    return "nothing"


def test_who_waits_for_a_rank_that_fails_fails_too():
    first, second = run_ranks(2, wait_for_one_that_fails)
    assert first == "no such model"
    assert "first rank failed" in second and "no such model" in second


def ask_alone():
    rank, size = group.get_rank(), group.get_world_size()
    question = Question("test", lambda: {"rank": rank}, group.connect_store, rank, size)
    if rank:
        time.sleep(2)  # busy with something else
        return None
    return question.ask(), question.ask()


def test_one_rank_may_ask_alone():
    answers, again = run_ranks(3, ask_alone)[0]
    assert answers == again == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


@pytest.mark.promise("C5")
def test_a_context_leaves_no_group_behind():
    with pantheraml.distributed_context(MultiGPUConfig(num_processes=1)) as config:
        assert config.num_processes == 1
    assert not pantheraml.is_distributed_available()
    with pytest.raises(ConfigError, match="2 ranks were asked for, and this process runs pytest"):
        pantheraml.setup_multi_gpu(MultiGPUConfig(num_processes=2))
    assert pantheraml.setup_multi_gpu(MultiGPUConfig(num_processes=2, strategy="none")).strategy == "none"


def save(folder):
    from torch import nn

    from pantheraml.export.model_methods import by_one_rank

    method = by_one_rank(lambda model, where: where.joinpath(f"by {group.get_rank()}").touch())
    method(nn.Linear(1, 1), folder)
    return group.is_first_of_group()


def test_one_rank_of_a_group_saves_and_every_process_without_one(tmp_path, monkeypatch):
    assert run_ranks(3, save, tmp_path) == [True, False, False]
    assert [file.name for file in tmp_path.iterdir()] == ["by 0"]
    for name, value in dict(
        RANK="2", LOCAL_RANK="2", WORLD_SIZE="4", MASTER_ADDR="host", MASTER_PORT="1"
    ).items():
        monkeypatch.setenv(name, value)
    assert save(tmp_path)  # a rank that was told to train by itself
    assert (tmp_path / "by 2").exists()


LEAVING = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch.distributed as dist
from pantheraml import all_reduce_scalar, setup_multi_gpu
setup_multi_gpu()
kept = dist.group.WORLD  # as DDP and accelerate keep it
for _ in range(30):
    all_reduce_scalar(1.0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="shares one CPU between the ranks")
@pytest.mark.slow
def test_ranks_leave_in_peace_right_after_they_talked():
    """A thread of gloo's that still held tensors aborted one run of three when Python ended; here, four runs."""
    for _ in range(4):
        variables = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", LEAVING], env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(2)
        ]
        assert [rank.wait(60) for rank in ranks] == [0, 0]
