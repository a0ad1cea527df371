"""Micro-batches in several passes, and what is remembered of passes that did not fit."""

from __future__ import annotations

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pantheraml.devices.out_of_memory import is_out_of_memory
from pantheraml.training.merging import FlatCollator, merge_batches
from pantheraml.training.pass_cuts import cut_batch, cut_flat, filler, num_tokens
from pantheraml.training.pass_limit import PassLimit
from pantheraml.training.sample_keys import NUMBERS

LENGTHS = (5, 9, 3, 12, 4)


def examples():
    ids = [list(range(10 * number, 10 * number + length)) for number, length in enumerate(LENGTHS, 1)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


def collator(**settings):
    return DataCollatorForLanguageModeling(pad_token_id=0, **settings)


@pytest.mark.parametrize(("most", "rows"), [(60, [5]), (36, [3, 2]), (24, [2, 2, 1]), (5, [1] * 5)])
def test_rows(most, rows):
    batch = collator()(examples()) | {"use_cache": False}
    parts = cut_batch(batch, most)
    assert [len(part["input_ids"]) for part in parts] == rows
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    assert all(part["use_cache"] is False for part in parts)


@pytest.mark.parametrize(
    ("most", "sizes"), [(33, [33]), (17, [17, 16]), (14, [14, 3, 12, 4]), (1, list(LENGTHS))]
)
def test_documents(most, sizes):
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    # Newer TRL's collator says so itself.
    batch = collator(padding_free=True)(examples()) | {"cu_seq_lens_q": offsets, "max_length_q": max(LENGTHS)}
    parts = cut_batch(batch, most)
    assert [num_tokens(part) for part in parts] == sizes
    assert torch.equal(torch.cat([part["input_ids"] for part in parts], 1), batch["input_ids"])
    for part in parts:
        assert part["cu_seq_lens_q"].diff().max() == part["max_length_q"]
        assert (part["cu_seq_lens_q"][0], part["cu_seq_lens_q"][-1]) == (0, num_tokens(part))
        assert torch.equal((part["position_ids"][0] == 0).nonzero()[:, 0], part["cu_seq_lens_q"][:-1].long())


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_pass_that_trains_nothing(padding_free):
    batch = collator(padding_free=padding_free)(examples())
    few = filler(
        batch | {"cu_seq_lens_q": torch.tensor([0, 33]), "max_length_q": 33, "label_index": torch.ones(3)}
    )
    assert set(few) == {"input_ids", "labels"} and (few["labels"] == -100).all()
    assert torch.equal(few["input_ids"], batch["input_ids"][:1, :16])
    row = filler(batch | {"pixel_values": torch.ones(5, 3)})
    assert (row["labels"] == -100).all() and row["input_ids"].shape[1] == batch["input_ids"].shape[1]


def test_flat_batches_are_as_the_collator_makes_them():
    flat = FlatCollator(collator())
    parts = cut_flat(flat(examples()), 17)
    for part, rows in zip(parts, (examples()[:3], examples()[3:]), strict=True):
        wanted = flat(rows)
        assert part["lengths"] == wanted["lengths"] and (part["label_at"] == wanted["label_at"]).all()
        for name in ("input_ids", "labels", "position_ids", "cu_seq_lens_q"):
            assert torch.equal(part[name], wanted[name])
    assert [num_tokens(one) for one in merge_batches(parts, 40)] == [0, 33]


def test_rows_keep_their_numbers():
    numbers = torch.arange(70, 75).numpy()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    ways = [
        cut_batch(collator()(examples()) | {NUMBERS: numbers}, 24),
        cut_batch(collator(padding_free=True)(examples()) | {"cu_seq_lens_q": offsets, NUMBERS: numbers}, 17),
        cut_flat(FlatCollator(collator())(examples()) | {NUMBERS: numbers}, 17),
    ]
    found = [[part[NUMBERS].tolist() for part in parts] for parts in ways]
    assert found == [[[70, 71], [72, 73], [74]], [[70, 71, 72], [73, 74]], [[70, 71, 72], [73, 74]]]
    packed = cut_batch(collator(padding_free=True)(examples()) | {NUMBERS: numbers[:1]}, 17)
    assert [part[NUMBERS].tolist() for part in packed] == [[70], [70]], "documents of one packed row"


def test_what_is_not_of_rows_stays_whole():
    batch = collator()(examples())
    assert len(cut_batch(batch | {"pixel_values": torch.zeros(12, 3)}, 12)) == 1
    assert len(cut_batch({"inputs_embeds": torch.zeros(4, 8, 2)}, 8)) == 1
    row = {name: value[:1] for name, value in batch.items()}
    assert len(cut_batch(row, 2)) == 1, "its positions do not say where documents begin"


def test_what_has_fitted_is_not_cut():
    limit = PassLimit()
    limit.passed(7000)
    assert limit.failed(8000, proven=7000) == 7000
    assert limit.failed(6500, proven=7000) == 3250, "what has fitted before fits no longer"
    limit.passed(3000)
    assert limit.failed(3200, proven=1000) == 1600, "of all ranks the least"


def test_which_errors_are_meant():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    )
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(
        torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'")
    )
    assert not is_out_of_memory(ValueError("out of memory"))
