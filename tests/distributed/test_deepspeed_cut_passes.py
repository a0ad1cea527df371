"""A step that runs out of memory where DeepSpeed cuts gradients, or gathers weights, in every pass of all ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pantheraml.distributed.strategies.launched_exchanges import LaunchedExchanges
from pantheraml.distributed.strategies.zero_settings import cuts_plainly
from pantheraml.errors import HardwareError
from tests import tiny
from tests.distributed import test_deepspeed
from tests.distributed.ranks import run_ranks
from tests.distributed.starved_runs import IN_A_LAYER, IN_ITS_BACKWARD
from tests.distributed.test_deepspeed import zero
from tests.distributed.test_deepspeed_memory import AUTO
from tests.distributed.test_deepspeed_out_of_memory import (
    APART,
    EVALUATED,
    FULL,
    LORA,
    RECOMPUTES,
    assert_all,
    train_all,
)

pytestmark = test_deepspeed.pytestmark
nothing_is_compiled = test_deepspeed.nothing_is_compiled

EVALUATED = EVALUATED | dict(per_device_eval_batch_size=1)


def cut(stage, **settings):
    """Settings of DeepSpeed's own: a layer has several buckets of gradients."""
    sharding = {"stage": stage, "reduce_bucket_size": 3000} | settings
    return dict(deepspeed=AUTO | {"zero_optimization": sharding, "zero_force_ds_cpu_optimizer": False})


# A few weights ahead, and few that stay: at stage 3 a small model is whole otherwise.
NARROW = cut(
    3,
    stage3_prefetch_bucket_size=20_000,
    stage3_max_live_parameters=30_000,
    stage3_max_reuse_distance=10_000,
    stage3_param_persistence_threshold=1000,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)


@pytest.mark.parametrize(
    ("way", "runs"),
    [
        (FULL, [
            (zero(2), {1: IN_A_LAYER}, cut(2)),
            (zero(3), {0: IN_ITS_BACKWARD}, {}),
            (zero(3), APART, NARROW),
        ]),
        (LORA, [(zero(3), {0: IN_ITS_BACKWARD, 1: IN_A_LAYER}, {})]),
        *(pytest.param(*slow, marks=pytest.mark.slow) for slow in [
            (FULL, [
                (zero(2), APART, cut(2, overlap_comm=True)),
                (zero(2), {0: IN_ITS_BACKWARD}, cut(2, offload_optimizer=dict(device="cpu"))),
                (zero(2), RECOMPUTES, cut(2)),
                (zero(1), {0: IN_ITS_BACKWARD, 1: IN_A_LAYER}, cut(1, overlap_comm=True)),
            ]),
            (FULL, [
                (zero(3), {}, EVALUATED),
                (zero(3), {1: IN_A_LAYER}, EVALUATED),
                (zero(3, cpu_offload=True), APART, {}),
                (zero(3), RECOMPUTES, {}),
            ]),
            (LORA, [
                (zero(3), {1: IN_A_LAYER}, NARROW),
                (zero(3, cpu_offload=True), APART, {}),
                (zero(3), RECOMPUTES, {}),
            ]),
        ]),
    ],
)  # fmt: skip
def test_the_step_is_repeated_with_the_same_gradient(folder, tmp_path, way, runs):
    """Within a time: one that waited for ever would be ended by gloo after a minute."""
    assert_all(run_ranks(2, train_all, folder, tmp_path, way, runs), runs)


def pass_twice(unknown):
    """A pass that fails behind two exchanges and goes on the second time; what it launched, by pass."""
    exchanges = LaunchedExchanges([dist.group.WORLD, dist.group.WORLD], torch.device("cpu"))
    launched, left_out = [], []
    exchange = exchanges.counted(
        lambda value: launched.append(value) or dist.all_reduce(value), left_out.append
    )
    exchanges.begin()
    for number in range(2):
        exchange(torch.tensor(number))
    if unknown:
        dist.all_reduce(torch.tensor(7))
    exchanges.failed()
    exchanges.begin()
    for number in range(3):
        exchange(torch.tensor(number))
    exchanges.end()
    exchanges.begin()
    exchange(torch.tensor(3))
    return [value.item() for value in launched], [value.item() for value in left_out]


def fail_with_an_unknown_exchange():
    with pytest.raises(HardwareError, match="exchanged 3 times, 2 of them"):
        pass_twice(unknown=True)


def test_what_others_have_seen_is_left_out():
    assert run_ranks(1, pass_twice, False, grouped=True) == [([0, 1, 2, 3], [0, 1])]


def test_an_exchange_that_nobody_knows_of_ends_the_run():
    """Left in, it would let the others wait for ever."""
    run_ranks(1, fail_with_an_unknown_exchange, grouped=True)


def test_settings_of_its_own():
    def plain(stage, settings=None, **zero):
        return cuts_plainly({"zero_optimization": {"stage": stage} | zero} | (settings or {}))

    assert [plain(stage) for stage in range(4)] == [False, True, True, True]
    assert plain(3, offload_param={"device": "cpu"}) and plain(
        2, {"bf16": {"enabled": True}}, overlap_comm=True
    )
    assert not plain(3, offload_param={"device": "nvme"}) and not plain(3, zero_hpz_partition_size=8)
    assert not plain(2, reduce_scatter=False) and not plain(3, zero_quantized_weights=True)
    assert not plain(2, {"zenflow": {"topk_ratio": 0.1}}) and not plain(3, {"compile": {"deepcompile": True}})
