"""Rows on their way into the trainer: recognised, and their lengths told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from pantheraml.data.formats import format_dataset
from pantheraml.distributed.process_group import main_process_first
from pantheraml.errors import DataError
from pantheraml.log import say
from pantheraml.models.patching import changed_within

Rows = Dataset | IterableDataset
_NEED = "The trainer takes a datasets.Dataset or a stream, in any format of docs/data-formats.md."
_LOAD = "load_dataset('json', data_files='rows.jsonl', split='train')"


def given_rows(rows: Rows | None) -> Rows:
    """The training rows; an error when there are none."""
    if rows is None:
        raise DataError(
            got="No train_dataset was given.",
            need=_NEED,
            fix=f"Pass train_dataset={_LOAD}.",
        )
    return rows


def format_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, text_field: str, name: str) -> Rows:
    """Rows in a form TRL reads; says what they were recognised as.

    Raises:
        DataError: no data set was given, or rows in no known format.
    """
    _refuse_others(rows, name)
    with main_process_first():
        formatted, found = format_dataset(rows, tokenizer, text_field=text_field)
    say(f"{name} rows: {found.reason}")
    return formatted


def _refuse_others(rows: Any, name: str) -> None:
    """What is no data set is told apart by what it probably stands for: a path, a list of rows, all splits."""
    if isinstance(rows, Rows):
        return
    got, fix = f"The {name} rows are of the class {type(rows).__name__}.", _LOAD
    if isinstance(rows, dict):
        splits = list(rows)
        got = f"The {name} rows are a mapping of {', '.join(map(repr, splits))}."
        fix = f"rows[{splits[0] if splits else 'train'!r}]"
    elif isinstance(rows, list):
        fix = "Dataset.from_list(rows)"
    raise DataError(got=got, need=_NEED, fix=f"Pass {fix}.")


def format_all(
    rows: dict[str, Rows] | Rows | None, tokenizer: PreTrainedTokenizerBase, text_field: str
) -> Any:
    """Rows to evaluate on, or a mapping of name to rows, in a form TRL reads."""
    if rows is None:
        return None
    if not isinstance(rows, dict):
        return format_rows(rows, tokenizer, text_field, "evaluation")
    return {name: format_rows(one, tokenizer, text_field, name) for name, one in rows.items()}


@contextmanager
def prepared_once() -> Iterator[None]:
    """A block in which TRL prepares rows: one rank of each machine fills the cache, however long it takes.

    TRL lets the others wait in a barrier, which ends the run after its timeout. They wait in the store here, and the
    barriers of the block do nothing.
    """
    with main_process_first(), changed_within() as changes:
        changes.bind(PartialState(), "wait_for_everyone", lambda _: None, "the ranks wait in the store")
        yield


def token_counts(rows: Dataset) -> Any:
    """Tokens of each row, as a numpy array of int64: Arrow's int32 overflows in products with them."""
    lengths = rows.with_format("arrow")[:]["input_ids"].combine_chunks().value_lengths()
    return lengths.to_numpy().astype("int64")


def report_cut_rows(name: str, rows: Dataset, most: int) -> None:
    """Say how many rows are longer than ``most`` tokens, and what that costs."""
    lengths = token_counts(rows)
    longer = int((lengths > most).sum())
    if longer:
        lost = int((lengths - most).clip(min=0).sum())
        say(
            f"{longer} of {len(rows)} {name} rows are longer than {most} tokens (the longest has {lengths.max()}) and "
            f"are cut: {lost} of {lengths.sum()} tokens are not trained on. Raise max_seq_length to keep them."
        )
