"""Memory of each GPU by component: against what was measured, and against what must hold for any model."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pantheraml.devices.estimate import Work, _zero_weights, estimate, even_stages
from pantheraml.devices.layout import Layout
from pantheraml.devices.optimizer_states import moment_bytes
from pantheraml.devices.peak_memory import (
    COMPONENTS,
    CONTEXT_BYTES,
    MemoryEstimate,
    Outliving,
    StepSizes,
    peak_memory,
)
from pantheraml.devices.stage_split import StageSizes
from pantheraml.devices.zero import BUCKET, Zero, zero_gathered, zero_states
from pantheraml.errors import ConfigError
from tests.devices.sizes import GIB, SHAPES, TINY, llama

H200 = 139.8 * GIB
METHODS = ("lora", "qlora", "fp8", "full")
ONE = Layout("none")


@pytest.mark.parametrize(
    ("method", "layout", "tokens", "recomputing", "measured"),
    [
        ("lora", ONE, 8192, 0, 39.73),
        ("lora", Layout("ddp", data=4), 8192, 0, 39.88),
        ("lora", ONE, 16384, 0, 64.0),
        ("qlora", ONE, 8192, 0, 30.2),
        ("qlora", ONE, 65536, 16, 120.8),
        ("fp8", ONE, 8192, 0, 39.7),
        ("lora", Layout("tensor", tensor=4), 8192, 0, 29.5),
    ],
)
def test_peaks_that_were_measured(method, layout, tokens, recomputing, measured):
    """The 8B shape on an H200; docs/performance.md and docs/multi-gpu.md."""
    work = Work(tokens, recomputing=(recomputing,), room=H200)
    (memory,) = estimate(llama(method=method), layout, work)
    assert memory.total / GIB == pytest.approx(measured, rel=0.025)
    assert memory.total < memory.reserved < 1.15 * memory.total + GIB


@pytest.mark.parametrize(
    ("method", "fused", "recomputing", "measured"),
    [
        ("lora", True, 0, 31.05),
        ("full", True, 0, 51.15),
        ("full", False, 0, 69.15),
        ("full", True, 32, 34.88),
    ],
)
def test_peaks_where_four_gpus_share_weights_out(method, fused, recomputing, measured):
    """The 8B shape on four H200s, 8,192 tokens on each; docs/planner.md."""
    parts = llama(method=method)
    parts = replace(parts, activations=replace(parts.activations, is_fused=fused))
    layout = Layout("fsdp", data=4, shard=4, shard_frozen=True)
    (memory,) = estimate(parts, layout, Work(8192, recomputing=(recomputing,)))
    assert memory.total / GIB == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize(
    ("method", "layers", "tokens", "recomputing", "measured"),
    [
        ("lora", 6, 8192, 0, 10432472064),
        ("lora", 6, 16384, 6, 8533256192),
        ("qlora", 6, 8192, 0, 8918559232),
        ("qlora", 6, 16384, 6, 6949430784),
        ("fp8", 6, 8192, 0, 10400228864),
        ("full", 6, 16384, 0, 55913462784),
    ],
)
def test_peaks_of_the_grid(method, layers, tokens, recomputing, measured):
    """Layers of the 8B shape on an H200: ``benchmarks.plan_grid``, docs/planner.md."""
    shape = (4096, 14336, layers, 32, 8, 128256)
    (memory,) = estimate(llama(shape, method), ONE, Work(tokens, recomputing=(recomputing,), room=H200))
    assert memory.total == pytest.approx(measured, rel=0.01)


def some_cases(count=60):
    rng = random.Random(0)
    for _ in range(count):
        method, gpus = rng.choice(METHODS), rng.choice([2, 4, 8])
        parts = llama((256, 512, 8, 8, 8, 1000), method)
        layouts = [
            ONE,
            Layout("ddp", data=gpus),
            Layout("tensor", tensor=gpus),
            Layout("pipeline", pipeline=gpus),
        ]
        layouts += [Layout("fsdp", data=gpus, shard=gpus, shard_frozen=rng.random() < 0.5)]
        layouts += [Layout("deepspeed", data=gpus, shard=gpus, zero_stage=rng.choice([1, 2, 3]))]
        again = rng.randrange(0, 9)
        work = Work(
            rng.randrange(1, 4000),
            rng.choice([1, 2, 8]),
            (again,),
            rng.choice(["adamw", "sgd", "adamw_8bit"]),
        )
        yield parts, rng.choice(layouts), work


def peak(parts, layout, work):
    return max(one.total for one in estimate(parts, layout, work))


def test_components_sum_to_the_total():
    for parts, layout, work in some_cases():
        memories = estimate(parts, layout, work)
        assert len(memories) == layout.pipeline
        for one in memories:
            assert sum(one.parts().values()) == one.reserved == one.total + one.slack + one.driver
            assert all(size > 0 for size in one.parts().values()) and set(one.parts()) <= set(COMPONENTS)


def test_more_tokens_never_take_less_and_recompute_never_more_in_the_end():
    for parts, layout, work in some_cases():
        sizes = [peak(parts, layout, replace(work, tokens=tokens)) for tokens in (1, 100, 101, 5000)]
        assert sizes == sorted(sizes)
        whole = replace(work, tokens=30_000, recomputing=(0,))
        least = replace(whole, recomputing=(len(parts.layers),))
        assert peak(parts, layout, least) < peak(parts, layout, whole)


def test_ddp_is_one_gpu_and_its_buckets():
    for method in METHODS:
        parts, work = llama(TINY, method), Work(4000)
        gradients = 4 * sum(part.trainable for part in parts.all)
        one, copy, accumulated, both = (
            estimate(parts, layout, replace(work, micro_batches=count))[0]
            for count in (1, 2)
            for layout in (ONE, Layout("ddp", data=4))
        )
        for other, times in ((copy, 1), (accumulated, 1), (both, 2)):
            assert replace(other, gradients=one.gradients, driver=one.driver) == one
            assert other.gradients - one.gradients == times * gradients


def test_where_gradients_are_before_a_backward_and_when_layers_are_done():
    fresh, sums, buckets, both = (Outliving(*ends) for ends in ((), (False, True), (True,), (True, True)))
    assert [each.before for each in (fresh, sums, buckets, both)] == [0, 1, 1, 2]
    assert [each.after for each in (fresh, sums, buckets, both)] == [1, 1, 1, 2]
    assert [each.is_beside for each in (fresh, sums, buckets, both)] == [False, True, True, True]
    late = Outliving(buckets=True, late=True)
    assert (late.before, late.after, late.is_beside) == (1, 2, False)


@pytest.mark.parametrize("shard", [2, 4, 8])
def test_sharding_divides_what_is_trained(shard):
    for method in METHODS:
        parts = llama(TINY, method)
        work = Work(64, micro_batches=2)
        one = estimate(parts, ONE, work)[0]
        layout = Layout("fsdp", data=shard, shard=shard, shard_frozen=True)
        sharded = estimate(parts, layout, work)[0]
        for name in ("trainable", "optimizer", "gradients"):
            # An adapter is whole on every rank, and its gradients are in a bucket, too.
            by = shard if parts.full_finetuning else 0.5 if name == "gradients" else 1
            assert getattr(sharded, name) == pytest.approx(getattr(one, name) / by, abs=4 * 3)
        replicated = estimate(parts, replace(layout, shard_frozen=False), work)[0]
        if method != "full":
            assert sharded.weights < replicated.weights
        assert (sharded.gathered > 0) == (sharded.moment != "the optimizer's step")
        # HSDP: as many copies as there are groups, each sharded as before.
        copies = estimate(parts, replace(layout, data=2 * shard), work)[0]
        assert replace(copies, driver=0, slack=0) == replace(sharded, driver=0, slack=0)


def test_zero_divides_what_its_stage_says():
    """Of each number 4 bytes of weights, of gradients and, at stages 1 and 2, of masters; 8 of moments."""
    parts = llama(SHAPES["8B"], "full")
    numbers = sum(part.trainable for part in parts.all)
    shares = {0: (4, 4, 8), 1: (4, 4, 12 / 8), 2: (4, 4 / 8, 12 / 8), 3: (4 / 8, 4 / 8, 8 / 8)}
    for stage, (weights, gradients, optimizer) in shares.items():
        layout = Layout("deepspeed", data=8, shard=8, zero_stage=stage, shard_frozen=stage == 3)
        found = zero_states(Zero(stage, 8, BUCKET), numbers, "adamw_torch")
        assert found == pytest.approx([size * numbers for size in (weights, gradients, optimizer)], rel=1e-6)
        memory = estimate(parts, layout, Work(128, recomputing=(32,)))[0]
        assert (memory.trainable, memory.optimizer) == (found[0], found[2])
        offloaded = estimate(parts, replace(layout, offload=True), Work(128))[0]
        assert offloaded.optimizer == 0
        whole = zero_gathered(Zero(stage, 8, BUCKET, offload=True), _zero_weights(parts), 0)
        assert (whole.step == 0) == (stage < 2)
    # Rajbhandari et al. 2020: 2 + 2 + 12.
    found = zero_states(Zero(2, 8, BUCKET, size=2), numbers, "adamw_torch")
    assert found == pytest.approx((2 * numbers, 2 * numbers / 8, 12 * numbers / 8), rel=1e-6)


def test_shards_in_host_memory_leave_what_is_gathered():
    layout = Layout("fsdp", data=8, shard=8, shard_frozen=True, offload=True)
    for method in ("lora", "full"):
        memory = estimate(llama(method=method), layout, Work(128, recomputing=(32,)))[0]
        assert memory.trainable == memory.gradients == memory.optimizer == 0 < memory.gathered
        assert memory.weights < 0.05 * 16 * GIB


def test_gradients_are_not_there_before_the_backward():
    parts = llama()
    alone = estimate(parts, ONE, Work(8192))[0]
    assert alone.gradients == 0 and alone.moment == "head and loss"
    full = estimate(llama(method="full"), ONE, Work(64, recomputing=(32,)))[0]
    assert full.gradients == full.trainable > 0 and "first layer" in full.moment


def test_trained_layers_are_fused_where_they_are_gathered_in_what_they_compute_in():
    """FSDP2 gathers masters in 16 bits; autocast copies them, beside a residual stream in float32."""
    parts, work = llama(method="full"), Work(8192)
    off = replace(parts, activations=replace(parts.activations, is_fused=False))
    shared = Layout("fsdp", data=4, shard=4, shard_frozen=True)
    for layout, fused in (
        (shared, True),
        (ONE, False),
        (Layout("deepspeed", data=4, shard=4, zero_stage=2), False),
    ):
        one, other = (estimate(each, layout, work)[0] for each in (parts, off))
        assert (one.activations < other.activations) == fused
        assert fused or one == other
    memory = estimate(parts, shared, work)[0]
    assert memory.moment == "head and loss" and memory.activations == 32 * 8192 * (92 * 1024 + 128)


def test_masters_are_copied_for_the_pass():
    """16-bit copies of the layers' weights lie beside masters until they have been used."""
    parts = llama(method="full")
    casts = 2 * sum(layer.numbers for layer in parts.layers)
    memory = estimate(parts, ONE, Work(65536))[0]
    assert memory.buffers == casts
    layout = Layout("fsdp", data=8, shard=8, shard_frozen=True)
    assert estimate(parts, layout, Work(65536))[0].buffers == 0, "what is gathered is in 16 bits"


