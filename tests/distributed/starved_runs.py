"""Runs on several ranks in which memory runs out on purpose, and what is compared of them."""

from __future__ import annotations

import logging

import numpy as np
import torch.distributed as dist

from pantheraml.errors import HardwareError
from pantheraml.models.zero3 import whole_on_first
from tests.distributed.test_out_of_memory import FITS, Said, trainer_of
from tests.training.starving import Starved

STEPS = 2
# Rows of 4 to 27 tokens go through the model one by one, or in two passes of the step's four rows a rank.
MERGED = dict(merge_micro_batches=True, per_device_train_batch_size=1)
IN_A_LAYER = dict(most=FITS, at="layers.1.self_attn")
# Where half of a layer has its gradients.
IN_ITS_BACKWARD = IN_A_LAYER | dict(backward=True)
FIGURES = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")


def starved_run(folder, output, model, tokenizer, starve, settings):
    """The trainer, and what its run came to or the error that ended it; ``starve`` says what fits, by rank."""
    starved, said = Starved(model, **starve.get(dist.get_rank(), dict(most=10**9))), Said()
    trainer = trainer_of(folder, output, model, tokenizer, **{"max_steps": STEPS} | settings)
    logging.getLogger("pantheraml").addHandler(said)
    try:
        trainer.train()
    except HardwareError as error:
        return trainer, str(error)
    finally:
        logging.getLogger("pantheraml").removeHandler(said)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    with whole_on_first(model, is_first=True):
        weights = [
            getattr(p, "full_tensor", lambda p=p: p)().detach().numpy()
            for p in model.parameters()
            if p.requires_grad
        ]
    return trainer, {
        "figures": [[entry[name] for name in FIGURES] for entry in logs],
        "weights": weights,
        "said": [line for line in said.lines if "ran out of memory" in line],
        "failures": starved.failures,
        "passes": starved.passes,
    }


def assert_same(found, wanted):
    np.testing.assert_allclose(found["figures"], wanted["figures"], rtol=1e-6, atol=1e-7)
    for mine, theirs in zip(found["weights"], wanted["weights"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-5)


def assert_repeated(ranks, runs):
    """Of all ranks, an undisturbed run and ``runs``, pairs of what fits and settings: each equals the first."""
    for wanted, *found in ranks:
        assert len(wanted["figures"]) == STEPS
        for mine in found:
            assert_same(mine, wanted)
    for number, (starve, _) in enumerate(runs, 1):
        found = [runs_of_rank[number] for runs_of_rank in ranks]
        assert bool(found[0]["said"]) == bool(starve)
        for rank in starve:
            assert 0 < len(found[rank]["failures"]) <= 3, starve
