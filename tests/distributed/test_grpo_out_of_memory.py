"""GRPO that runs out of memory: completions, rewards, losses, norms and all figures stay what they are without that."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pantheraml.errors import HardwareError
from pantheraml.models.state import get_state
from pantheraml.training.grpo import PantheraMLGRPOTrainer
from pantheraml.training.head import needs_cpu_head
from pantheraml.training.pass_limit import NO_LIMIT
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_out_of_memory import Said
from tests.training.grpo_runs import Kept, build
from tests.training.starving import Starved

STEPS = 2
# Of one process, in tokens: prompts of a generation are 8 x 16, micro-batches of the loss up to 8 x 24.
LOSS, PROMPTS = 140, 100
SHARED = dict(strategy="fsdp", shard_frozen=True)
# By what is gathered from all ranks, and by what a loss is divided.
KINDS = {
    "dapo": dict(num_iterations=2, epsilon=0.001, beta=0.04),
    "grpo": dict(loss_type="grpo", gradient_accumulation_steps=2),
    "bnpo": dict(loss_type="bnpo", steps_per_generation=2),
    "dr_grpo": dict(loss_type="dr_grpo", gradient_accumulation_steps=2, steps_per_generation=1),
    "cispo": dict(loss_type="cispo", num_iterations=2),
    "sapo": dict(loss_type="sapo"),
    "vespo": dict(loss_type="vespo", num_iterations=2),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", num_iterations=2),
    "quantile": dict(top_entropy_quantile=0.5),
    "bonus": dict(use_adaptive_entropy=True, entropy_target=9.0, gradient_accumulation_steps=2),
}


def some_slow(kinds, *slow):
    return [pytest.param(kind, marks=[pytest.mark.slow] if kind in slow else []) for kind in kinds]


def train(folder, output, starve=None, config=None, **settings):
    """A run; ``starve`` says what fits, by rank, and which limit of a pass is known from the beginning."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    kept, said = Kept(), Said()
    given = dict(per_device_train_batch_size=8, max_steps=STEPS, max_grad_norm=0.5, config=config)
    trainer = kept.trainer = build(folder, output, callbacks=[kept], **{**given, **settings})
    starved = Starved(trainer.model, **(starve or {}).get(rank, dict(most=10**9)))
    trainer._limit.most = (starve or {}).get("limit", NO_LIMIT)
    policy = get_state(trainer.model).recompute
    logging.getLogger("pantheraml").addHandler(said)
    try:
        trainer.train()
    except HardwareError as error:
        return {"error": str(error)}
    finally:
        logging.getLogger("pantheraml").removeHandler(said)
    assert get_state(trainer.model).recompute == policy, "the model is given back as it was"
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line.pop("step_time") > 0 for line in logs)
    return {
        "steps": kept.steps,
        "logs": logs,
        "weights": [
            getattr(p, "full_tensor", lambda p=p: p)().detach().numpy()
            for p in trainer.model.parameters()
            if p.requires_grad
        ],
        "said": [line for line in said.lines if "ran out of memory" in line],
        "failures": starved.failures,
        "passes": starved.passes,
    }


def train_all(folder, output, runs, settings):
    """An undisturbed run, and one for each of ``runs``."""
    return [train(folder, output, starve, **settings) for starve in ({}, *runs)]


