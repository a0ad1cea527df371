"""A step that runs out of memory where ranks share the weights out: the rank that failed goes on gathering."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch.distributed as dist

from pantheraml import FastLanguageModel, MultiGPUConfig
from pantheraml.models.sharding import is_sharded, whole
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_out_of_memory import FITS, STEPS, Said, trainer_of
from tests.training.starving import Starved

KINDS = {
    "lora": dict(load_in_4bit=False),
    "qlora": dict(load_in_4bit=True),
    "full": dict(full_finetuning=True),
}
SHARED = MultiGPUConfig(strategy="fsdp", shard_frozen=True)
# In the forward, between what a layer gathers for its halves; in the backward, when half of a layer has its gradients;
# where nothing has been gathered yet, and where all has.
WHERE = {
    "in a layer": dict(at="layers.1.self_attn"),
    "in a layer's backward": dict(at="layers.1.self_attn", backward=True),
    "before the first layer": dict(at="embed_tokens"),
    "after the last layer": dict(at="norm"),
    "before the last layer's backward": dict(at="norm", backward=True),
    "in the first layer's backward": dict(at="layers.0.self_attn.q_proj", backward=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)


def train(folder, output, kind, starve, settings):
    """A run; ``starve`` says what fits on the last rank."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, use_multi_gpu=SHARED, **KINDS[kind]
    )
    if kind != "full":
        model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.3, random_state=1)
    starved = Starved(model, **starve) if starve and dist.get_rank() == dist.get_world_size() - 1 else None
    trainer, said = trainer_of(folder, output, model, tokenizer, **settings), Said()
    logging.getLogger("pantheraml").addHandler(said)
    trainer.train()
    logging.getLogger("pantheraml").removeHandler(said)
    assert is_sharded(model)
    figures = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return {
        "figures": [[entry[name] for name in figures] for entry in trainer.state.log_history[:-1]],
        "weights": [whole(p.detach()).numpy() for p in model.parameters() if p.requires_grad],
        "said": [line for line in said.lines if "ran out of memory" in line],
        "failures": starved.failures if starved else [],
    }


def train_all(folder, output, kind, starving, settings):
    """An undisturbed run, and one for each of ``starving``."""
    return [train(folder, output, kind, starve, settings) for starve in (None, *starving)]


def assert_same(found, wanted):
    np.testing.assert_allclose(found["figures"], wanted["figures"], rtol=1e-6, atol=1e-7)
    for mine, theirs in zip(found["weights"], wanted["weights"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_repeated_with_the_same_gradient(folder, tmp_path, kind):
    starving = [dict(most=FITS) | where for where in WHERE.values()]
    ranks = run_ranks(2, train_all, folder, tmp_path, kind, starving, {})
    for wanted, *found in ranks:
        assert len(wanted["figures"]) == STEPS
        for mine, where in zip(found, WHERE, strict=True):
            assert_same(mine, wanted)
    for where, mine, told in zip(WHERE, ranks[1][1:], ranks[0][1:], strict=True):
        print(kind, where, mine["failures"], told["said"])
        assert mine["failures"] and len(told["said"]) == len(mine["failures"]) <= 3, where
