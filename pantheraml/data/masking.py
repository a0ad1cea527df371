"""Training on what the assistant says: labels of -100 everywhere else.

The responses are found in the decoded text of a row and carried back to tokens by their offsets, so it
does not matter how a tokenizer merges the words at a boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from pantheraml.data.offsets import Span, decode_with_offsets
from pantheraml.data.turns import TurnParts, find_turn_parts
from pantheraml.errors import ConfigError, DataError
from pantheraml.log import say

Rows = Dataset | IterableDataset

IGNORED = -100
# Rows of a stream that are read ahead to see whether anything is trained on.
_STREAM_PROBE = 64


@dataclass(frozen=True)
class ResponseMask:
    """Called with a row, or with a batch of rows, returns its ``labels``.

    Args:
        tokenizer: the tokenizer that made the rows.
        parts: the texts around what user and assistant say.
    """

    tokenizer: PreTrainedTokenizerBase
    parts: TurnParts

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """The ``labels`` of a row or of a batch, -100 outside the responses."""
        rows = example["input_ids"]
        if len(rows) and hasattr(rows[0], "__len__"):
            columns = [key for key in ("input_ids", "labels", "seq_lengths") if key in example]
            values = zip(*(example[key] for key in columns), strict=True)
            return {"labels": [self._labels(dict(zip(columns, row, strict=True))) for row in values]}
        return {"labels": self._labels(example)}

    def _labels(self, row: Mapping[str, Any]) -> list[int]:
        """Labels of one row; the documents of a packed row (``seq_lengths``) are masked one by one."""
        input_ids = list(row["input_ids"])
        labels = input_ids if row.get("labels") is None else row["labels"]
        lengths = [len(input_ids)] if row.get("seq_lengths") is None else row["seq_lengths"]
        masked, start = [], 0
        for length in lengths:
            end = start + length
            keep = self._trained(input_ids[start:end])
            masked += [
                label if kept else IGNORED for label, kept in zip(labels[start:end], keep, strict=True)
            ]
            start = end
        return masked

    def _trained(self, input_ids: list[int]) -> list[bool]:
        text, offsets = decode_with_offsets(input_ids, self.tokenizer)
        spans = find_responses(text, self.parts, str(self.tokenizer.eos_token or ""))
        return [
            any(
                start < span_end and (end > span_start or start >= span_start)
                for span_start, span_end in spans
            )
            for start, end in offsets
        ]


def find_responses(text: str, parts: TurnParts, eos_token: str = "") -> list[Span]:
    """The spans of the assistant's texts, each with the token that ends its turn.

    A response ends after the end of its turn or the tokenizer's end token, before the next question, or
    with the text, whichever comes first.
    """
    spans, start = [], text.find(parts.response_part)
    while start >= 0:
        start += len(parts.response_part)
        ends = [len(text)]
        if (question := text.find(parts.instruction_part, start)) >= 0:
            ends.append(question)
        for stop in filter(None, (parts.end_of_turn, eos_token)):
            if (found := text.find(stop, start)) >= 0:
                ends.append(found + len(stop))
        spans.append((start, min(ends)))
        start = text.find(parts.response_part, min(ends))
    return spans


def train_on_responses_only(
    trainer: Any = None,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    return_function: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Let the trainer learn only what the assistant says, in every turn, with the token that ends the turn.

    Args:
        trainer: a trainer whose data sets are tokenised (as TRL's are once it is built); changed in place.
        instruction_part: the text before what the user says, such as ``"<|im_start|>user\\n"``.
        response_part: the text before what the assistant says. When both parts are left out they are taken
            from the tokenizer's chat template.
        force_match: find the parts with the white space at their ends; False finds them without it.
        tokenizer: needed only without a trainer.
        return_function: return the function that makes the labels of a row instead of changing the trainer.
        num_proc: processes that mask the rows.

    Returns:
        The trainer, or the function.

    Raises:
        ConfigError: the parts are not known.
        DataError: nothing would be left to train on, or the rows are not tokenised.
    """
    if tokenizer is None:
        tokenizer = getattr(trainer, "processing_class", None)
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    if tokenizer is None:
        raise ConfigError(
            got="train_on_responses_only was given neither a trainer nor a tokenizer.",
            need="The responses are found in decoded rows, which takes the tokenizer that made them.",
            fix="Give trainer=..., or tokenizer=... with return_function=True.",
        )
    mask = _build_mask(tokenizer, instruction_part, response_part, force_match)
    if return_function or trainer is None:
        return mask
    trainer.train_dataset = _mask_rows(trainer.train_dataset, mask, num_proc, "training")
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {
            key: _mask_rows(rows, mask, num_proc, key) for key, rows in trainer.eval_dataset.items()
        }
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = _mask_rows(trainer.eval_dataset, mask, num_proc, "validation")
    if isinstance(trainer.data_collator, DataCollatorForLanguageModeling):
        # That collator writes labels of its own over ours.
        trainer.data_collator = DataCollatorForSeq2Seq(tokenizer)
    return trainer


