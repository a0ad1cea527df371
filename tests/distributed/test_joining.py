"""Ranks, a split, or one GPU: what a process becomes, by its arguments and what is there."""

from __future__ import annotations

import pytest
import torch

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed import joining
from pantheraml.distributed.strategies import fsdp
from pantheraml.errors import ConfigError
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.models.assembly import LoadRequest
from pantheraml.models.placement import PipelineDevices
from pantheraml.models.precision import PrecisionFlags

PLAIN = PrecisionFlags(False, False, False, False, False)


class StartsRanks(Exception):
    """In the place of an agent."""


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpus, fits, kind)``: what the process finds."""

    def has(gpus, fits=True, kind="python", world_size=1, why_not_rerun=None):
        found = LaunchEnvironment(kind, world_size=world_size, why_not_rerun=why_not_rerun)
        monkeypatch.setattr(LaunchEnvironment, "detect", classmethod(lambda *_: found))
        monkeypatch.setattr(joining, "num_visible_gpus", lambda: gpus)
        monkeypatch.setattr(joining, "visible_memory", lambda: dict.fromkeys(range(gpus), 1))
        monkeypatch.setattr(joining, "fits_on_each", lambda *_: fits)
        monkeypatch.setattr(joining, "say_what_is_idle", lambda: None)

        def set_up(config):
            if not found.is_rank and gpus > 1 and config.strategy != "none":
                raise StartsRanks

        monkeypatch.setattr(joining, "setup_multi_gpu", set_up)
        monkeypatch.setattr(joining, "group_size", lambda: world_size)

    return has


@pytest.fixture
def request_for(llama):
    def build(device_map=None, max_memory=None, flags=PLAIN):
        return LoadRequest(
            str(llama), 64, None, flags, None, device_map, max_memory,
            True, None, True, False, "auto", False, None, None, 0, "auto", None, None,
        )  # fmt: skip

    return build


BOTH = MultiGPUConfig(auto_device_map=False)


@pytest.mark.parametrize(
    ("device_map", "use_multi_gpu", "automatic"),
    [(None, True, False), ("auto", True, False), (None, True, True), (None, BOTH, False)],
)
def test_a_copy_on_each_where_it_fits(machine, request_for, device_map, use_multi_gpu, automatic):
    machine(4)
    with pytest.raises(StartsRanks):
        joining.join(request_for(device_map), use_multi_gpu, automatic)


@pytest.mark.parametrize(
    ("device_map", "use_multi_gpu", "automatic"),
    [("auto", True, False), (None, BOTH, True)],
)
def test_a_split_where_it_does_not_and_a_map_was_asked_for(
    machine, request_for, device_map, use_multi_gpu, automatic
):
    machine(4, fits=False)
    found = joining.join(request_for(device_map), use_multi_gpu, automatic)
    assert found.device_map == "auto" and found.is_alone


def test_else_ranks_share_out_the_weights(machine, request_for, caplog):
    caplog.set_level("INFO", "pantheraml")
    machine(4, fits=False)
    with pytest.raises(StartsRanks):
        joining.join(request_for(), True, False)
    assert "ranks share out its weights (FSDP2)" in caplog.text


def test_8_bit_weights_are_split_or_every_rank_tries(machine, request_for):
    machine(4, fits=False)
    eight_bit = PrecisionFlags(load_in_8bit=True)
    found = joining.join(request_for(flags=eight_bit), True, False)
    assert found.device_map == "auto" and found.is_alone
    for config in (BOTH, MultiGPUConfig(strategy="ddp")):
        with pytest.raises(StartsRanks):
            joining.join(request_for(flags=eight_bit), config, False)


@pytest.mark.parametrize("use_multi_gpu", [True, None, False])
@pytest.mark.parametrize("device_map", ["balanced", "sequential", {"model": 0, "lm_head": 1}])
def test_a_map_over_several_gpus_is_one_process(machine, request_for, device_map, use_multi_gpu):
    machine(4)
    found = joining.join(request_for(device_map), use_multi_gpu, False)
    assert found.device_map == device_map and found.is_alone


def test_one_gpu_needs_no_ranks(machine, request_for):
    machine(1, fits=False)
    assert joining.join(request_for("balanced"), True, False).is_alone
    assert joining.join(request_for(), None, True).device_map == "auto"


def test_ranks_share_out_what_none_of_them_holds(machine, request_for, monkeypatch):
    asked = []
    monkeypatch.setattr(fsdp, "sharding_of", lambda config, trained: asked.append(trained))
    machine(4, fits=False, kind="torchrun", world_size=4)
    joining.join(request_for(), None, False)
    full = PrecisionFlags(False, False, False, False, True)
    joining.join(request_for(flags=full), None, False)
    assert asked == [False, True]
    joining.join(request_for(), MultiGPUConfig(strategy="fsdp", shard_frozen=False), False)
    joining.join(request_for(flags=PrecisionFlags(load_in_8bit=True)), None, False)
    joining.join(request_for(), MultiGPUConfig(strategy="ddp"), False)
    machine(4, kind="torchrun", world_size=4)
    joining.join(request_for(), MultiGPUConfig(strategy="fsdp"), False)
    assert len(asked) == 2
    joining.join(request_for(flags=full), MultiGPUConfig(strategy="fsdp"), False)
    assert asked[2:] == [True]


def test_a_rank_keeps_to_its_gpu(machine, request_for):
    machine(4, kind="torchrun", world_size=4)
    assert not joining.join(request_for(), True, False).is_alone
    assert not joining.join(request_for("auto"), None, False).is_alone
    with pytest.raises(ConfigError, match="A model is split between all GPUs by one process"):
        joining.join(request_for("balanced"), None, False)
    for device_map in ("cuda:1", 1, {"": 0}):
        with pytest.raises(ConfigError, match="would put all of them on one"):
            joining.join(request_for(device_map), None, False)


def test_limits_come_from_either_place(machine, request_for):
    machine(1)
    config = MultiGPUConfig(max_memory={0: "9GB"})
    assert joining.join(request_for(), config, False).max_memory == {0: "9GB"}
    assert joining.join(request_for(max_memory={0: "9GB"}), config, False).max_memory == {0: "9GB"}
    with pytest.raises(ConfigError, match="Each GPU has one limit"):
        joining.join(request_for(max_memory={0: "8GB"}), config, False)


def test_a_notebook_splits_the_model(machine, request_for, caplog):
    caplog.set_level("INFO", "pantheraml")
    machine(4, kind="notebook", why_not_rerun="this program is typed into a notebook")
    found = joining.join(request_for(), True, False)
    assert found.device_map == "balanced" and found.is_alone
    assert "this program is typed into a notebook: the model is split over 4 GPUs" in caplog.text
    with pytest.raises(StartsRanks):  # which refuses, and says what to type
        joining.join(request_for(), BOTH, False)


@pytest.fixture
def pipelines(machine, monkeypatch):
    """``pipelines(told)``: this is rank 1 of two pipelines on four GPUs; ``told``: limits of the other one."""

    def has(told):
        machine(4, kind="pantheraml", world_size=2)
        environment = LaunchEnvironment("pantheraml", rank=1, local_rank=1, world_size=2, local_world_size=2)
        monkeypatch.setattr(LaunchEnvironment, "detect", classmethod(lambda *_: environment))
        monkeypatch.setattr(joining, "visible_memory", lambda: {0: 50, 1: 60, 2: 70, 3: 80})
        monkeypatch.setattr(
            joining, "rank_devices", lambda: (torch.device("cuda", 2), torch.device("cuda", 3))
        )
        monkeypatch.setattr(joining, "gather_objects", lambda mine: [told, mine])

    return has


TWO = MultiGPUConfig(pipeline_parallel=2)


@pytest.mark.parametrize("device_map", [None, "auto", "balanced"])
def test_a_pipeline_has_its_ranks_gpus_and_what_all_have_room_for(pipelines, request_for, device_map):
    pipelines([90, 60])
    found = joining.join(request_for(device_map), TWO, False)
    assert found.pipeline == PipelineDevices((torch.device("cuda", 2), torch.device("cuda", 3)), (70, 60))
    limited = joining.join(request_for(device_map, max_memory=dict.fromkeys(range(4), 40)), TWO, False)
    assert limited.pipeline.limits == (40, 40)


def test_what_does_not_go_with_a_pipeline(pipelines, request_for):
    pipelines([90, 90])
    for device_map in ("sequential", "cuda:1", 0, {"model": 0, "lm_head": 1}):
        with pytest.raises(ConfigError, match="The planner puts the stages"):
            joining.join(request_for(device_map), TWO, False)
    with pytest.raises(ConfigError, match="names no limit for GPU 1, GPU 3"):
        joining.join(request_for(max_memory={0: 40, 2: 40}), TWO, False)


def test_what_the_run_was_told_counts_where_nothing_else_is_said(pipelines, request_for, monkeypatch):
    pipelines([90, 90])
    monkeypatch.setattr(joining, "settings_of_run", lambda: TWO)
    for use_multi_gpu in (None, True):
        assert joining.join(request_for(), use_multi_gpu, False).pipeline.limits == (70, 80)
    assert joining.join(request_for(), False, False).pipeline is None