def test_copies_of_layers_that_recompute_are_there_until_the_forward_is_over():
    """With a small vocabulary that is more than the gradient of the head, which comes later."""
    for vocabulary, comes_first in ((128256, False), (2000, True)):
        parts = llama((4096, 14336, 4, 32, 8, vocabulary), "full")
        copies = 2 * sum(layer.numbers for layer in parts.layers)
        for again, left in ((4, 0), (3, copies // 4)):
            (memory,) = estimate(parts, Layout("ddp", data=2), Work(512, recomputing=(again,)))
            assert memory.moment == "head and loss"
            assert memory.buffers == (copies if comes_first else left)


def test_twins_of_fp8_weights_are_kept_where_they_are_small():
    parts = llama(SHAPES["70B"], "fp8")
    little, much = (estimate(parts, ONE, Work(64, room=room))[0].weights for room in (H200, 8 * H200))
    numbers = sum(layer.numbers for layer in parts.layers)
    assert much - little == pytest.approx(numbers, rel=0.01)


def test_a_pipeline_has_every_part_once_and_as_much_in_flight_as_the_split_planner_says():
    for method in ("lora", "qlora"):
        parts = llama(method=method)
        for count in (2, 3, 8):
            stages = even_stages(parts, count)
            assert sum((stage.layers for stage in stages), ()) == parts.layers
            assert sum(len(stage.ends) for stage in stages) == 2
            times = [len(stage.layers) + parts.head.time * stage.has_head for stage in stages]
            assert max(times) < sum(times) / count + 1.5
            found = estimate(parts, Layout("pipeline", pipeline=count), Work(2048, 16))
            split, start = StageSizes(parts, 2048, 16), 0
            for stage, memory in zip(stages, found, strict=True):
                stop = start + len(stage.layers)
                planned = split.stage(start, stop, stage.later, float("inf"))
                assert memory.reserved - memory.workspace - memory.driver + CONTEXT_BYTES == planned.need
                start = stop


def test_tensor_parallel_cuts_heads_and_mlp_but_not_the_residual_stream():
    parts = llama()
    two, four = (estimate(parts, Layout("tensor", tensor=degree), Work(8192))[0] for degree in (2, 4))
    ends = parts.embedding.weights + parts.head.weights  # whole on every rank
    assert (two.weights - ends) / 2 + ends == pytest.approx(four.weights, rel=1e-3)
    assert two.activations / 2 < four.activations < 0.8 * two.activations


def test_layers_that_a_strategy_does_not_fuse_keep_what_stock_layers_do():
    stock = replace(llama().activations, is_fused=False)
    kept = 32 * 8192 * stock.split(2).kept.all
    assert estimate(llama(), Layout("tensor", tensor=2), Work(8192))[0].activations == kept
    gathered = Layout("fsdp", data=2, shard=2, shard_frozen=True)
    fused = 32 * 8192 * llama().activations.kept.all
    found = [estimate(llama(method=one), gathered, Work(8192))[0].activations for one in ("lora", "fp8")]
    assert found == [fused, fused]


def test_the_fullest_moment_counts():
    step = StepSizes(
        weights=10, buffers=0, trainable=1, gradients=100, optimizer=2, outliving=Outliving(), kept=50, kept_first=5,
        passing=7, passing_first=7, logits=9, workspace=0, driver=0,
    )  # fmt: skip
    assert peak_memory(step).moment == "the backward of the first layer"
    assert peak_memory(replace(step, gradients=1)).moment == "head and loss"
    assert peak_memory(replace(step, gradients=1, passing=10)).moment == "the last layer"
    assert (
        peak_memory(replace(step, gradients=900, kept=0, kept_first=0, passing=0, passing_first=0)).total
        == 913
    )
    assert peak_memory(replace(step, kept=1000)).slack == (1000 + 9) // 10


def test_optimizers_by_name():
    sizes = {
        name: moment_bytes(name, 4)
        for name in ("adamw_torch", "paged_adamw_8bit", "sgd", "lion_32bit", "rmsprop")
    }
    assert list(sizes.values()) == [8, 2, 0, 4, 4]
    assert moment_bytes("adamw_torch_fused", 2) == 4


@pytest.mark.parametrize("degrees", [dict(data=0), dict(data=4, shard=3), dict(pipeline=-1)])
def test_degrees_that_cannot_be(degrees):
    with pytest.raises(ConfigError):
        Layout("fsdp", **degrees)


def test_more_stages_than_layers_and_parts_without_widths():
    with pytest.raises(ConfigError, match="stages was asked for a model of 4 layers"):
        estimate(llama(TINY), Layout("pipeline", pipeline=5), Work(8))
    with pytest.raises(ConfigError, match="how wide"):
        estimate(replace(llama(TINY), activations=None), ONE, Work(8))
    assert MemoryEstimate(1, 2, 3, 4).parts() == dict(weights=1, gradients=2, optimizer=3, activations=4)
