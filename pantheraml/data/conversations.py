"""Conversations in the ways people write them, as ``role`` and ``content``."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value
from transformers import PreTrainedTokenizerBase

from pantheraml.errors import ConfigError, DataError

Rows = Dataset | IterableDataset

_ALIASES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "input"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "output"),
    "tool": ("tool", "function", "observation", "ipython"),
}
ROLES = {alias: role for role, aliases in _ALIASES.items() for alias in aliases}
_PLAIN_KEYS = {"role", "content", "from", "value"}
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_COLUMN = re.compile(r"\{([^{}]+)\}")


def normalise_messages(
    messages: Any, roles: Mapping[str, str], row: int, column: str
) -> list[dict[str, Any]]:
    """Messages as dictionaries with ``role`` and ``content``; other keys that hold something are kept.

    Args:
        messages: the messages as the row has them: role and content, or from and value.
        roles: what each name of a speaker means.
        row: index of the row, for errors.
        column: name of the column, for errors.

    Raises:
        DataError: this is no conversation, a text is missing, or a speaker is unknown.
    """
    if not isinstance(messages, list) or not messages:
        raise bad_row(row, column, f"holds {shown(messages)}", "a list of messages, at least one")
    normal = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise bad_row(
                row, column, f"has {shown(message)} as message {number}", "messages of role and content"
            )
        rest = {key: value for key, value in message.items() if value is not None}
        speaker = rest.pop("role", None) or rest.pop("from", None)
        content = rest.pop("content", None)
        if content is None:
            content = rest.pop("value", None)
        role = roles.get(str(speaker).lower())
        if role is None:
            raise bad_row(
                row, column, f"has the speaker {speaker!r} in message {number}", f"one of {', '.join(roles)}"
            )
        if content is None and rest.get("tool_calls"):
            content = ""
        if not isinstance(content, str | list):
            raise bad_row(row, column, f"has {shown(content)} as the text of message {number}", "a text")
        normal.append({"role": role, "content": content, **rest})
    return normal


def message_features(dataset: Rows, column: str) -> Json | List | None:
    """The type of normalised messages: plain texts, or JSON where messages carry more than two keys.

    As plain columns every message would get every key, and templates would take an empty ``tool_calls``
    for a call. None when the columns of a stream are not known.
    """
    if dataset.features is None:
        return None
    given = dataset.features[column]
    message = given.feature if isinstance(given, List) else None
    if (
        isinstance(message, dict)
        and set(message) <= _PLAIN_KEYS
        and all(isinstance(value, Value) for value in message.values())
    ):
        return List({"role": Value("string"), "content": Value("string")})
    return List(Json())


def standardize_sharegpt(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase | None = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
) -> Rows:
    """Rewrite the column ``conversations`` to messages of ``role`` and ``content``.

    Args:
        dataset: rows whose conversations have from and value, or role and content, under any alias.
        tokenizer: when given, its chat template is tried on the first conversation.
        aliases_for_system: names of the system.
        aliases_for_user: names of the user.
        aliases_for_assistant: names of the assistant.

    Returns:
        The rows, with all their other columns.

    Raises:
        DataError: there is no such column, or a row holds no conversation.
    """
    roles = _roles(aliases_for_system, aliases_for_user, aliases_for_assistant)
    return _standardize(dataset, ("conversations",), tokenizer, roles)


def standardize_data_formats(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase | None = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output", "model"),
) -> Rows:
    """As `standardize_sharegpt`, for conversations in ``conversations``, ``conversation`` or ``messages``."""
    roles = _roles(aliases_for_system, aliases_for_user, aliases_for_assistant)
    return _standardize(dataset, ("conversations", "conversation", "messages"), tokenizer, roles)


def _roles(system: Sequence[str], user: Sequence[str], assistant: Sequence[str]) -> dict[str, str]:
    """What each name of a speaker means: the given aliases before the known ones."""
    named = {"system": system, "user": user, "assistant": assistant}
    return {**ROLES, **{alias.lower(): role for role, aliases in named.items() for alias in aliases}}


def _standardize(
    dataset: Rows,
    accepted: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    roles: Mapping[str, str],
) -> Rows:
    columns = column_names(dataset)
    column = next((name for name in accepted if name in columns), None)
    if column is None:
        raise DataError(
            got=f"The data set has the columns {columns}.",
            need=f"A column {' or '.join(map(repr, accepted))} must hold the conversations.",
            fix="Rename yours with dataset.rename_column(...), or build one with to_sharegpt(...).",
        )
    kind, features = message_features(dataset, column), None
    if kind is not None and dataset.features is not None:
        others = {key: value for key, value in dataset.features.items() if key != column}
        features = Features({**others, "conversations": kind})
    standard = dataset.map(
        _standardize_batch,
        batched=True,
        with_indices=True,
        remove_columns=[column],
        features=features,
        fn_kwargs={"column": column, "roles": roles},
    )
    if tokenizer is not None:
        check_renders(next(iter(standard))["conversations"], tokenizer)
    return standard


def _standardize_batch(
    batch: Mapping[str, list], indices: list[int], column: str, roles: Mapping[str, str]
) -> dict[str, list]:
    rows = zip(batch[column], indices, strict=True)
    return {"conversations": [normalise_messages(messages, roles, index, column) for messages, index in rows]}


def to_sharegpt(
    dataset: Dataset,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = False,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Dataset:
    """Build a column ``conversations`` (from and value) out of the columns of a table.

    Args:
        dataset: the rows.
        merged_prompt: how the columns become one question: ``{column}`` stands for the column's text, and a
            block ``[[...]]`` disappears when a column in it is empty. Without it the column
            ``merged_column_name`` is the question as it is.
        merged_column_name: the column that holds the question, and receives the merged one.
        output_column_name: the column with the answer.
        remove_unused_columns: keep ``conversations`` alone.
        conversation_extension: how many rows, drawn at random, are joined into one conversation.
        random_state: which rows are drawn.

    Returns:
        As many rows as before, each a conversation of ``conversation_extension`` questions and answers.

    Raises:
        DataError: a column is missing, or the data set is a stream.
        ConfigError: the prompt cannot be understood.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(
            got="A streamed data set was given to to_sharegpt.",
            need="Rows are drawn from the whole data set.",
            fix="Load it without streaming.",
        )
    if conversation_extension < 1:
        raise ConfigError(
            got=f"conversation_extension is {conversation_extension}.",
            need="A conversation is made of at least one row.",
            fix="Give 1 or more.",
        )
    template = merged_prompt or f"{{{merged_column_name}}}"
    _check_prompt(template, [*_COLUMN.findall(template), output_column_name], dataset.column_names)
    questions = [fill_prompt(template, row) for row in dataset.select_columns(_used(template)).to_list()]
    answers = ["" if text is None else str(text) for text in dataset[output_column_name]]
    conversations = _join(questions, answers, conversation_extension, random_state)
    if remove_unused_columns:
        return Dataset.from_dict({"conversations": conversations})
    if merged_prompt:
        if merged_column_name in dataset.column_names:
            dataset = dataset.remove_columns(merged_column_name)
        dataset = dataset.add_column(merged_column_name, questions)
    if "conversations" in dataset.column_names:
        dataset = dataset.remove_columns("conversations")
    return dataset.add_column("conversations", conversations)


