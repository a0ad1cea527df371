"""Dropout in front of adapters follows the sample: the same on any number of ranks, however steps are cut."""

from __future__ import annotations

import pytest
from datasets import Dataset

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_elastic import stream
from tests.distributed.test_parity import rows

# 29 rows are four steps of 8: the run is saved in its second epoch.
STEPS, SAVED = 7, 5


def train(folder, output, make=rows, resume=None, dropout=0.4, **settings):
    """Loss and gradient norm of each step, 8 rows a step."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=dropout, random_state=1)
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        **{
            **dict(per_device_train_batch_size=2, global_batch_size=8, learning_rate=1e-3, logging_steps=1),
            **dict(save_strategy="steps", save_steps=SAVED, report_to="none", disable_tqdm=True, max_steps=STEPS),
            **settings,
        },
    )  # fmt: skip
    trainer = PantheraMLTrainer(model, args, train_dataset=make(), tokenizer=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [(entry["loss"], entry["grad_norm"]) for entry in logs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    """One rank's runs, and the folders of their checkpoints."""
    found = {}

    def get(make):
        if make not in found:
            output = tmp_path_factory.mktemp("one")
            found[make] = train(folder, output, make), output / f"checkpoint-{SAVED}"
        return found[make]

    return get


def assert_same(found, wanted):
    for step, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert mine == pytest.approx(theirs, rel=2e-6, abs=1e-7), step


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, dict(per_device_train_batch_size=8)),
        (1, dict(merge_micro_batches=True)),
        (1, dict(per_device_train_batch_size=3, dataloader_num_workers=2)),
        (2, {}),
        (3, {}),
        (4, dict(merge_micro_batches=True)),
    ],
)
def test_ranks_and_cuts_drop_the_same(folder, tmp_path, one, ranks, settings):
    for found in run_ranks(ranks, train_with, folder, tmp_path, rows, settings):
        assert_same(found, one(rows)[0])


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_streams_drop_the_same(folder, tmp_path, one, ranks):
    for found in run_ranks(ranks, train_with, folder, tmp_path, stream, {}):
        assert_same(found, one(stream)[0])


@pytest.mark.parametrize("make", [rows, stream])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_goes_on_drops_what_it_would_have(folder, tmp_path, one, make, ranks):
    wanted, checkpoint = one(make)
    settings = dict(resume=str(checkpoint))
    for found in run_ranks(ranks, train_with, folder, tmp_path, make, settings):
        assert_same(found, wanted)


def train_with(folder, output, make, settings):
    return train(folder, output, make, **settings)


def test_masks_change_with_steps_seeds_and_samples(folder, tmp_path, one):
    plain = train(folder, tmp_path, dropout=0.0)
    other = train(folder, tmp_path, seed=7, data_seed=42)
    dropping = one(rows)[0]
    # The first adapters' B is zero: dropout shows in gradients.
    assert dropping[0][1] != pytest.approx(plain[0][1], rel=1e-4)
    assert dropping[0][1] != pytest.approx(other[0][1], rel=1e-4)

    def twice():
        return Dataset.from_list([{"input_ids": list(range(5, 25))}] * 80)

    same = train(folder, tmp_path, twice, learning_rate=0.0)
    assert len({round(norm, 6) for _, norm in same}) > STEPS // 2, "every step and row has masks of its own"


def test_packed_rows(folder, tmp_path):
    settings = dict(packing=True, max_length=64)
    wanted = train(folder, tmp_path / "one", **settings)
    for found in run_ranks(2, train_with, folder, tmp_path / "two", rows, settings):
        assert_same(found, wanted)
