"""The plan: never above its limit, the best by its own rules, and errors that help."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pantheraml.devices.estimate import Work, estimate
from pantheraml.devices.known_gpus import gpu_of, known_gpu, read_gpus
from pantheraml.devices.layout import Layout
from pantheraml.devices.plan import USABLE, PlanRequest, choose_plan, layouts
from pantheraml.devices.step_time import step_time
from pantheraml.errors import ConfigError
from tests.devices.sizes import GIB, SHAPES, TINY, llama

METHODS = ("lora", "qlora", "fp8", "full")


def request(method="lora", gpus="8xH200", seq=4096, shape="8B", **more):
    return PlanRequest(llama(SHAPES[shape], method), read_gpus(gpus), seq, **more)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_chosen_plan_never_exceeds_the_limit(count, shape):
    """On GPUs of three sizes; where nothing is chosen, nothing fits even at its least."""
    chosen = 0
    for method, gpu, seq in itertools.product(METHODS, ("H200", "80GB", "24GB"), (1024, 8192)):
        if method == "fp8" and gpu == "24GB":
            continue
        asked = request(method, f"{count}x{gpu}", seq, shape)
        limit = USABLE * asked.gpus[0].memory
        try:
            choice = choose_plan(asked)
        except ConfigError:
            assert all(least_of(asked, layout) > limit for layout in layouts(asked))
            continue
        chosen += 1
        plan = choice.plan
        assert plan.layout.gpus == count and plan.memory == estimate(asked.parts, plan.layout, plan.work)
        assert max(one.reserved for one in plan.memory) <= limit == choice.limit
        assert plan.rows * asked.seq == plan.work.tokens
        assert plan.rows * plan.work.micro_batches * plan.layout.data >= asked.rows_each * count
        if choice.runner_up is not None:
            assert choice.runner_up.layout != plan.layout
            assert choice.runner_up.fullest.reserved <= limit
    assert chosen >= (4 if shape == "70B" and count == 1 else 6)


def least_of(asked, layout):
    layers = len(asked.parts.layers)
    passes = asked.rows_each * layout.gpus // layout.data
    work = Work(asked.seq, passes, (layers,), asked.optim, USABLE * asked.gpus[0].memory)
    return max(one.reserved for one in estimate(asked.parts, layout, work))


def test_the_precedence():
    """A copy on each GPU where one trains the whole model; else FSDP2; a split only where it is asked for."""
    strategies = {
        (method, shape, gpus): choose_plan(request(method, gpus, shape=shape)).plan.layout.strategy
        for method, shape, gpus in [
            ("lora", "8B", "1xH200"), ("lora", "8B", "8xH200"), ("full", "8B", "8x80GB"), ("lora", "70B", "8xH200"),
            ("qlora", "70B", "8xH200"), ("lora", "32B", "4x80GB"),
        ]
    }  # fmt: skip
    assert list(strategies.values()) == ["none", "ddp", "fsdp", "fsdp", "ddp", "fsdp"]
    choice = choose_plan(request("lora", "8xH200", shape="70B"))
    assert choice.plan.layout.shard_frozen and "a copy on each GPU would need" in choice.reason
    assert Layout("ddp", data=8) in choice.others
    # Where layers cannot be gathered, a split is what is left.
    only = replace(request("lora", "4xH200", shape="70B"), allowed=("none", "ddp", "pipeline"))
    assert choose_plan(only).plan.layout.strategy == "pipeline"
    asked = choose_plan(request("lora", "4xH200", strategy="tensor"))
    assert asked.plan.layout.strategy == "tensor" and "was asked for" in asked.reason


def test_adapters_leave_frozen_weights_where_they_are_if_they_fit():
    found = choose_plan(request("lora", "8xH200", strategy="fsdp")).plan.layout
    assert not found.shard_frozen
    assert choose_plan(request("lora", "8xH200", shape="70B", strategy="fsdp")).plan.layout.shard_frozen


@pytest.mark.parametrize("gpus", ["2x24GB", "4x24GB", "2x80GB"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_best_of_a_strategy_is_the_best_there_is(method, gpus):
    """Every layout, number of rows and number of layers that recompute, one by one."""
    parts = llama((2048, 8192, 8, 16, 4, 32000), method)
    for strategy in ("ddp", "fsdp", "tensor", "pipeline"):
        asked = PlanRequest(parts, read_gpus(gpus), 512, rows=8, strategy=strategy)
        best = 0.0
        for layout, rows in itertools.product(layouts(asked), (1, 2, 4, 8)):
            per_stage = itertools.product(range(9 // layout.pipeline + 2), repeat=layout.pipeline)
            for again in per_stage if layout.pipeline <= 2 else ():
                passes = -(-8 * layout.gpus // layout.data // rows)
                work = Work(512 * rows, passes, again, asked.optim, asked.limit)
                if max(one.reserved for one in estimate(parts, layout, work)) <= asked.limit:
                    best = max(best, step_time(parts, layout, work, 512, asked.gpus[0]).tokens_per_second)
        if best == 0.0:
            continue
        speed = choose_plan(asked).plan.time.tokens_per_second
        assert speed == pytest.approx(best) if gpus[0] == "2" else speed >= 0.999 * best


def test_as_few_layers_recompute_as_memory_asks_for():
    asked = request("lora", "1xA100", seq=24576, rows=1)
    plan = choose_plan(asked).plan
    (again,) = plan.work.recomputing
    assert 0 < again < 32
    fewer = replace(plan.work, recomputing=(again - 1,))
    assert estimate(asked.parts, plan.layout, fewer)[0].reserved > asked.limit
    every = choose_plan(replace(asked, recompute=True)).plan
    assert every.work.recomputing == (32,) and every.time.seconds > plan.time.seconds
    with pytest.raises(ConfigError, match="use_gradient_checkpointing='auto'"):
        choose_plan(replace(asked, recompute=False))


def test_nothing_fits_and_what_would_help():
    asked = request("lora", "1xH200", shape="70B")
    with pytest.raises(ConfigError) as raised:
        choose_plan(asked, {"--method qlora": lambda: llama(SHAPES["70B"], "qlora")})
    text = str(raised.value)
    assert "the best layout needs 1" in raised.value.got and "132.8 may be taken" in raised.value.got
    assert text.count(" saves ") == 3 and "--method qlora saves " in text and "2 GPUs saves" in text
    assert "which is enough" in text.split("--method qlora")[1]
    saved = float(text.split("rows of 2,048 tokens saves ")[1].split(maxsplit=1)[0])
    half = replace(asked, seq=2048)
    difference = least_of(asked, Layout("none")) - least_of(half, Layout("none"))
    assert saved == pytest.approx(difference / GIB, abs=0.1)


def test_host_memory_is_used_where_it_is_allowed_and_nothing_else_fits():
    asked = request("full", "4x80GB", shape="70B")
    with pytest.raises(
        ConfigError, match=r"--offload; shards in host memory, slow. saves .* which is enough"
    ):
        choose_plan(asked)
    plan = choose_plan(replace(asked, offload=True)).plan
    assert plan.layout.offload and plan.layout.strategy == "fsdp" and plan.fullest.optimizer == 0
    assert not choose_plan(replace(request("full", "8x80GB"), offload=True)).plan.layout.offload
    zero = replace(asked, strategy="deepspeed", offload=True)
    assert {layout.zero_stage for layout in layouts(zero)} == {1, 2, 3} and len([*layouts(zero)]) == 6


def test_degrees_divide_heads_and_kv_heads():
    parts = llama((1536, 4096, 12, 12, 2, 1000))
    degrees = {
        layout.tensor for layout in layouts(PlanRequest(parts, read_gpus("8xH100"), 128, strategy="tensor"))
    }
    assert degrees == {2}
    with pytest.raises(ConfigError, match=r"12 heads and 2 kv heads .* \(here: none\)"):
        choose_plan(PlanRequest(parts, read_gpus("3xH100"), 128, strategy="tensor"))
    with pytest.raises(ConfigError, match="tensor"):
        choose_plan(request("qlora", "2xH100", strategy="tensor"))


def test_a_split_saves_time_only_by_what_it_must():
    parts, gpu = llama(), known_gpu("H200")
    one = step_time(parts, Layout("none"), Work(8192), 2048, gpu)
    assert one.tokens_per_second == pytest.approx(17_892, rel=0.1), "measured"
    assert one.communication == one.waiting == 0
    copies = step_time(parts, Layout("ddp", data=8), Work(8192), 2048, gpu)
    assert 0.97 < copies.tokens_per_second / (8 * one.tokens_per_second) < 1
    few, many = (step_time(parts, Layout("pipeline", pipeline=4), Work(2048, n), 2048, gpu) for n in (4, 64))
    assert few.waiting / few.compute == pytest.approx(3 / 4) and many.waiting / many.compute < 0.05
    slow = replace(gpu, link_gb_s=1.0)
    fsdp = Layout("fsdp", data=8, shard=8, shard_frozen=True)
    assert step_time(parts, fsdp, Work(8192), 2048, slow).communication > 10
    again = step_time(parts, Layout("none"), Work(8192, recomputing=(32,)), 2048, gpu)
    assert 1.25 < again.compute / one.compute < 1.4, "1.31 measured"


@pytest.mark.parametrize(
    ("text", "count", "name", "gib"),
    [
        ("8xH200", 8, "H200", 139.8),
        ("h100", 1, "H100", 79.1),
        ("2 x A100-80GB", 2, "A100", 79.1),
        ("4x80GB", 4, "80GB", 74.5),
        ("2*24GiB", 2, "24GiB", 24.0),
        ("16xrtx4090", 16, "RTX 4090", 23.5),
    ],
)
def test_gpus_as_people_write_them(text, count, name, gib):
    found = read_gpus(text)
    assert len(found) == count and found[0].name == name
    assert found[0].memory / GIB == pytest.approx(gib, abs=0.06)


@pytest.mark.parametrize("text", ["", "8x", "0xH200", "8xH201", "many", "2x100MB", "x H200"])
def test_gpus_that_mean_nothing(text):
    with pytest.raises(ConfigError, match="8xH200"):
        read_gpus(text)


def test_gpus_that_are_there():
    assert known_gpu("NVIDIA H100 PCIe").name == "H100 PCIe"
    assert known_gpu("NVIDIA H100 80GB HBM3").name == "H100"
    assert known_gpu("Some GPU") is None
    unknown = gpu_of("Some GPU", 48 * GIB)
    assert (unknown.name, unknown.memory, unknown.has_fp8) == ("Some GPU", 48 * GIB, True)
    with pytest.raises(ConfigError, match="FP8 weights were asked for on A100"):
        choose_plan(request("fp8", "2xA100"))


@pytest.mark.parametrize(
    "wrong", [dict(gpus=()), dict(seq=0), dict(rows=0), dict(strategy="magic"), dict(strategy="none")]
)
def test_requests_that_cannot_be(wrong):
    with pytest.raises(ConfigError):
        choose_plan(replace(PlanRequest(llama(TINY), read_gpus("2xT4"), 64), **wrong))


def test_planning_needs_no_torch():
    program = (
        "import sys, json\n"
        "from pantheraml.devices.plan import PlanRequest, choose_plan\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'numpy'} & {*sys.modules})))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, check=True, stdout=subprocess.PIPE, text=True
    )
    assert json.loads(done.stdout) == []
