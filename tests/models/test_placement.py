"""Where models go: what is decided from sizes and limits; here GPUs are numbers that the planner is told."""

from __future__ import annotations

from dataclasses import replace

import accelerate
import pytest
import torch

from pantheraml.devices import inventory
from pantheraml.errors import ConfigError
from pantheraml.models import placement
from pantheraml.models.families import find_family
from pantheraml.models.placement import (
    PipelineDevices,
    Unplaced,
    find_place,
    names_several,
)
from pantheraml.models.precision import Precision
from pantheraml.models.split import Split, carry_between, drop_hooks
from tests import tiny

GIB = 2**30
GPU = [torch.device("cuda", index) for index in range(4)]


def llama_8b(**changes):
    from transformers import LlamaConfig

    settings = dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return LlamaConfig(**settings | changes)


def unplaced(config=None, **changes):
    settings = dict(
        precision=Precision("plain", torch.bfloat16), full_finetuning=False, tokens=2048, fused=True
    )
    return Unplaced(config or llama_8b(), **settings | changes)


@pytest.fixture
def machine(monkeypatch):
    """``machine(24, 24)``: GPUs with so many GiB free."""

    def has(*free):
        monkeypatch.setattr(inventory, "num_gpus", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(placement, "visible_memory", lambda: {i: f * GIB for i, f in enumerate(free)})

    return has


@pytest.mark.parametrize(
    ("device_map", "gpus", "several"),
    [
        (None, 4, False), ("auto", 4, False), ("cuda:1", 4, False), (0, 4, False), ({"": 0}, 4, False),
        ("balanced", 4, True), ("sequential", 2, True), ("balanced", 1, False), ("sequential", 0, False),
        ({"model": 0, "lm_head": 1}, 0, True),
    ],
)  # fmt: skip
def test_which_maps_name_several_devices(device_map, gpus, several):
    assert names_several(device_map, gpus) is several


@pytest.mark.parametrize("device_map", [None, "auto", "cuda:0", 0, {"": 0}])
def test_what_fits_goes_to_one_gpu(machine, device_map):
    machine(80, 80)
    place = find_place(unplaced(), device_map, None, is_alone=True)
    assert (place.device, place.device_map, place.split) == (GPU[0], {"": "cuda:0"}, None)
    assert not place.limits


@pytest.mark.promise("A6")
def test_auto_splits_what_does_not_fit(machine, caplog):
    machine(14, 14)
    caplog.set_level("INFO", "pantheraml")
    place = find_place(unplaced(), "auto", None, is_alone=True)
    assert place.split is not None and place.split.devices == (GPU[0], GPU[1])
    assert place.device_map["model.embed_tokens"] == 0 and place.device_map["lm_head"] == 1
    assert "device_map='auto'" in caplog.text and "0-" in caplog.text


@pytest.mark.promise("A6")
def test_balanced_uses_every_gpu(machine):
    machine(140, 140, 140, 140)
    place = find_place(unplaced(), "balanced", None, is_alone=True)
    sizes = [stage.stop - stage.first for stage in place.split.stages]
    # Two runs of layers on each, and the head takes the time of 2.5 layers.
    assert [stage.device for stage in place.split.stages] == GPU + GPU and place.split.rounds == 2
    on_each = [one + other for one, other in zip(sizes[:4], sizes[4:], strict=True)]
    assert sum(on_each) == 32 and max(on_each) == 9 and on_each[-1] == min(on_each) == 6
    assert place.split.head == GPU[3] and place.split.embedding == GPU[0]


@pytest.mark.promise("A6")
def test_sequential_fills_the_first(machine):
    machine(13, 40)
    stages = find_place(unplaced(), "sequential", None, is_alone=True).split.stages
    assert [stage.device for stage in stages] == GPU[:2] and stages[0].stop == 13


@pytest.mark.promise("A2")
def test_limits_are_kept_and_handed_on(machine):
    machine(140, 140)
    place = find_place(unplaced(), "balanced", {0: "10GiB", 1: "30GiB", "cpu": "99GB"}, is_alone=True)
    assert place.split.rounds == 1, "in two rounds each would hold more"
    first, second = place.split.stages
    assert first.stop - first.first < second.stop - second.first
    assert place.limits == {0: 10 * GIB, 1: 30 * GIB}
    one = find_place(unplaced(), None, {0: "40GiB"}, is_alone=True)
    assert one.device_map == {"": "cuda:0"} and one.limits == {0: 40 * GIB}


def test_a_tied_head_takes_the_embedding_along(machine):
    machine(140, 140)
    config = llama_8b(tie_word_embeddings=True)
    split = find_place(unplaced(config), "balanced", None, is_alone=True).split
    assert (split.embedding, split.head) == (GPU[1], GPU[1])


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_a_rank_has_one_gpu(machine, device_map):
    machine(14, 14)
    assert find_place(unplaced(), device_map, None, is_alone=False).split is None


def test_a_map_that_was_written_is_followed(machine):
    machine(140, 140)
    mapping = {"model": 0, "lm_head": 1, **{f"model.layers.{i}": 1 for i in range(20, 32)}}
    split = find_place(unplaced(), mapping, None, is_alone=True).split
    assert split == Split.of_layers([GPU[0]] * 20 + [GPU[1]] * 12, GPU[0], GPU[1])


@pytest.mark.promise("A6")
@pytest.mark.parametrize(
    ("device_map", "max_memory", "words"),
    [
        ("balanced_low_0", None, "every GPU has a share of the layers"),
        (None, {1: "20GB"}, "max_memory does not name cuda:0, where the model goes"),
        (None, {0: "5GB"}, "The model does not fit"),
        ("balanced", {0: "5GB", 1: "5GB"}, "The model does not fit"),
        ({"model": 0, "lm_head": 1}, {0: "60GB"}, "device_map uses GPU 1, which max_memory"),
        ({"model": 0, "lm_head": "cpu"}, None, "'lm_head' on 'cpu'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(machine, device_map, max_memory, words):
    machine(140, 140)
    with pytest.raises(ConfigError, match=words):
        find_place(unplaced(), device_map, max_memory, is_alone=True)


@pytest.mark.promise("A7")
def test_what_ranks_share_need_not_fit_on_one_of_them(machine):
    machine(140, 140)
    shared = replace(unplaced(), is_shared=True)
    assert find_place(shared, None, {0: "5GB"}, is_alone=False).limits == {0: 5 * 10**9}


def test_architectures_without_a_family_are_placed_by_transformers(machine):
    from transformers import GPT2Config

    machine(140, 140)
    place = find_place(unplaced(GPT2Config()), "balanced", {0: "1GB", 1: "1GB"}, is_alone=True)
    assert place.device_map == "balanced" and place.split is None and place.limits == {0: 10**9, 1: 10**9}


def test_hooks_of_another_library_leave_nothing_behind():
    model = tiny.build_model("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    ids = torch.arange(5, 25)[None]
    want = model(ids).logits
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert any("forward" in vars(module) for module in model.modules())
    drop_hooks(model)
    after = {name: set(vars(module)) for name, module in model.named_modules()}
    after[""] -= {"hf_device_map"}
    assert after == before
    cpu = torch.device("cpu")
    carry_between(model, find_family(model.config), Split.of_layers([cpu, cpu], cpu, cpu))
    assert torch.equal(model(ids).logits, want)


def test_a_pipeline_is_split_over_its_own_gpus_even_where_one_would_do(machine):
    machine(80, 80, 80, 80)
    own = PipelineDevices((GPU[2], GPU[3]), (80 * GIB, 80 * GIB))
    place = find_place(unplaced(), None, None, is_alone=False, pipeline=own)
    assert place.split is not None and set(place.split.devices) == {GPU[2], GPU[3]}
    assert place.device == GPU[2] and not place.limits
    limited = find_place(unplaced(), None, {2: "80GB", 3: "80GB"}, is_alone=False, pipeline=own)
    assert limited.limits == {2: 80 * GIB, 3: 80 * GIB}
    with pytest.raises(ConfigError, match="The model does not fit"):
        find_place(unplaced(), None, None, is_alone=False, pipeline=PipelineDevices(own.devices, (GIB, GIB)))


def test_without_gpus_the_stages_of_a_pipeline_share_the_cpu():
    cpu = torch.device("cpu")
    place = find_place(unplaced(), None, None, is_alone=True, pipeline=PipelineDevices((cpu,) * 3))
    assert place.split is not None and place.device_map == {"": "cpu"}
    assert [(stage.first, stage.stop) for stage in place.split.stages] == [(0, 10), (10, 21), (21, 32)]
    assert (place.split.num_gpus, place.split.rounds) == (3, 1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (dict(num_hidden_layers=3), r"has 3 layers(.|\n)*pipeline_parallel=3"),
        (dict(num_hidden_layers=1), "every GPU can have a copy"),
        (None, "no family describes"),
    ],
)
def test_models_that_make_no_pipeline(config, says):
    from transformers import GPT2Config

    model = unplaced(GPT2Config() if config is None else llama_8b(**config))
    with pytest.raises(ConfigError, match=says):
        find_place(model, None, None, is_alone=True, pipeline=PipelineDevices((torch.device("cpu"),) * 4))
