"""Ranks, a split, or one GPU: what a process becomes, by its arguments and what is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from pantheraml import log
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed import automatic, joining
from pantheraml.distributed.process_group import get_rank
from pantheraml.distributed.strategies import fsdp
from pantheraml.errors import ConfigError
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.models.assembly import LoadRequest
from pantheraml.models.placement import PipelineDevices
from pantheraml.models.precision import PrecisionFlags
from tests.distributed.ranks import run_ranks

SIXTEEN = PrecisionFlags(load_in_16bit=True)
EIGHT = PrecisionFlags(load_in_8bit=True)
FULL = PrecisionFlags(full_finetuning=True)
GIB = 2**30


class StartsRanks(Exception):
    """In the place of an agent."""


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpus, gib, kind)``: what the process finds; ``told``: GiB of each rank's GPU, where they differ."""

    def has(gpus, gib=139, kind="python", world_size=1, why_not_rerun=None, told=None):
        found = LaunchEnvironment(kind, world_size=world_size, why_not_rerun=why_not_rerun)
        monkeypatch.setattr(LaunchEnvironment, "detect", classmethod(lambda *_: found))
        monkeypatch.setattr(joining, "num_visible_gpus", lambda: gpus)
        for module in (joining, automatic):
            monkeypatch.setattr(module, "visible_memory", lambda: dict.fromkeys(range(gpus), int(gib * GIB)))
        others = [automatic._Told("NVIDIA H200", int(one * GIB), 8) for one in told or [gib] * world_size]
        monkeypatch.setattr(automatic, "gather_objects", lambda mine: others)
        monkeypatch.setattr(joining, "say_what_is_idle", lambda: None)

        def set_up(config):
            if not found.is_rank and gpus > 1 and config.strategy != "none":
                raise StartsRanks

        monkeypatch.setattr(joining, "setup_multi_gpu", set_up)
        monkeypatch.setattr(joining, "group_size", lambda: world_size)
        monkeypatch.setattr(log, "_said", set())

    return has


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Configurations of the shapes of Llama 8B and 70B; no weights, which no decision needs."""
    folder = tmp_path_factory.mktemp("large")
    shapes = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64)}
    for name, (hidden, inner, layers, heads) in shapes.items():
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        config.save_pretrained(folder / name)
    return folder


@pytest.fixture
def request_for(large):
    def build(device_map=None, max_memory=None, flags=SIXTEEN, model="70B", **changes):
        found = LoadRequest(
            str(large / model), 2048, None, flags, None, device_map, max_memory,
            True, None, True, False, "auto", False, None, None, 0, "auto", None, None,
        )  # fmt: skip
        return replace(found, **changes)

    return build


BOTH = MultiGPUConfig(auto_device_map=False)


@pytest.mark.parametrize(
    ("device_map", "use_multi_gpu", "automatic"),
    [(None, True, False), ("auto", True, False), (None, True, True), (None, BOTH, False)],
)
def test_ranks_where_a_copy_fits_on_each(machine, request_for, device_map, use_multi_gpu, automatic):
    machine(4)
    with pytest.raises(StartsRanks):
        joining.join(request_for(device_map, model="8B"), use_multi_gpu, automatic)


@pytest.mark.parametrize(
    ("device_map", "use_multi_gpu", "automatic"),
    [("auto", True, False), (None, BOTH, True)],
)
def test_a_split_where_it_does_not_and_a_map_was_asked_for(
    machine, request_for, device_map, use_multi_gpu, automatic
):
    machine(4)
    found = joining.join(request_for(device_map), use_multi_gpu, automatic)
    assert found.device_map == "auto" and found.is_alone


def test_else_ranks_share_out_the_weights_if_that_fits_or_nothing_else_does(machine, request_for, caplog):
    caplog.set_level("INFO", "pantheraml")
    machine(4)
    with pytest.raises(StartsRanks):
        joining.join(request_for(), True, False)
    # Embedding and head are whole on every rank, and at one end of a split each.
    machine(4, gib=7.75)
    found = joining.join(request_for(model="8B"), True, False)
    assert found.device_map == "auto" and found.is_alone
    assert "neither the model nor a share of its weights fits on each GPU" in caplog.text
    for gib, config in ((7.75, BOTH), (4, True)):
        machine(4, gib=gib)
        with pytest.raises(StartsRanks):
            joining.join(request_for(model="8B"), config, False)


def test_8_bit_weights_are_split_or_every_rank_tries(machine, request_for):
    machine(4, gib=48)
    found = joining.join(request_for(flags=EIGHT), True, False)
    assert found.device_map == "auto" and found.is_alone
    for config in (BOTH, MultiGPUConfig(strategy="ddp")):
        with pytest.raises(StartsRanks):
            joining.join(request_for(flags=EIGHT), config, False)


@pytest.mark.parametrize("use_multi_gpu", [True, None, False])
@pytest.mark.parametrize("device_map", ["balanced", "sequential", {"model": 0, "lm_head": 1}])
def test_a_map_over_several_gpus_is_one_process(machine, request_for, device_map, use_multi_gpu):
    machine(4)
    found = joining.join(request_for(device_map), use_multi_gpu, False)
    assert found.device_map == device_map and found.is_alone


def test_one_gpu_needs_no_ranks(machine, request_for):
    machine(1)
    assert joining.join(request_for("balanced"), True, False).is_alone
    assert joining.join(request_for(), None, True).device_map == "auto"


@pytest.fixture
def shared(monkeypatch):
    """What weights were shared out for: whether all are trained, and between how many ranks."""
    asked = []
    monkeypatch.setattr(
        fsdp, "sharding_of", lambda config, trained: asked.append((trained, config.shard_size)) or "shares"
    )
    return asked


def test_ranks_share_out_what_none_of_them_holds(machine, request_for, shared, caplog):
    caplog.set_level("INFO", "pantheraml")
    machine(4, kind="torchrun", world_size=4)
    assert joining.join(request_for(), None, False).sharding == "shares"
    assert joining.join(request_for(model="8B", flags=FULL), None, False).sharding == "shares"
    assert shared == [(False, None), (True, None)]
    assert joining.join(request_for(model="8B"), None, False).sharding is None
    assert joining.join(request_for(model="8B"), MultiGPUConfig(strategy="fsdp"), False).sharding is None
    assert joining.join(request_for(), MultiGPUConfig(strategy="fsdp"), False).sharding == "shares"
    for config in (MultiGPUConfig(strategy="fsdp", shard_frozen=False), MultiGPUConfig(strategy="ddp")):
        assert joining.join(request_for(), config, False).sharding is None
    full = joining.join(request_for(model="8B", flags=FULL), MultiGPUConfig(strategy="fsdp"), False)
    assert full.sharding == "shares"
    first, _, copies = (record.getMessage() for record in caplog.records)
    assert first.splitlines()[0].endswith("for 4 x NVIDIA H200 (139.0 GiB each), rows of up to 2,048 tokens")
    plan, why, *_ = (line.split(maxsplit=1) for line in first.splitlines()[1:])
    assert plan == ["plan", "fsdp over 4, frozen weights sharded"]
    assert why[0] == "why" and "a copy on each GPU would need" in why[1]
    assert "ddp, a copy on each of 4" in copies and "runner-up  fsdp over 4, frozen weights sharded" in copies


def test_the_least_of_all_ranks_decides(machine, request_for, shared):
    machine(4, kind="torchrun", world_size=4, told=[139, 139, 12, 139])
    assert joining.join(request_for(model="8B"), None, False).sharding == "shares"


def test_each_machine_shares_out_a_copy_of_its_own(machine, request_for, shared):
    machine(8, kind="torchrun", world_size=16)
    joining.join(request_for(), None, False)
    assert shared == [(False, 8)]


def test_ranks_for_whom_nothing_fits_try_what_takes_the_least(machine, request_for, shared, caplog):
    machine(4, kind="torchrun", world_size=4, gib=4)
    assert joining.join(request_for(model="8B"), None, False).sharding == "shares"
    assert "by the plan nothing fits. Nothing fits on 4 x NVIDIA H200: the best layout needs" in caplog.text
    machine(4, kind="torchrun", world_size=4, gib=7.75)
    assert joining.join(request_for(model="8B"), None, False).sharding == "shares"
    assert "Write MultiGPUConfig(pipeline_parallel=" in caplog.text
    assert joining.join(request_for(flags=EIGHT), None, False).sharding is None


def test_architectures_that_nobody_knows_get_copies_and_a_word(
    machine, request_for, shared, tmp_path, caplog
):
    caplog.set_level("INFO", "pantheraml")
    GPT2Config().save_pretrained(tmp_path)
    machine(4, gib=1)
    with pytest.raises(StartsRanks):
        joining.join(request_for(model=str(tmp_path)), True, False)
    machine(4, gib=1, kind="torchrun", world_size=4)
    assert joining.join(request_for(model=str(tmp_path)), None, False).sharding is None
    assert "no plan: no family describes this architecture" in caplog.text


def decided(request, memory):
    """The decision of a rank with a GPU of ``memory[rank]`` GiB, and what it said."""
    rank, said = get_rank(), []
    automatic._mine = lambda _: automatic._Told("NVIDIA H200", memory[rank] * GIB, 2)
    automatic.say_once = said.append
    return automatic.layout_of_ranks(request), said


def test_ranks_that_talk_come_to_the_same(request_for):
    found = run_ranks(2, decided, request_for(model="8B"), (139, 14))
    assert found[0] == found[1]
    layout, (said,) = found[0]
    assert layout.strategy == "fsdp" and "2 x NVIDIA H200 (14.0 GiB each)" in said


def test_a_rank_keeps_to_its_gpu(machine, request_for):
    machine(4, kind="torchrun", world_size=4)
    assert not joining.join(request_for(model="8B"), True, False).is_alone
    assert not joining.join(request_for("auto", model="8B"), None, False).is_alone
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
