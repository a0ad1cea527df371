"""A step that runs out of memory is repeated on all ranks: losses, gradient norms and weights stay what they are."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.errors import HardwareError
from pantheraml.models.state import get_state
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows
from tests.distributed.test_pipeline import split_at
from tests.training.starving import Starved

LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")
STEPS = 4
# Rows have 4 to 27 tokens, micro-batches of two up to 54.
FITS = 35


class Said(logging.Handler):
    """What the run says."""

    def __init__(self):
        super().__init__()
        self.lines = []
        logging.getLogger("pantheraml").setLevel(logging.INFO)

    def emit(self, record):
        self.lines.append(record.getMessage())


def build(folder, full=False, split=None, **adapter):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu", full_finetuning=full
    )
    if split is not None:
        get_state(model).split = split_at(*split)
    if not full:
        adapter = dict(r=4, lora_dropout=0.3) | adapter
        model = FastLanguageModel.get_peft_model(model, random_state=1, **adapter)
    return model, tokenizer


def trainer_of(folder, output, model, tokenizer, **settings):
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        **{
            **dict(per_device_train_batch_size=2, global_batch_size=8, learning_rate=1e-3, max_steps=STEPS),
            **dict(logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, max_grad_norm=0.5),
            **settings,
        },
    )  # fmt: skip
    return PantheraMLTrainer(model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer)


def train(folder, output, starve=None, settings=None, full=False, **adapter):
    """A run; ``starve`` says what fits on the last rank."""
    model, tokenizer = build(folder, full, **adapter)
    is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    starved = Starved(model, **starve) if starve and is_last else None
    trainer = trainer_of(folder, output, model, tokenizer, **(settings or {}))
    policy = get_state(model).recompute
    said = Said()
    logging.getLogger("pantheraml").addHandler(said)
    try:
        trainer.train()
    except HardwareError as error:
        return {"error": str(error)}
    finally:
        logging.getLogger("pantheraml").removeHandler(said)
    assert get_state(model).recompute == policy, "the model is given back as it was"
    return {
        "logs": [
            {name: entry[name] for name in LOGGED if name in entry}
            for entry in trainer.state.log_history[:-1]
        ],
        "weights": [p.detach().numpy() for p in model.parameters() if p.requires_grad],
        "said": [line for line in said.lines if "ran out of memory" in line],
        "most": trainer._limit.most,
        "failures": starved.failures if starved else [],
        "passes": starved.passes if starved else [],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", attention_dropout=0.3)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """Runs of one process that memory suffices for."""

    @functools.cache
    def get(packed=False, full=False):
        settings = PACKED if packed else None
        return train(folder, tmp_path_factory.mktemp("undisturbed"), None, settings, full)

    return get


def assert_same(found, wanted):
    assert len(found["logs"]) == len(wanted["logs"]) == STEPS
    for step, (mine, theirs) in enumerate(zip(found["logs"], wanted["logs"], strict=True), 1):
        assert mine == pytest.approx(theirs, rel=2e-6, abs=1e-7), step
    for mine, theirs in zip(found["weights"], wanted["weights"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


PADDED, MERGED = {}, dict(merge_micro_batches=True)
PACKED = dict(packing=True, max_length=64, per_device_train_batch_size=1, global_batch_size=4)


@pytest.mark.promise("C5")
@pytest.mark.parametrize(
    ("ranks", "backward", "settings"),
    [
        (1, False, PADDED),
        (1, True, MERGED),
        (1, True, PACKED),
        (2, False, MERGED),
        (2, True, PADDED),
        (2, True, PACKED | MERGED),
    ],
)
def test_the_step_is_repeated_with_the_same_gradient(
    folder, tmp_path, undisturbed, ranks, backward, settings
):
    starve = dict(most=FITS, backward=backward)
    found = run_ranks(ranks, train, folder, tmp_path, starve, settings)
    for mine in found:
        assert_same(mine, undisturbed(packed="packing" in settings))
        assert mine["most"] == found[0]["most"], "all ranks take less"
    failures, said = found[-1]["failures"], found[0]["said"]
    assert failures and len(said) == len(failures) <= 3, "what was learnt holds for steps to come"
    assert f"Step 1 ran out of memory on rank {ranks - 1}, in a pass of {failures[0]} tokens." in said[0]
    assert max(found[-1]["passes"]) <= FITS


@pytest.mark.parametrize("backward", [False, True])
def test_gradients_that_are_reduced_on_the_way(folder, tmp_path, undisturbed, backward):
    """Full fine-tuning with many buckets: the rank that fails owes the others those they wait for."""
    starve, settings = dict(most=FITS, backward=backward), dict(ddp_bucket_cap_mb=0)
    found = run_ranks(2, train, folder, tmp_path, starve, settings, True)
    assert found[-1]["failures"]
    for mine in found:
        assert_same(mine, undisturbed(full=True))


def test_routers_keep_their_micro_batches(tmp_path, tmp_path_factory):
    """What is merged is taken apart, and no further: the routers' loss is that of a micro-batch."""
    folder = tiny.save_checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral")
    settings = dict(merge_micro_batches=True, router_aux_loss_coef=0.5, per_device_train_batch_size=1)
    wanted = train(folder, tmp_path, None, settings, lora_dropout=0.0)
    found = train(folder, tmp_path, dict(most=FITS, backward=True), settings, lora_dropout=0.0)
    assert found["failures"] and wanted["logs"][0]["aux_loss"] > 0
    assert_same(found, wanted)


