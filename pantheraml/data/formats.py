"""Which format rows are in, and the same rows as TRL's ``SFTTrainer`` takes them.

Everything chat-like becomes ``messages``; TRL applies the chat template and tokenises. Columns that are
not needed are dropped, so that nothing else is guessed from them later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from pantheraml.data.chat_templates import begins_with_bos, get_chat_template, template_text
from pantheraml.data.conversations import (
    ROLES,
    bad_row,
    check_renders,
    column_names,
    message_features,
    normalise_messages,
    shown,
)
from pantheraml.errors import DataError
from pantheraml.log import say_once

Rows = Dataset | IterableDataset
Batch = dict[str, list]

_TOKENISED = ("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths")
# What TRL reads beside the messages of a row.
_BESIDE = ("tools", "chat_template_kwargs")
_PAIR = ("prompt", "completion")
_ACCEPTED = (
    "text; prompt and completion; messages; conversations (from and value); "
    "instruction, input and output (Alpaca); input_ids"
)


@dataclass(frozen=True)
class DetectedFormat:
    """What rows were recognised as.

    Args:
        name: ``tokenised``, ``text``, ``prompt_completion``, ``messages``, ``sharegpt`` or ``alpaca``.
        columns: the columns that are used.
        reason: a sentence for the log.
    """

    name: str
    columns: tuple[str, ...]
    reason: str


def detect_format(columns: list[str], text_field: str = "text") -> DetectedFormat:
    """Recognise a format by its columns.

    A column of finished text wins over the columns it was made from, which often stay beside it.

    Args:
        columns: the column names.
        text_field: name of the column that holds finished text.

    Raises:
        DataError: no format fits.
    """
    have = set(columns)
    known = (
        ("tokenised", {"input_ids"}, _TOKENISED, "already tokenised rows"),
        ("text", {text_field}, (text_field,), "finished text"),
        ("prompt_completion", set(_PAIR), (*_PAIR, *_BESIDE), "prompts and completions"),
        ("messages", {"messages"}, ("messages", *_BESIDE), "conversations"),
        ("sharegpt", {"conversations"}, ("conversations", *_BESIDE), "ShareGPT conversations"),
        ("alpaca", {"instruction", "output"}, ("instruction", "input", "output"), "Alpaca instructions"),
    )
    for name, needed, used, words in known:
        if needed <= have:
            kept = tuple(column for column in used if column in have)
            ignored = [column for column in columns if column not in kept]
            beside = f"; not used: {', '.join(ignored)}" if ignored else ""
            return DetectedFormat(name, kept, f"The data are {words} (columns {', '.join(kept)}{beside}).")
    preference = (
        " These look like preference data, which DPOTrainer and RewardTrainer take."
        if {"chosen", "rejected"} <= have
        else ""
    )
    raise DataError(
        got=f"The data set has the columns {', '.join(columns) or '(none)'}.{preference}",
        need=f"One of these formats is needed: {_ACCEPTED}.",
        fix="Rename the columns with dataset.rename_column(...), or give the trainer formatting_func=..., a "
        "function that makes the text of a row.",
    )


def format_dataset(
    dataset: Rows, tokenizer: PreTrainedTokenizerBase, *, text_field: str = "text"
) -> tuple[Rows, DetectedFormat]:
    """Bring rows into the form that TRL's ``SFTTrainer`` reads.

    Args:
        dataset: rows in any known format, loaded or streamed.
        tokenizer: receives the ``alpaca`` template when the rows are conversations and it has no template.
        text_field: name of the column that holds finished text.

    Returns:
        The rows with nothing but the columns that are trained on, and what they were recognised as. Finished
        text stays in ``text_field``; conversations of all kinds are in ``messages``.

    Raises:
        DataError: no rows, no known format, or a row that does not hold what its format needs.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(
            got="The data set has no rows.",
            need="Training needs at least one row.",
            fix="Check the file and the split it was read from, and any filter applied to it.",
        )
    found = detect_format(column_names(dataset), text_field)
    convert, options = _converter(found, first, tokenizer)
    chat = convert in (_messages, _alpaca)
    dataset = dataset.select_columns(list(found.columns))
    dropped = [column for column in found.columns if column not in _kept(found)]
    progress: dict[str, Any] = (
        {"desc": f"Formatting rows ({found.name})"} if isinstance(dataset, Dataset) else {}
    )
    formatted = dataset.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=dropped,
        features=_features(dataset, found) if chat else None,
        fn_kwargs=options,
        **progress,
    )
    if chat:
        row = next(iter(formatted))
        check_renders(row.get("messages") or row["prompt"] + row["completion"], tokenizer)
    return formatted, found


