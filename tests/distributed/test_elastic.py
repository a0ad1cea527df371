"""A run that was saved goes on with the very next row on any number of ranks, with unchanged arguments.

That it is the same run bit by bit on as many is in ``tests/training/test_resume_oracle.py``.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.errors import ConfigError
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows


def stream():
    """The rows of ``rows()``, shuffled anew in every epoch."""
    return Dataset.to_iterable_dataset(rows(), num_shards=1).shuffle(seed=5, buffer_size=50)


def train(folder, output, make, stop=None, resume=None, **settings):
    """Losses and gradient norms by step, and the rows of each step; ``stop`` ends the run there, saved."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    given = make()
    length = dict(max_steps=10) if isinstance(given, IterableDataset) else dict(num_train_epochs=3)
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        **{
            **dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1),
            **dict(save_strategy="no" if stop is None else "steps", save_steps=stop or 500, report_to="none"),
            **dict(disable_tqdm=True, max_grad_norm=0.5, warmup_steps=2), **length, **settings,
        },
    )  # fmt: skip
    trainer = PantheraMLTrainer(model, args, train_dataset=given, tokenizer=tokenizer)
    seen: list[list[tuple[int, ...]]] = []
    collect = trainer.get_batch_samples

    def watched(*arguments):
        batches, number = collect(*arguments)
        found = []
        for batch in batches:
            for ids, labels, mask in zip(
                batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
            ):
                if (labels != -100).any():
                    found.append(tuple(ids[mask.bool()].tolist()))
        if batches:
            seen.append(found)
        return batches, number

    trainer.get_batch_samples = watched
    if stop is not None:
        trainer.control.should_training_stop = False
        step = trainer.training_step

        def last(*arguments, **named):
            result = step(*arguments, **named)
            if trainer.state.global_step >= stop:
                trainer.control.should_training_stop = True
            return result

        trainer.training_step = last
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    found = {entry["step"]: (entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in logs}
    return found, seen, trainer.state.max_steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def together(by_rank):
    """The rows of each step on all ranks."""
    return [
        sorted(row for rank in step for row in rank)
        for step in zip(*(seen for _, seen, _ in by_rank), strict=True)
    ]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The uninterrupted runs on two ranks, 8 rows a step, by what they read."""
    found = {}

    def get(make):
        if make not in found:
            found[make] = run_ranks(2, train, folder, tmp_path_factory.mktemp("whole"), make)
        return found[make]

    return get


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """A checkpoint of a run on two ranks that ended at a step."""
    found = {}

    def get(make, step):
        if (make, step) not in found:
            output = tmp_path_factory.mktemp("saved")
            run_ranks(2, train, folder, output, make, step)
            found[make, step] = output / f"checkpoint-{step}"
        return found[make, step]

    return get


# 29 rows are four steps of 8: step 3 is in the first epoch, 4 at its end, 6 in the second.
@pytest.mark.parametrize(
    ("ranks", "step"),
    [
        *[(1, 6), (2, 4), (3, 6)],
        *[pytest.param(*other, marks=pytest.mark.slow) for other in [(1, 3), (3, 4), (4, 3), (4, 6)]],
    ],
)
def test_it_goes_on_with_the_next_row(folder, tmp_path, whole, saved, ranks, step):
    compare(folder, tmp_path, whole, saved, rows, ranks, step)


@pytest.mark.parametrize(("ranks", "step"), [(1, 3), (2, 4), (3, 6)])
def test_a_stream_goes_on_with_the_next_row(folder, tmp_path, whole, saved, ranks, step):
    compare(folder, tmp_path, whole, saved, stream, ranks, step)


@pytest.mark.parametrize("ranks", [1, 4])
def test_rows_grouped_by_length(folder, tmp_path, ranks):
    """In the order of two ranks, which depends on neither their number nor the accumulation."""
    settings = dict(train_sampling_strategy="group_by_length")
    oracle = run_ranks(2, partial(train, **settings), folder, tmp_path / "two", rows)
    accumulation = dict(gradient_accumulation_steps=4 // ranks)
    found = run_ranks(ranks, partial(train, **settings, **accumulation), folder, tmp_path / "other", rows)
    assert together(found) == together(oracle)


def compare(folder, tmp_path, whole, saved, make, ranks, step):
    oracle = whole(make)
    checkpoint = saved(make, step)
    found = run_ranks(ranks, train, folder, tmp_path, make, None, str(checkpoint))
    logs, _, total = oracle[0]
    assert found[0][2] == total == max(logs), "the schedule is as long"
    assert together(found) == together(oracle)[step:], "every step has the rows that it would have had"
    for mine in (logs_of_rank for logs_of_rank, _, _ in found):
        assert set(mine) == set(logs)
        for number in range(step + 1, total + 1):
            assert mine[number] == pytest.approx(logs[number], rel=2e-6, abs=1e-7), number


@pytest.mark.parametrize("make", [rows, stream])
def test_a_run_that_was_stopped_by_its_end(folder, tmp_path, make):
    """Saved where an epoch is said to end because the run does: the rest of it comes when the run is made longer."""
    settings = dict(gradient_accumulation_steps=4, lr_scheduler_type="constant_with_warmup")
    whole = train(folder, tmp_path / "whole", make, max_steps=10, **settings)
    train(folder, tmp_path, make, max_steps=6, **{**settings, "save_strategy": "epoch"})
    found = train(folder, tmp_path, make, None, str(tmp_path / "checkpoint-6"), max_steps=10, **settings)
    assert together([found]) == together([whole])[6:]


@pytest.mark.promise("B4")
def test_epochs_have_all_rows_once(whole):
    for make in (rows, stream):
        steps = together(whole(make))
        epoch = sorted(row for step in steps[:4] for row in step)
        assert epoch == sorted(tuple(row["input_ids"]) for row in rows())


def test_another_global_batch_is_refused(folder, tmp_path, saved):
    with pytest.raises(ConfigError, match="a step of checkpoint-3 has 8 rows"):
        train(
            folder,
            tmp_path,
            rows,
            None,
            str(saved(rows, 3)),
            gradient_accumulation_steps=1,
            global_batch_size=4,
        )


def test_a_checkpoint_without_a_cursor_says_so(folder, tmp_path, saved, caplog):
    checkpoint = saved(rows, 6)
    cursor = json.loads(Path(checkpoint, "cursor.json").read_text())
    assert cursor == {"global_batch_size": 8, "epoch": 1, "rows": 16}
    plain = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, plain)
    for name in ("cursor.json", "manifest.json"):  # as transformers leaves it
        (plain / name).unlink()
    with caplog.at_level("INFO", "pantheraml"):
        train(folder, tmp_path, rows, None, str(plain), gradient_accumulation_steps=4)
    assert "checkpoint-6 does not say how many rows its steps had" in caplog.text
