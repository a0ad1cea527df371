"""A step that runs out of memory where ranks compute layers together: the rank that failed goes on taking part."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pantheraml import FastLanguageModel, MultiGPUConfig
from pantheraml.models import recompute
from pantheraml.training import merging
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.starved_runs import IN_A_LAYER, IN_ITS_BACKWARD, MERGED, assert_repeated, starved_run
from tests.distributed.test_out_of_memory import FITS

RECOMPUTED = dict(gradient_checkpointing=True)
# What fits, by rank, and settings.
RUNS = [
    ({0: IN_ITS_BACKWARD}, MERGED),
    # Apart, and where nothing has been summed yet.
    ({0: dict(most=FITS, at="norm", backward=True), 1: dict(most=FITS, at="embed_tokens")}, {}),
]
OTHERS = [
    ({1: IN_A_LAYER}, {}),
    ({}, MERGED),
    # In the middle of a layer that is computed again.
    ({0: IN_A_LAYER, 1: dict(most=FITS, at="layers.0.mlp", backward=True)}, RECOMPUTED),
    # No pass can be shorter: layers recompute.
    ({1: dict(most=20, at="layers.2", unless_recomputing=True)}, {}),
]


def by_length(model, state, section, tokens, is_new, plan=recompute._plan_recompute):
    found = plan(model, state, section, tokens, is_new)
    layers = min(2, tokens // 16) if state.recompute == "auto" else found.layers
    return replace(found, layers=layers)


def train(folder, output, starve, settings):
    # Of this process, which ends with the runs. As on a GPU, more is computed again where a pass is longer.
    merging.MOST_TOKENS, recompute._plan_recompute = 60, by_length
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=64,
        load_in_4bit=False,
        use_multi_gpu=MultiGPUConfig(tensor_parallel=2),
    )
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.3, random_state=1)
    return starved_run(folder, output, model, tokenizer, starve, settings)[1]


def train_all(folder, output, runs):
    """An undisturbed run, and others."""
    return [train(folder, output, *run) for run in (({}, {}), *runs)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    how = dict(num_hidden_layers=3, attention_dropout=0.1)
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", **how)


@pytest.mark.parametrize("runs", [RUNS, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_the_step_is_repeated_with_the_same_gradient(folder, tmp_path, runs):
    assert_repeated(run_ranks(2, train_all, folder, tmp_path, runs), runs)


@pytest.mark.slow
def test_two_groups_of_two(folder, tmp_path):
    runs = [({3: IN_A_LAYER}, MERGED), ({0: IN_ITS_BACKWARD, 2: IN_A_LAYER}, {})]
    assert_repeated(run_ranks(4, train_all, folder, tmp_path, runs), runs)


@pytest.mark.slow
def test_nothing_is_left_to_reduce(folder, tmp_path):
    for said in run_ranks(2, train, folder, tmp_path, {1: dict(most=20, at="layers.1")}, {}):
        assert "ran out of memory on rank 1" in said and "nothing is left to reduce" in said
