"""The rows of a step are the same on any number of ranks, whether or not they divide."""

from __future__ import annotations

import itertools

import pytest
from datasets import Dataset
from torch.utils.data import SequentialSampler

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.errors import ConfigError
from pantheraml.training.global_batch import GlobalBatch, resolve_global_batch
from pantheraml.training.rank_batches import RankBatches, RankStream
from tests import tiny

LAYOUTS = [
    GlobalBatch(rows, per_device, ranks)
    for rows, per_device, ranks in itertools.product((1, 5, 8, 12, 16), (1, 2, 3, 4), (1, 2, 3, 4, 8))
]


def steps_of(batch, count, make):
    """The rows of each step on all ranks, and the micro-batches of each rank in it."""
    by_rank = [list(make(batch, count, rank)) for rank in range(batch.ranks)]
    assert len({len(found) for found in by_rank}) == 1, "every rank takes as many micro-batches"
    size = batch.accumulation
    found = []
    for start in range(0, len(by_rank[0]), size):
        turns = [rank[start : start + size] for rank in by_rank]
        rows = [row for turn in zip(*turns, strict=True) for piece in turn for row in piece]
        found.append((rows, turns))
    return found


def of_table(batch, count, rank):
    rows = range(count)
    return RankBatches(rows, SequentialSampler(rows), batch, rank=rank, seed=3)


def of_stream(batch, count, rank):
    return RankStream(range(count), batch, rank=rank)


@pytest.mark.promise("B4")
@pytest.mark.parametrize("make", [of_table, of_stream])
@pytest.mark.parametrize("count", [1, 7, 29, 48])
def test_every_step_takes_the_next_rows_of_one_order(make, count):
    for batch in LAYOUTS:
        steps = steps_of(batch, count, make)
        wanted = [list(range(start, min(start + batch.rows, count))) for start in range(0, count, batch.rows)]
        assert [rows for rows, _ in steps] == wanted, batch
        for _, turns in steps:
            sizes = [len(piece) for rank in turns for piece in rank]
            assert max(sizes) <= batch.per_device, batch
        if make is of_table:
            assert len(of_table(batch, count, 0)) == sum(len(turns[0]) for _, turns in steps)


def test_rows_that_fill_no_batch_are_left_out_where_asked():
    for batch in LAYOUTS:
        kept = RankBatches(range(29), SequentialSampler(range(29)), batch, rank=0, seed=3, drop_last=True)
        pieces = list(kept)
        assert len(kept) == len(pieces)
        if batch.is_even:
            assert all(len(piece) == batch.per_device for piece in pieces)


def arguments(tmp_path, **settings):
    return PantheraMLTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings)


def test_the_accumulation_follows(tmp_path):
    for ranks, accumulation in ((1, 8), (2, 4), (3, 3), (4, 2), (8, 1), (16, 1)):
        args = arguments(tmp_path, per_device_train_batch_size=2, global_batch_size=16)
        batch = resolve_global_batch(args, ranks)
        assert (batch.rows, args.gradient_accumulation_steps) == (16, accumulation)
        assert batch.is_even == (ranks in (1, 2, 4, 8))
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert resolve_global_batch(args, 4).rows == 24 and args.gradient_accumulation_steps == 3


@pytest.mark.parametrize("value", [0, -4, 2.5, True, "16"])
def test_numbers_that_are_none(tmp_path, value):
    with pytest.raises(ConfigError, match="global_batch_size="):
        resolve_global_batch(arguments(tmp_path, global_batch_size=value), 1)


def test_an_accumulation_that_contradicts_it(tmp_path):
    args = arguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, global_batch_size=16
    )
    assert resolve_global_batch(args, 2).rows == 16
    with pytest.raises(ConfigError, match="2 rows per device x 4 x 4 ranks are 32"):
        resolve_global_batch(args, 4)


@pytest.mark.promise("C5")
def test_one_process_trains_uneven_steps_as_even_ones(tmp_path, caplog):
    folder = tiny.save_checkpoint(tmp_path / "model", "llama")
    rows = Dataset.from_list([{"input_ids": list(range(5, 9 + index % 9))} for index in range(22)])
    logs = []
    for per_device in (6, 4, 1):
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(folder), 64, load_in_4bit=False, device_map="cpu"
        )
        model = FastLanguageModel.get_peft_model(model, r=4)
        args = arguments(
            tmp_path / "out", per_device_train_batch_size=per_device, global_batch_size=6, num_train_epochs=2,
            logging_steps=1, learning_rate=1e-3, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = PantheraMLTrainer(model, args, train_dataset=rows, tokenizer=tokenizer)
        with caplog.at_level("INFO", "pantheraml"):
            trainer.train()
        logs.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e])
    assert len(logs[0]) == 8 and "6 rows a step, up to 4 x 2 x 1" in caplog.text
    for other in logs[1:]:
        for mine, theirs in zip(other, logs[0], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)
