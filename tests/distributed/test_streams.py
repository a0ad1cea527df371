"""Streamed rows on several ranks: each on exactly one of them, and the same training on any number."""

from __future__ import annotations

import functools

import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments, log
from pantheraml.errors import DataError
from pantheraml.training.global_batch import GlobalBatch
from pantheraml.training.rank_batches import RankStream, first_row
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def stream():
    """29 ragged rows in four files, so to speak, shuffled."""
    return rows().to_iterable_dataset(num_shards=4).shuffle(seed=5, buffer_size=7)


def build(folder, output, per_device, dataset=None, **settings):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=per_device, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, per_device_eval_batch_size=per_device,
        **{"max_steps": 9, **settings},
    )  # fmt: skip
    dataset = stream() if dataset is None else dataset
    return PantheraMLTrainer(model, args, train_dataset=dataset, eval_dataset=stream(), tokenizer=tokenizer)


def train(folder, output, per_device, settings):
    trainer = build(folder, output, per_device, **settings)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    names = ("loss", "grad_norm", "mean_token_accuracy", "num_tokens")
    return [{name: entry[name] for name in names} for entry in logs], trainer.evaluate()["eval_loss"]


@functools.cache
def reference(folder, output):
    """One rank's."""
    return train(folder, output, 12, {})


@pytest.mark.promise("B5")
@pytest.mark.parametrize(
    ("ranks", "per_device", "settings"),
    [
        (1, 3, dict(gradient_accumulation_steps=4)),
        (2, 6, {}),
        (2, 3, dict(gradient_accumulation_steps=2, merge_micro_batches=True)),
        (3, 2, dict(gradient_accumulation_steps=2)),
    ],
)
def test_any_number_of_ranks_trains_the_same(folder, tmp_path_factory, ranks, per_device, settings):
    """Nine steps of 12 rows: three epochs of 29 rows, each of which ends in a step of five."""
    output = tmp_path_factory.getbasetemp()
    logs, eval_loss = reference(folder, output)
    assert len(logs) == 9
    for mine, mine_eval in run_ranks(ranks, train, folder, output, per_device, settings):
        for step, (found, want) in enumerate(zip(mine, logs, strict=True)):
            assert found == pytest.approx(want, rel=2e-6), step
        assert mine_eval == pytest.approx(eval_loss, rel=1e-5)


def read(folder, output):
    """The trained rows of each of two epochs."""
    loader = build(folder, output, 2).get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = [batch for batch in loader if (batch["labels"] != -100).any()]
        epochs.append(
            [
                tuple(ids[mask.bool()].tolist())
                for b in batches
                for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
            ]
        )
    return epochs


@pytest.mark.promise("B4")
def test_each_row_is_on_one_rank(folder, tmp_path):
    by_rank = run_ranks(3, read, folder, tmp_path)
    for epoch in range(2):
        found = [row for rank in by_rank for row in rank[epoch]]
        assert sorted(found) == sorted(tuple(row["input_ids"]) for row in rows())
        assert [len(rank[epoch]) for rank in by_rank] == [10, 10, 9]
    assert by_rank[0][0] != by_rank[0][1], "the second epoch has an order of its own"


BATCH = GlobalBatch(6, 2, 3)


def test_all_ranks_have_as_many_batches():
    def batches(count, **settings):
        return [list(RankStream(range(count), BATCH, rank=rank, **settings)) for rank in range(3)]

    assert batches(8) == [[[0, 1], [6]], [[2, 3], [7]], [[4, 5], []]]
    assert batches(8, drop_last=True) == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert batches(0) == [[], [], []]


def test_a_worker_reads_in_the_same_order_for_every_rank():
    """In one process: ranks of a test are forked, and workers of such ranks may wait for threads that are not there."""
    shares = [
        DataLoader(RankStream(stream(), BATCH, rank=rank), batch_size=None, num_workers=1, collate_fn=list)
        for rank in range(3)
    ]
    found = [tuple(row["input_ids"]) for share in shares for batch in share for row in batch]
    assert sorted(found) == sorted(tuple(row["input_ids"]) for row in rows())


def test_a_stream_has_one_worker(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "_said", set())
    with caplog.at_level("INFO", "pantheraml"):
        trainer = build(folder, tmp_path, 2, dataloader_num_workers=3)
        loader = trainer._share_of_stream(stream(), 2, trainer.data_collator, None, True)
    assert loader.num_workers == 1 and "read by one worker of each rank" in caplog.text


def refused(folder, output, make):
    with pytest.raises(DataError) as found:
        build(folder, output, 2, make()).get_train_dataloader()
    return str(found.value)


def unseeded():
    return rows().to_iterable_dataset(num_shards=4).shuffle(buffer_size=29)


def split():
    import torch.distributed as dist

    return split_dataset_by_node(stream(), dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize(
    ("make", "says"), [(unseeded, "first rows differ"), (split, "split_dataset_by_node")]
)
def test_ranks_that_read_different_streams_are_refused(folder, tmp_path, make, says):
    assert all(says in text for text in run_ranks(2, refused, folder, tmp_path, make))


def test_an_empty_stream_is_refused():
    with pytest.raises(DataError, match="The stream has no rows"):
        first_row(iter(()))
    assert first_row(iter("ab")) == "a"