def _join(
    questions: list[str], answers: list[str], turns: int, random_state: int
) -> list[list[dict[str, str]]]:
    """Conversations of ``turns`` questions and answers: each row, followed by rows drawn at random."""
    generator, count = random.Random(random_state), len(questions)
    orders = [range(count), *(generator.sample(range(count), count) for _ in range(turns - 1))]
    pairs = [
        ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
        for question, answer in zip(questions, answers, strict=True)
    ]
    return [[turn for row in rows for turn in pairs[row]] for rows in zip(*orders, strict=True)]


def fill_prompt(template: str, row: Mapping[str, Any]) -> str:
    """Put a row's texts into a prompt; blocks ``[[...]]`` with an empty column disappear."""

    def text(name: str) -> str:
        return "" if row[name] is None else str(row[name])

    def block(match: re.Match[str]) -> str:
        names = _COLUMN.findall(match[1])
        return match[1] if all(text(name).strip() for name in names) else ""

    # The optional blocks go first: what a column holds is never read as a part of the prompt.
    return _COLUMN.sub(lambda match: text(match[1]), _OPTIONAL.sub(block, template))


def _used(template: str) -> list[str]:
    return list(dict.fromkeys(_COLUMN.findall(template)))


def _check_prompt(template: str, needed: list[str], columns: list[str]) -> None:
    missing = sorted(set(needed) - set(columns))
    if missing:
        raise DataError(
            got=f"There is no column {', '.join(map(repr, missing))}; the columns are {columns}.",
            need="merged_prompt may name columns of the data set in braces, and the answer needs a column.",
            fix="Correct the name in merged_prompt or in output_column_name.",
        )
    if template.count("[[") != template.count("]]"):
        raise ConfigError(
            got=f"merged_prompt has {template.count('[[')} '[[' and {template.count(']]')} ']]'.",
            need="Optional blocks are written [[...]] and do not contain one another.",
            fix="Close each block.",
        )
    if any(not _COLUMN.search(block) for block in _OPTIONAL.findall(template)):
        raise ConfigError(
            got="merged_prompt has an optional block [[...]] that names no column.",
            need="A block disappears when a column named in it is empty.",
            fix="Name a column such as {input} in it, or remove the brackets.",
        )


def check_renders(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Try the chat template on one conversation.

    Raises:
        DataError: the template refuses it.
    """
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            got=f"The tokenizer's chat template refuses the first conversation ({roles}): {error}",
            need="Every conversation must be one that the template can write.",
            fix="Bring the rows into the order the template asks for, or choose another template with "
            "get_chat_template(tokenizer, 'chatml') before.",
        ) from error


def column_names(dataset: Rows) -> list[str]:
    """The columns; for a stream that does not know them, those of its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def shown(value: Any) -> str:
    """What a wrong value is, in words."""
    return (
        "nothing (None)" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"
    )


def bad_row(row: int, column: str, found: str, need: str) -> DataError:
    """The error for a row whose ``column`` has ``found`` where ``need`` is expected."""
    return DataError(
        got=f"Row {row}: the column {column!r} {found}.",
        need=f"Every row needs {need}.",
        fix="Correct the row, or leave such rows out with dataset.filter(...).",
    )