def _converter(
    found: DetectedFormat, first: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[Callable[..., Batch], dict[str, Any]]:
    """The function that converts a batch, and its options."""
    if found.name == "tokenised":
        return _tokenised, {}
    if found.name == "text" or (found.name == "prompt_completion" and not isinstance(first["prompt"], list)):
        # Rendered texts often hold the begin token that the tokenizer will put before them once more.
        bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
        return _texts, {"columns": _PAIR if found.name == "prompt_completion" else found.columns, "bos": bos}
    _ensure_template(tokenizer)
    if found.name == "alpaca":
        return _alpaca, {}
    source = (
        {column: column for column in _PAIR}
        if found.name == "prompt_completion"
        else {"messages": found.columns[0]}
    )
    return _messages, {"source": source, "tools": "tool_calls" in (template_text(tokenizer) or "")}


def _kept(found: DetectedFormat) -> tuple[str, ...]:
    """The columns that are there before and after."""
    if found.name in ("sharegpt", "alpaca"):
        return tuple(column for column in found.columns if column in _BESIDE)
    return found.columns


def _features(dataset: Rows, found: DetectedFormat) -> Features | None:
    """The types of formatted conversations; None for a stream whose types are not known."""
    if dataset.features is None:
        return None
    beside = {column: dataset.features[column] for column in found.columns if column in _BESIDE}
    if found.name == "alpaca":
        return Features({"messages": List({"role": Value("string"), "content": Value("string")})})
    if found.name == "prompt_completion":
        return Features({**{column: message_features(dataset, column) for column in _PAIR}, **beside})
    return Features({"messages": message_features(dataset, found.columns[0]), **beside})


def _tokenised(batch: Batch, indices: list[int]) -> Batch:
    for row, index in enumerate(indices):
        input_ids = batch["input_ids"][row]
        if not isinstance(input_ids, list) or not input_ids or not isinstance(input_ids[0], int):
            raise bad_row(
                index, "input_ids", f"holds {shown(input_ids)}", "a list of token ids, at least one"
            )
        for column in ("labels", "completion_mask", "assistant_masks"):
            if column in batch and len(batch[column][row] or ()) != len(input_ids):
                raise bad_row(
                    index, column, "differs in length from input_ids", "as many of them as token ids"
                )
    return batch


def _texts(batch: Batch, indices: list[int], columns: tuple[str, ...], bos: str) -> Batch:
    return {
        column: [
            _string(text, index, column).removeprefix(bos if column == columns[0] else "")
            for text, index in zip(batch[column], indices, strict=True)
        ]
        for column in columns
    }


def _messages(batch: Batch, indices: list[int], source: Mapping[str, str], tools: bool) -> Batch:
    """``source`` maps new columns to old ones; ``tools`` says whether the template writes tool calls."""
    return {
        new: [
            _conversation(value, index, old, tools) for value, index in zip(batch[old], indices, strict=True)
        ]
        for new, old in source.items()
    }


def _conversation(value: Any, row: int, column: str, tools: bool) -> list[dict[str, Any]]:
    messages = normalise_messages(value, ROLES, row, column)
    if not tools and any(message.get("tool_calls") for message in messages):
        raise DataError(
            got=f"Row {row}: the column {column!r} holds a tool call.",
            need="The tokenizer's chat template does not write tool calls: they would be lost.",
            fix="Choose a template that does: get_chat_template(tokenizer, 'qwen-3') or 'llama-3.1'.",
        )
    return messages


def _alpaca(batch: Batch, indices: list[int]) -> Batch:
    inputs = batch.get("input") or [None] * len(indices)
    conversations = []
    for instruction, given, output, index in zip(
        batch["instruction"], inputs, batch["output"], indices, strict=True
    ):
        question = _string(instruction, index, "instruction")
        if given is not None and _string(given, index, "input").strip():
            question = f"{question}\n\n{given}"
        answer = _string(output, index, "output")
        conversations.append(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )
    return {"messages": conversations}


def _string(value: Any, row: int, column: str) -> str:
    if not isinstance(value, str):
        raise bad_row(row, column, f"holds {shown(value)}", "a text in it")
    return value


def _ensure_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if template_text(tokenizer) is not None:
        return
    get_chat_template(tokenizer, "alpaca")
    say_once(
        "The tokenizer has no chat template: the 'alpaca' template (plain headings) is used. For another, "
        "call get_chat_template(tokenizer, ...) before the data are formatted."
    )