def assert_same(found, wanted):
    assert found["steps"] == wanted["steps"] and len(found["steps"]) == STEPS
    for step, (mine, theirs) in enumerate(zip(found["logs"], wanted["logs"], strict=True), 1):
        assert mine == pytest.approx(theirs, rel=2e-6, abs=1e-6), step
    for mine, theirs in zip(found["weights"], wanted["weights"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.promise("C5")
@pytest.mark.parametrize("kind", some_slow(KINDS, "cispo", "sapo", "vespo", "luspo", "quantile"))
def test_every_loss_is_that_of_the_whole_micro_batch(folder, tmp_path, kind):
    """By turns memory runs out in the forward, and in the backward and in a generation."""
    if kind == "bonus" and needs_cpu_head(torch.device("cpu")):
        pytest.skip("entropies have no gradient on a CPU in TRL 1.15")
    in_backward = list(KINDS).index(kind) % 2 == 0
    fits = dict(most=PROMPTS if in_backward else LOSS, backward=in_backward)
    wanted, found = train_all(folder, tmp_path, [{0: fits}], KINDS[kind])
    assert_same(found, wanted)
    assert 0 < len(found["failures"]) <= 5, "what was learnt holds for steps to come"
    assert max(found["passes"]) <= fits["most"]
    assert any("Step 1 ran out of memory on rank 0" in line for line in found["said"])
    assert not in_backward or any("generation ran out of memory with" in line for line in found["said"])


def evaluate(folder, output, most):
    """Figures of an evaluation on this rank, and how often memory ran out."""
    trainer = build(folder, output, per_device_eval_batch_size=8, beta=0.04)
    starved = Starved(trainer.model, most)
    found = trainer.evaluate()
    return {name: found[name] for name in ("eval_loss", "eval_reward", "eval_kl")}, len(starved.failures)


def evaluate_both(folder, output, most):
    return [evaluate(folder, output, fits) for fits in (10**9, most)]


def test_evaluation_goes_on_with_fewer_rows(folder, tmp_path):
    for (wanted, none), (found, failures) in run_ranks(2, evaluate_both, folder, tmp_path, PROMPTS):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-7) and none == 0 < failures <= 6


class Doubled(PantheraMLGRPOTrainer):
    """A trainer of a script, with a loss of its own."""

    def _compute_loss(self, *args, **kwargs):
        return 2 * super()._compute_loss(*args, **kwargs)


def test_a_loss_of_somebody_elses_is_not_repeated(folder, tmp_path):
    trainer = build(folder, tmp_path, per_device_train_batch_size=8, max_steps=1)
    trainer.__class__ = Doubled
    Starved(trainer.model, LOSS)
    with pytest.raises(HardwareError, match="outside of what is repeated"):
        trainer.train()


def test_more_is_recomputed_where_rows_are_single(folder, tmp_path):
    settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, steps_per_generation=4)
    fits = dict(most=16, unless_recomputing=True, at="layers.1")
    wanted, found = train_all(folder, tmp_path, [{0: fits}], settings)
    assert_same(found, wanted)
    assert any("from now on all layers recompute" in line for line in found["said"])


def fails_alone(folder, output, most, **settings):
    """On the second rank memory is short for a single row."""
    return train(folder, output, {1: dict(most=most)}, per_device_train_batch_size=4, **settings)


def test_nothing_is_left_to_reduce(folder, tmp_path):
    """On all ranks the error says what to change, in the loss and in a generation."""
    for most, what in (
        (20, "Step 1 ran out of memory on rank 1"),
        (10, "The generation ran out of memory on rank 1"),
    ):
        for mine in run_ranks(
            2,
            functools.partial(fails_alone, max_completion_length=16, recompute="offload"),
            folder,
            tmp_path,
            most,
        ):
            assert what in mine["error"] and "half the max_completion_length saves" in mine["error"]


# Of each rank: prompts up to 4 x 20, micro-batches of the loss up to 4 x 28. Ranks that share weights out generate all
# rows at once.
SHORT = 82
RANKS = {
    "ddp": (
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, beta=0.04),
        [{1: dict(most=70)}, {0: dict(most=70, backward=True), 1: dict(most=50)}],
    ),
    "buckets": (
        dict(per_device_train_batch_size=4, kind="full", ddp_bucket_cap_mb=0),
        # In the last run one rank alone cuts its micro-batches, when DDP lays out its buckets, too.
        [{0: dict(most=70)}, {1: dict(most=70, backward=True)}, {"limit": 80}],
    ),
    "fsdp": (
        dict(config=SHARED, per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=1),
        [{1: dict(most=SHORT)}, {0: dict(most=100, backward=True), 1: dict(most=100, at="layers.1.self_attn")}],
    ),
    "fsdp full": (
        dict(config=dict(strategy="fsdp"), per_device_train_batch_size=4, kind="full"),
        [{1: dict(most=SHORT, at="layers.1.self_attn")}, {1: dict(most=SHORT, backward=True)}],
    ),
}  # fmt: skip


@pytest.mark.promise("C5")
@pytest.mark.parametrize("kind", some_slow(RANKS, "buckets", "fsdp full"))
def test_all_ranks_repeat_the_step(folder, tmp_path, kind):
    settings, runs = RANKS[kind]
    ranks = run_ranks(2, train_all, folder, tmp_path, runs, settings, timeout=60)
    for rank, (wanted, *found) in enumerate(ranks):
        for mine, starve in zip(found, runs, strict=True):
            assert_same(mine, wanted)
            assert bool(mine["failures"]) == (rank in starve) and len(mine["failures"]) <= 5
    assert [bool(run["said"]) for run in ranks[0]] == [False, *("limit" not in starve for starve in runs)]
