"""Evaluation that runs out of memory where ranks wait for one another in every pass: all cut their batches alike."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch.distributed as dist

from pantheraml import FastLanguageModel, MultiGPUConfig
from pantheraml.errors import HardwareError
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.starved_runs import IN_A_LAYER
from tests.distributed.test_out_of_memory import FITS, Said, trainer_of
from tests.training.starving import Starved

SPREAD = {
    "fsdp": dict(strategy="fsdp", shard_frozen=True),
    "tensor parallel": dict(tensor_parallel=2),
}
# Rows go through the model one by one, and four at a time where they are evaluated.
SETTINGS = dict(
    per_device_train_batch_size=1,
    per_device_eval_batch_size=4,
    eval_strategy="steps",
    eval_steps=1,
    max_steps=2,
)
FIGURES = ("eval_loss", "eval_mean_token_accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=2)


def evaluate(folder, output, kind, starve):
    """Figures of an evaluation, of those within a training, and of one after it; failures; what was said."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, use_multi_gpu=MultiGPUConfig(**SPREAD[kind])
    )
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.3, random_state=1)
    starved, said = Starved(model, **starve.get(dist.get_rank(), dict(most=10**9))), Said()
    trainer = trainer_of(folder, output, model, tokenizer, **SETTINGS)
    logging.getLogger("pantheraml").addHandler(said)
    try:
        found = [trainer.evaluate()]
        trainer.train()
        found += [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        found.append(trainer.evaluate())
    except HardwareError as error:
        return str(error)
    finally:
        logging.getLogger("pantheraml").removeHandler(said)
    trained = [
        [entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry
    ]
    return [[one[name] for name in FIGURES] for one in found], trained, starved.failures, said.lines


def evaluate_all(folder, output, kind, runs):
    return [evaluate(folder, output, kind, starve) for starve in runs]


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("tensor parallel", marks=pytest.mark.slow)])
def test_all_ranks_go_on_with_fewer_rows(folder, tmp_path, kind):
    starved = (
        {1: IN_A_LAYER} if kind == "fsdp" else {0: dict(most=FITS, at="norm"), 1: IN_A_LAYER | dict(most=60)}
    )
    runs = [{}, starved, {1: IN_A_LAYER | dict(most=20)}]
    ranks = run_ranks(2, evaluate_all, folder, tmp_path, kind, runs)
    for rank, (wanted, mine, ended) in enumerate(ranks):
        assert len(wanted[0]) == 4 and not wanted[2]
        for figures in range(2):
            np.testing.assert_allclose(mine[figures], wanted[figures], rtol=1e-6)
        assert bool(mine[2]) == (rank in starved)
        assert "Evaluation ran out of memory on rank 1" in ended and "Shorten the rows" in ended
    said = ranks[0][1][3]
    assert 0 < sum("evaluation ran out of memory on rank" in line for line in said) <= 3
