"""Data audit: in every epoch the rows of all ranks together are the data set, each row once and on one rank.

Without a model: what counts is which tokens the ranks' batches hold. Every row has tokens of its own.
"""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pantheraml.training.global_batch import GlobalBatch
from pantheraml.training.rank_batches import FilledCollator, RankBatches, RankStream

KINDS = ("map", "grouped", "packed", "stream")
EPOCHS = 3


def rows(count):
    """Row i is 3 to 13 times the token 10 + i."""
    return Dataset.from_list([{"input_ids": [10 + i] * (3 + i * 7 % 11)} for i in range(count)])


def loader(kind, given, batch, rank, workers=0, start=(0, 0)):
    """What the trainer gives a rank to read."""
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=kind == "packed")
    if kind == "stream":
        stream = given.to_iterable_dataset(num_shards=3 if len(given) > 2 else 1).shuffle(
            seed=5, buffer_size=7
        )
        mine, sets = RankStream(stream, batch, rank=rank, start=start), dict(batch_size=None)
    elif kind == "grouped":
        mine, sampler = given, LengthGroupedSampler(batch.rows, given, model_input_name="input_ids")
    else:
        mine, sampler = given, RandomSampler(given)
    if kind != "stream":
        sets = dict(batch_sampler=RankBatches(given, sampler, batch, rank=rank, seed=3))
    filled = FilledCollator(collator, given[0])
    return mine, sets, DataLoader(mine, collate_fn=filled, num_workers=workers, **sets)


def epochs_of(kind, given, batch, rank, workers=0, start=(0, 0)):
    """The tokens of each micro-batch of a rank that trains something, by epoch."""
    mine, sets, found = loader(kind, given, batch, rank, workers, start)
    for epoch in range(EPOCHS):
        (mine if kind == "stream" else sets["batch_sampler"]).set_epoch(epoch)
        read = []
        for turn in found:
            trains = (turn["labels"] != -100).any()
            read.append(turn["input_ids"][turn["input_ids"] != 0].tolist() if trains else [])
        yield read


def data_of(kind, count):
    given = rows(count)
    if kind == "packed":
        given = pack_dataset(given, 16, "bfd")
        assert len(given) < count or count < 3
    return given


@pytest.mark.promise("B4")
@pytest.mark.parametrize("count", [1, 23, 29])
@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_is_the_data_set(kind, count):
    given, whole = data_of(kind, count), Counter(token for row in rows(count)["input_ids"] for token in row)
    orders = []
    for ranks in (1, 2, 3, 4):
        for size, per_device in ((4, 1), (6, 4), (8, 2)):
            batch = GlobalBatch(size, per_device, ranks)
            by_rank = [list(epochs_of(kind, given, batch, rank)) for rank in range(ranks)]
            for epoch in range(EPOCHS):
                read = [rank[epoch] for rank in by_rank]
                assert len({len(turns) for turns in read}) == 1, "as many micro-batches on every rank"
                found = [token for turns in zip(*read, strict=True) for tokens in turns for token in tokens]
                assert Counter(found) == whole, (batch, epoch)
                if size == 4:
                    orders.append((epoch, found))
    for epoch, found in orders:
        if kind != "grouped" and count > 1:  # its order within a step is the collator's to choose
            assert found == orders[epoch][1], "in one order, on any number of ranks"
            assert epoch == 0 or found != orders[0][1], "another one in every epoch"


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_nothing(kind):
    given, batch = data_of(kind, 29), GlobalBatch(8, 2, 2)
    # A stream is read by one worker.
    workers = 1 if kind == "stream" else 2
    assert list(epochs_of(kind, given, batch, 1, workers)) == list(epochs_of(kind, given, batch, 1))


@pytest.mark.promise("B4")
def test_a_stream_goes_on_with_the_rest_of_its_epoch():
    given, batch = rows(29), GlobalBatch(8, 2, 2)
    for rank in range(2):
        whole = list(epochs_of("stream", given, batch, rank))
        for epoch, done in ((0, 8), (0, 24), (1, 16)):
            again = list(epochs_of("stream", given, batch, rank, start=(epoch, done)))
            turns = done // batch.rows * batch.accumulation
            assert again[: EPOCHS - epoch] == [whole[epoch][turns:], *whole[epoch + 1 :]]
