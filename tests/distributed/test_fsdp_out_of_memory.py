"""A step that runs out of memory where ranks share the weights out: the rank that failed goes on gathering."""

from __future__ import annotations

import pytest

from pantheraml import FastLanguageModel, MultiGPUConfig
from pantheraml.distributed.strategies import gathered_passes
from pantheraml.distributed.strategies.fsdp import sharding_of
from pantheraml.models.fused.decoder_layer import apply_layers
from pantheraml.models.sharding import is_sharded, shard_model
from pantheraml.models.state import get_state
from pantheraml.training import merging, repeated_steps
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.starved_runs import (
    IN_A_LAYER,
    IN_ITS_BACKWARD,
    MERGED,
    STEPS,
    assert_repeated,
    starved_run,
)
from tests.distributed.test_out_of_memory import FITS

# By the first word of a kind.
LOADS = {
    "lora": dict(load_in_4bit=False),
    "qlora": dict(load_in_4bit=True),
    "fp8": dict(load_in_fp8=True),
    "full": dict(full_finetuning=True),
}
# In the second step, since what an evaluation leaves behind is before it.
EVALUATED = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=1)
# Gradients are reduced in the last pass.
ADDED_UP = dict(spare=10**9)
# Runs: what fits, by rank, and settings. One rank fails, or both do, apart.
RUNS = {
    "lora": [
        ({1: IN_A_LAYER}, {}),
        ({}, MERGED),
        # In the first of two passes, which one of no tokens follows: what went into the second.
        ({0: dict(most=22, at="layers.1", unless_recomputing=True)}, MERGED),
    ],
    "full": [
        ({1: IN_A_LAYER | dict(most=41)}, EVALUATED),
        ({1: IN_ITS_BACKWARD}, MERGED),
        ({}, ADDED_UP),
        ({0: IN_A_LAYER}, ADDED_UP),
    ],
    # Where nothing has been gathered yet, and where everything has; where not all gradients have been reduced.
    "full elsewhere": [
        ({0: dict(most=FITS, at="norm", backward=True), 1: dict(most=FITS, at="embed_tokens")}, {}),
        ({0: IN_ITS_BACKWARD, 1: dict(most=FITS, at="layers.0.self_attn.q_proj", backward=True)}, {}),
        ({1: dict(most=20, at="layers.1", unless_recomputing=True)}, {}),
    ],
    "qlora": [({0: IN_ITS_BACKWARD, 1: IN_A_LAYER}, {})],
    "fp8": [({0: IN_ITS_BACKWARD, 1: IN_A_LAYER}, {})],
    "lora fused": [
        ({0: dict(most=FITS, at="layers.1"), 1: dict(most=FITS, at="layers.0", backward=True)}, {})
    ],
    "full fused": [
        ({0: dict(most=FITS, at="layers.1"), 1: dict(most=FITS, at="layers.0", backward=True)}, {})
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    how = dict(num_hidden_layers=3, attention_dropout=0.1)
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", **how)


def load(folder, kind, config):
    way, is_fused = kind.split()[0], kind.endswith("fused")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, use_multi_gpu=MultiGPUConfig() if is_fused else config, **LOADS[way]
    )
    if is_fused:  # as on a GPU
        state = get_state(model)
        apply_layers(model, state.family, state.patches, on_cpu=True)
        state.sharding = sharding_of(config, trained=way == "full")
        shard_model(model, state.sharding)
    if way != "full":
        model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.3, random_state=1)
    return model, tokenizer


def train(folder, output, kind, starve, settings, shard_size=None):
    """A run; ``starve`` says what fits, by rank."""
    # Of this process, which ends with the runs; the CPU's memory is not planned.
    settings, spare = dict(settings), settings.get("spare", 0)
    settings.pop("spare", None)
    merging.MOST_TOKENS, repeated_steps.spare_bytes = 60, lambda predicted: spare
    model, tokenizer = load(
        folder, kind, MultiGPUConfig(strategy="fsdp", shard_frozen=True, shard_size=shard_size)
    )
    reduced, reduce = [], gathered_passes._reduce_scatter

    def counted(*given, **settings):
        reduced.append(given)
        return reduce(*given, **settings)

    gathered_passes._reduce_scatter = counted
    try:
        _, found = starved_run(folder, output, model, tokenizer, starve, settings)
    finally:
        gathered_passes._reduce_scatter = reduce
    if isinstance(found, str):
        return found
    assert is_sharded(model)
    return found | {"reduced": len(reduced)}


def train_all(folder, output, kind, runs, *sizes):
    """An undisturbed run, and others."""
    return [train(folder, output, kind, *run, *sizes) for run in (({}, {}), *runs)]


@pytest.mark.parametrize(
    "kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(RUNS)[1:])]
)
def test_the_step_is_repeated_with_the_same_gradient(folder, tmp_path, kind):
    ranks = run_ranks(2, train_all, folder, tmp_path, kind, RUNS[kind])
    assert_repeated(ranks, RUNS[kind])
    for number, (starve, settings) in enumerate(RUNS[kind], 1):
        if settings == MERGED and not starve:
            passes = [one[number]["passes"] for one in ranks]
            assert len(passes[0]) == len(passes[1]) < 4 * STEPS, "merged, as often on all ranks"
            assert max(map(max, passes)) <= 60
        if settings == ADDED_UP and not starve:
            assert [one[number]["reduced"] for one in ranks] == [one[0]["reduced"] / 2 for one in ranks]
        if settings == ADDED_UP and starve:
            assert "from now on gradients are reduced in every pass" in ranks[0][number]["said"][0]
            assert "from now on a pass has up to" in ranks[0][number]["said"][1]


@pytest.mark.slow
def test_nothing_is_left_to_reduce(folder, tmp_path):
    for said in run_ranks(2, train, folder, tmp_path, "lora", {1: dict(most=20, at="layers.1")}, {}):
        assert "ran out of memory on rank 1" in said and "nothing is left to reduce" in said


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (4, 2)])
def test_copies_that_are_shared_out_each(folder, tmp_path, ranks, size):
    runs = [({ranks - 1: IN_A_LAYER}, ADDED_UP), ({ranks - 1: IN_ITS_BACKWARD}, {})]
    assert_repeated(run_ranks(ranks, train_all, folder, tmp_path, "full", runs, size), runs)
