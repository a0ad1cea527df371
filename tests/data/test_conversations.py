"""Conversations rewritten, and tables made into conversations."""

from __future__ import annotations

import pytest
from datasets import Dataset

from pantheraml.data.conversations import (
    fill_prompt,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)
from pantheraml.errors import ConfigError, DataError

SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
STANDARD = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]
TABLE = Dataset.from_dict(
    {"name": ["Ann", "Bob", "Cid"], "age": [30, None, 50], "output": ["x", "y", None], "id": [1, 2, 3]}
)


@pytest.mark.promise("F5")
@pytest.mark.parametrize("streaming", [False, True])
def test_standardize_sharegpt_keeps_other_columns(streaming):
    rows = Dataset.from_list([{"conversations": SHAREGPT, "id": 7}])
    rows = standardize_sharegpt(rows.to_iterable_dataset() if streaming else rows)
    assert list(rows) == [{"id": 7, "conversations": STANDARD}]
    assert list(standardize_sharegpt(rows)) == [{"id": 7, "conversations": STANDARD}]


def test_standardize_with_own_aliases():
    rows = Dataset.from_list([{"conversations": [{"from": "Q", "value": "q"}, {"from": "A", "value": "a"}]}])
    standard = standardize_sharegpt(rows, aliases_for_user=["Q"], aliases_for_assistant=["A"])
    assert standard[0]["conversations"] == STANDARD[1:]
    with pytest.raises(DataError, match=r"Row 0: .* the speaker 'Q'"):
        standardize_sharegpt(rows)


def test_standardize_needs_conversations():
    rows = Dataset.from_list([{"messages": STANDARD}])
    with pytest.raises(DataError, match=r"columns \['messages'\].*'conversations'"):
        standardize_sharegpt(rows)
    assert standardize_data_formats(rows)[0] == {"conversations": STANDARD}
    with pytest.raises(DataError, match="'conversations' or 'conversation' or 'messages'"):
        standardize_data_formats(Dataset.from_list([{"text": "x"}]))


def test_standardize_tries_the_template(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match="refuses the first conversation"):
        standardize_sharegpt(Dataset.from_list([{"conversations": SHAREGPT}]), tokenizer)


def test_fill_prompt():
    template = "Hello {name}.[[\nYou are {age}.]] {{x}}"
    assert fill_prompt(template, {"name": "Ann", "age": 30, "x": "!"}) == "Hello Ann.\nYou are 30. {!}"
    assert fill_prompt(template, {"name": "Ann", "age": None, "x": ""}) == "Hello Ann. {}"
    assert fill_prompt("{name}", {"name": "{age} [[{name}]]"}) == "{age} [[{name}]]"


@pytest.mark.promise("F5")
def test_to_sharegpt_merges_columns():
    rows = to_sharegpt(TABLE, merged_prompt="{name}[[ is {age}]]")
    assert rows.column_names == ["name", "age", "output", "id", "instruction", "conversations"]
    assert rows["instruction"][:] == ["Ann is 30", "Bob", "Cid is 50"]
    assert rows["conversations"][:] == [
        [{"from": "human", "value": "Ann is 30"}, {"from": "gpt", "value": "x"}],
        [{"from": "human", "value": "Bob"}, {"from": "gpt", "value": "y"}],
        [{"from": "human", "value": "Cid is 50"}, {"from": "gpt", "value": ""}],
    ]


def test_to_sharegpt_without_a_prompt_takes_the_column():
    rows = to_sharegpt(TABLE, merged_column_name="name", remove_unused_columns=True)
    assert rows.column_names == ["conversations"]
    assert rows[1]["conversations"][0] == {"from": "human", "value": "Bob"}


def test_to_sharegpt_joins_rows():
    table = Dataset.from_dict(
        {"instruction": [f"q{i}" for i in range(50)], "output": [f"a{i}" for i in range(50)]}
    )
    rows = to_sharegpt(table, conversation_extension=3)
    assert len(rows) == 50
    for index, conversation in enumerate(rows["conversations"]):
        values = [turn["value"] for turn in conversation]
        assert [turn["from"] for turn in conversation] == ["human", "gpt"] * 3
        assert values[0] == f"q{index}"
        assert all(
            question[1:] == answer[1:] for question, answer in zip(values[::2], values[1::2], strict=True)
        )
    seconds = [conversation[2]["value"] for conversation in rows["conversations"]]
    assert sorted(seconds) == sorted(table["instruction"]) and seconds != table["instruction"][:]
    again = to_sharegpt(table, conversation_extension=3)
    other = to_sharegpt(table, conversation_extension=3, random_state=1)
    assert again["conversations"][:] == rows["conversations"][:] != other["conversations"][:]


def test_result_is_standardized_and_formatted(tokenizer):
    rows = standardize_sharegpt(to_sharegpt(TABLE, merged_prompt="{name}"), tokenizer)
    assert rows[0]["conversations"] == [
        {"role": "user", "content": "Ann"},
        {"role": "assistant", "content": "x"},
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"merged_prompt": "{nme}"}, DataError, "no column 'nme'; the columns are .*'name'"),
        ({"merged_prompt": "{name}", "output_column_name": "answer"}, DataError, "no column 'answer'"),
        ({"merged_prompt": "{name}[[ {age}"}, ConfigError, r"1 '\[\[' and 0 '\]\]'"),
        ({"merged_prompt": "{name}[[ old]]"}, ConfigError, "names no column"),
        (
            {"merged_prompt": "{name}", "conversation_extension": 0},
            ConfigError,
            "conversation_extension is 0",
        ),
    ],
)
def test_to_sharegpt_refuses(options, error, message):
    with pytest.raises(error, match=message):
        to_sharegpt(TABLE, **options)


def test_to_sharegpt_refuses_streams():
    with pytest.raises(DataError, match="without streaming"):
        to_sharegpt(TABLE.to_iterable_dataset())
