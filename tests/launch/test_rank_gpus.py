"""How many ranks there are where each is a pipeline of several GPUs, and which GPUs are whose."""

from __future__ import annotations

import pytest

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.errors import ConfigError
from pantheraml.launch import start
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.rank_gpus import check_ranks, gpus_of_rank, num_ranks, whole_ranks


@pytest.mark.parametrize(
    ("gpus", "settings", "ranks", "last"),
    [
        (8, {}, 8, [7]),
        (0, {}, 1, []),
        (8, dict(pipeline_parallel=1), 8, [7]),
        (8, dict(pipeline_parallel=2), 4, [6, 7]),
        (8, dict(pipeline_parallel=4), 2, [4, 5, 6, 7]),
        (8, dict(pipeline_parallel=8), 1, list(range(8))),
        (6, dict(pipeline_parallel=True), 1, list(range(6))),
        (4, dict(strategy="pipeline"), 1, list(range(4))),
        (8, dict(pipeline_parallel=3, num_processes=2), 2, [3, 4, 5]),
        (0, dict(pipeline_parallel=3, num_processes=2), 2, []),
        (0, dict(pipeline_parallel=2), 1, []),
    ],
)
def test_ranks_and_their_gpus(gpus, settings, ranks, last):
    config = MultiGPUConfig(**settings)
    assert num_ranks(config, gpus) == ranks
    found = [list(gpus_of_rank(config, rank, gpus)) for rank in range(ranks)]
    assert found[-1] == last
    flat = [gpu for own in found for gpu in own]
    assert len(set(flat)) == len(flat), "no GPU is of two ranks"


@pytest.mark.parametrize(
    ("gpus", "settings", "says"),
    [
        (
            8,
            dict(pipeline_parallel=3),
            "is 2, 4 or 8 here.\nWrite one of these, or num_processes=2 to leave 2 idle",
        ),
        (6, dict(pipeline_parallel=4), "is 2, 3 or 6 here"),
        (2, dict(pipeline_parallel=4), "Write pipeline_parallel=2;"),
        (1, dict(pipeline_parallel=2), "on two GPUs or more"),
        (1, dict(pipeline_parallel=True), "on two GPUs or more"),
        (4, dict(strategy="pipeline", pipeline_parallel=1), "on two GPUs or more"),
        (0, dict(pipeline_parallel=True), "Write pipeline_parallel=2 to try the script"),
        (8, dict(pipeline_parallel=4, num_processes=3), "4 GPUs of its own.\nWrite num_processes=2,"),
        (2, dict(num_processes=3), "a GPU of its own.\nWrite num_processes=2,"),
    ],
)
def test_what_gpus_are_not_enough_for(gpus, settings, says):
    with pytest.raises(ConfigError) as caught:
        num_ranks(MultiGPUConfig(**settings), gpus)
    assert says in f"{caught.value.need}\n{caught.value.fix}"


@pytest.mark.parametrize(
    ("kind", "gpus", "typed"),
    [
        ("torchrun", 8, "Type torchrun --nproc_per_node=4 FILE; python FILE starts 4 ranks."),
        ("accelerate", 8, "Type accelerate launch --num_processes=4 FILE;"),
        ("slurm-gpu", 8, "Type srun --ntasks-per-node=1 --gpus-per-node=8 python FILE;"),
        ("torchrun", 2, "Type torchrun --nproc_per_node=1 FILE; python FILE starts 1 rank."),
        ("pantheraml", 2, "Write num_processes=1"),
    ],
)
def test_more_ranks_than_pipelines(monkeypatch, kind, gpus, typed):
    monkeypatch.setattr(start, "num_visible_gpus", lambda: gpus)
    environment = LaunchEnvironment(kind, world_size=8, local_world_size=8)
    monkeypatch.setattr(LaunchEnvironment, "detect", classmethod(lambda *_: environment))
    with pytest.raises(ConfigError) as caught:
        start.ensure_ranks(MultiGPUConfig(pipeline_parallel=2))
    assert typed in caught.value.fix
    check_ranks(MultiGPUConfig(), environment, gpus)  # ranks with a GPU each are none of this file's business


def test_a_plain_script_starts_a_rank_for_each_pipeline(monkeypatch):
    started = []
    monkeypatch.setattr(start, "num_visible_gpus", lambda: 8)
    monkeypatch.setattr(LaunchEnvironment, "detect", classmethod(lambda *_: LaunchEnvironment("python")))
    monkeypatch.setattr(start, "become_agent", started.append)
    start.ensure_ranks(MultiGPUConfig(pipeline_parallel=2, max_restarts=1))
    assert started[0].here == 4
    monkeypatch.setattr(start, "num_visible_gpus", lambda: 7)
    assert started[0].count() == 3, "a GPU is gone"
    monkeypatch.setattr(start, "num_visible_gpus", lambda: 8)
    assert start.ensure_ranks(MultiGPUConfig(pipeline_parallel=True)).kind == "python" and len(started) == 1


def test_what_is_left_makes_whole_ranks():
    assert whole_ranks(MultiGPUConfig(), 3) == 3
    assert whole_ranks(MultiGPUConfig(pipeline_parallel=4), 7) == 1
    assert whole_ranks(MultiGPUConfig(pipeline_parallel=4), 3) == 1, "it says itself what is wrong"
