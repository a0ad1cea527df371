"""Limits and device maps that cannot be."""

from __future__ import annotations

from pantheraml.config.combinations import refusal
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.devices.device_map import place
from pantheraml.devices.map_names import read_device_map
from pantheraml.devices.memory_limits import read_limits
from pantheraml.devices.model_parts import ModelParts, PartSizes
from pantheraml.launch.environment import LaunchEnvironment
from pantheraml.launch.rank_gpus import check_ranks, num_ranks
from pantheraml.models.families.llama import LLAMA
from tests.errors.workshop import Workshop, case

GIB = 2**30
FREE = {0: 79 * GIB, 1: 79 * GIB}


def _place(limits: dict[int, int], kind: str = "auto", *, is_4bit: bool = False) -> None:
    """A model of 32 layers of 1 GiB that keeps 100 KiB a token and layer."""
    end = PartSizes(2 * GIB, 0, 1.0)
    layers = (PartSizes(GIB, GIB // 8, 1.0),) * 32
    parts = ModelParts(end, layers, end, False, 102400, 10240, lambda t: t << 16, lambda t: t << 17, is_4bit)
    place(kind, parts, limits, tokens=4096, micro_batches=8)


@case
def limit_of_a_missing_gpu(shop: Workshop) -> None:
    read_limits({0: "10GB", 4: "10GB"}, FREE)


@case
def limit_of_a_gpu_where_none_is(shop: Workshop) -> None:
    read_limits({0: "10GB"}, {})


@case
def limit_of_a_disk(shop: Workshop) -> None:
    read_limits({"disk": "10GB"}, FREE)


@case
def limit_without_a_unit(shop: Workshop) -> None:
    read_limits({0: "10"}, FREE)


@case
def limit_of_nothing(shop: Workshop) -> None:
    read_limits({0: "10GB", 1: 0}, FREE)


@case
def limits_of_one_gpu_twice(shop: Workshop) -> None:
    read_limits({0: "10GB", "cuda:0": "12GB"}, FREE)


@case
def limit_of_the_host_alone(shop: Workshop) -> None:
    read_limits({"cpu": "64GB"}, FREE)


@case
def limit_that_is_no_mapping(shop: Workshop) -> None:
    read_limits("10GB", FREE)


@case
def model_larger_than_all_gpus(shop: Workshop) -> None:
    _place({0: 16 * GIB, 1: 12 * GIB}, "balanced")


@case
def model_in_4_bits_larger_than_one_gpu(shop: Workshop) -> None:
    _place({0: 16 * GIB}, is_4bit=True)


@case
def placement_without_gpus(shop: Workshop) -> None:
    _place({})


@case
def device_map_with_an_unknown_name(shop: Workshop) -> None:
    read_device_map({"model": 0, "lm_haed": 1}, LLAMA, 4)


@case
def device_map_that_splits_a_layer(shop: Workshop) -> None:
    read_device_map({"": 0, "model.layers.2.mlp": 1}, LLAMA, 4)


@case
def device_map_of_too_many_layers(shop: Workshop) -> None:
    read_device_map({"": 0, "model.layers.4": 1}, LLAMA, 4)


@case
def device_map_without_some_layers(shop: Workshop) -> None:
    read_device_map({"model.embed_tokens": 0, "model.layers.0": 0, "lm_head": 1}, LLAMA, 4)


@case
def device_map_with_the_host(shop: Workshop) -> None:
    read_device_map({"model": 0, "lm_head": "cpu"}, LLAMA, 4)


@case
def device_map_that_goes_back(shop: Workshop) -> None:
    read_device_map({"": 0, "model.layers.1": 1}, LLAMA, 4)


@case
def device_map_that_parts_a_tied_head(shop: Workshop) -> None:
    read_device_map({"model": 0, "lm_head": 1}, LLAMA, 4, tied=True)


@case
def pipelines_that_leave_gpus_over(shop: Workshop) -> None:
    num_ranks(MultiGPUConfig(pipeline_parallel=3), 8)


@case
def pipeline_of_more_gpus_than_there_are(shop: Workshop) -> None:
    num_ranks(MultiGPUConfig(pipeline_parallel=4), 2)


@case
def pipeline_on_one_gpu(shop: Workshop) -> None:
    num_ranks(MultiGPUConfig(pipeline_parallel=True), 1)


@case
def more_ranks_than_pipelines(shop: Workshop) -> None:
    environment = LaunchEnvironment("torchrun", world_size=8, local_world_size=8)
    check_ranks(MultiGPUConfig(pipeline_parallel=2), environment, 8)


@case
def pipeline_of_a_classifier(shop: Workshop) -> None:
    raise refusal("pipeline", "num_labels", "A pipeline and num_labels=2 were asked for.")