def mask_rows_to_responses(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    instruction_part: str | None = None,
    response_part: str | None = None,
    *,
    force_match: bool = True,
    num_proc: int | None = None,
) -> Rows:
    """Rows with ``labels`` of -100 outside the assistant's texts; rows without any such text are removed.

    Arguments and errors are those of `train_on_responses_only`.
    """
    mask = _build_mask(tokenizer, instruction_part, response_part, force_match)
    return _mask_rows(dataset, mask, num_proc, "given")


def check_labels(dataset: Rows) -> None:
    """Refuse rows of which every label is -100: nothing would be learned and the loss be 0 or NaN.

    Reads rows until the first one with something to train on; of a stream, its first rows.

    Raises:
        DataError: all labels are masked, or there is no row.
    """
    rows = islice(dataset, None if isinstance(dataset, Dataset) else _STREAM_PROBE)
    count = 0
    for count, row in enumerate(rows, start=1):  # noqa: B007
        if "labels" not in row or _has_target(row["labels"]):
            return
    raise DataError(
        got=f"All labels of all {count} rows are -100." if count else "The data set has no rows left.",
        need="At least one token must be trained on. Usually max_length cuts rows before the response "
        "begins, or the text that marks a response does not occur in them.",
        fix="Raise max_length (max_seq_length), or check instruction_part and response_part.",
    )


def _has_target(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels)


def _has_targets(batch: Mapping[str, list]) -> list[bool]:
    return [_has_target(labels) for labels in batch["labels"]]


def _build_mask(
    tokenizer: PreTrainedTokenizerBase,
    instruction_part: str | None,
    response_part: str | None,
    force_match: bool,
) -> ResponseMask:
    if bool(instruction_part) != bool(response_part):
        raise ConfigError(
            got="Only one of instruction_part and response_part is given.",
            need="Both are needed: one text begins a question, the other a response.",
            fix="Give both, or neither to take them from the chat template.",
        )
    found = find_turn_parts(tokenizer)
    if instruction_part and response_part:
        parts = TurnParts(_as_decoded(instruction_part, tokenizer), _as_decoded(response_part, tokenizer))
        if found and (parts.instruction_part, parts.response_part) == (
            found.instruction_part,
            found.response_part,
        ):
            parts = found
    elif found:
        parts = found
    else:
        raise ConfigError(
            got="The tokenizer has no chat template from which the parts of a conversation can be read.",
            need="What begins a question and what begins a response must be known.",
            fix='Give instruction_part="..." and response_part="..." as they stand in your texts, or set a '
            "template with get_chat_template(tokenizer, ...) before the data are formatted.",
        )
    if not force_match:
        parts = TurnParts(parts.instruction_part.strip(), parts.response_part.strip(), parts.end_of_turn)
    return ResponseMask(tokenizer, parts)


def _as_decoded(part: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The part as decoded rows hold it: some tokenizers decode with a space after each special token."""
    return decode_with_offsets(tokenizer(part, add_special_tokens=False)["input_ids"], tokenizer)[0]


def _mask_rows(dataset: Rows, mask: ResponseMask, num_proc: int | None, name: str) -> Rows:
    first = next(iter(dataset), None)
    if first is None or "input_ids" not in first:
        raise DataError(
            got=f"The {name} rows have the columns {sorted(first or {})}.",
            need="Responses are masked in tokenised rows (a column input_ids), as SFTTrainer makes them.",
            fix="Call train_on_responses_only after the trainer is built, and give each data set a row.",
        )
    if not isinstance(dataset, Dataset):
        masked = dataset.map(mask, batched=True).filter(_has_targets, batched=True)
        if not any(_has_target(mask(row)["labels"]) for row in islice(dataset, _STREAM_PROBE)):
            raise _nothing_left(first, mask)
        return masked
    masked = dataset.map(mask, batched=True, num_proc=num_proc, desc="Masking all but the responses")
    kept = masked.filter(_has_targets, batched=True, num_proc=num_proc)
    if len(kept) == 0:
        raise _nothing_left(first, mask)
    if len(kept) < len(dataset):
        say(
            f"{len(dataset) - len(kept)} of {len(dataset)} {name} rows hold no response and were removed: "
            f"they were cut before it begins, or lack the text {mask.parts.response_part!r}."
        )
    return kept


def _nothing_left(row: Mapping[str, Any], mask: ResponseMask) -> DataError:
    text, _ = decode_with_offsets(row["input_ids"], mask.tokenizer)
    return DataError(
        got=f"No row holds a response. A row begins with {text[:300]!r}.",
        need=f"A response begins after {mask.parts.response_part!r}, "
        f"a question after {mask.parts.instruction_part!r}.",
        fix="Give instruction_part and response_part as they stand in that row (force_match=False ignores "
        "white space at their ends), or raise max_length if rows are cut before the response.",
    )