@pytest.mark.parametrize("backward", [False, True])
def test_a_model_that_is_split(tmp_path, tmp_path_factory, backward):
    """Micro-batches that follow one another through its stages become smaller."""
    folder = tiny.save_checkpoint(
        tmp_path_factory.mktemp("split"), "llama", num_hidden_layers=4, attention_dropout=0.2
    )
    found = []
    for starve in (None, dict(most=FITS, backward=backward)):
        settings = dict(per_device_train_batch_size=8, global_batch_size=16)
        found.append(train(folder, tmp_path, starve, settings, lora_dropout=0.0, split=(0, 2, 4)))
    assert_same(found[1], found[0])
    assert found[1]["failures"] and max(found[1]["passes"]) <= FITS
    assert len(found[1]["said"]) == 1 and "from now on a pass has up to" in found[1]["said"][0]


def test_more_is_recomputed_where_rows_are_single(folder, tmp_path, undisturbed):
    starve, settings = dict(most=10, unless_recomputing=True), dict(per_device_train_batch_size=1)
    found = run_ranks(2, train, folder, tmp_path, starve, settings)
    for mine in found:
        assert_same(mine, undisturbed())
    assert len(found[0]["said"]) == 1 and "from now on all layers recompute" in found[0]["said"][0]


def test_nothing_is_left_to_reduce(folder, tmp_path):
    """On all ranks the error says what to change."""
    starve = functools.partial(train, r=64)
    for mine in run_ranks(2, starve, folder, tmp_path, dict(most=3, backward=True)):
        assert "ran out of memory on rank 1" in mine["error"] and "nothing is left to reduce" in mine["error"]
        changes = mine["error"].split("cheapest first: ")[1].split(", ")
        names = ['optim="adamw_8bit"', "load_in_4bit=True", "half the max_seq_length"]
        assert [change.split(" saves ")[0] for change in changes] == names


def test_the_optimizer_runs_out_of_memory(folder, tmp_path):
    class Greedy(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    trainer = trainer_of(folder, tmp_path, *build(folder, r=64))
    trainer.add_callback(Greedy())
    with pytest.raises(HardwareError, match="outside of what is repeated") as caught:
        trainer.train()
    assert 'optim="adamw_8bit" saves' in str(caught.value)


@pytest.mark.promise("C5")
def test_evaluation_goes_on_with_fewer_rows(folder, tmp_path):
    wanted, _ = evaluate(folder, tmp_path, 10**9)
    for packed in (False, True):
        for figures, failures in run_ranks(2, evaluate, folder, tmp_path, FITS, packed):
            assert figures == pytest.approx(wanted, rel=1e-6) and 0 < failures <= 3


def evaluate(folder, output, most, packed=False):
    model, tokenizer = build(folder)
    starved = Starved(model, most)
    settings = PACKED if packed else dict(per_device_eval_batch_size=4)
    figures = trainer_of(folder, output, model, tokenizer, **settings).evaluate()
    return {name: figures[name] for name in ("eval_loss", "eval_mean_token_accuracy")}, len(starved.failures)
