"""Every format becomes what trl trains on, and what cannot be is told by row."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer

from pantheraml import log
from pantheraml.data.chat_templates import detect_template, get_chat_template
from pantheraml.data.formats import detect_format, format_dataset
from pantheraml.data.preview import describe_sample
from pantheraml.errors import DataError
from tests import tiny

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
TOOL_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

# name, rows, what trl gets, and what one row trains as (› ends at the last trained token)
CASES = {
    "text": ({"text": "Once."}, {"text": "Once."}, "‹Once.</s>›"),
    "prompt_completion": (
        {"prompt": "Hi", "completion": " Hello", "id": 7},
        {"prompt": "Hi", "completion": " Hello"},
        "Hi‹ Hello</s>›",
    ),
    "prompt_completion (chat)": (
        {"prompt": [SHAREGPT[0]], "completion": [SHAREGPT[1]]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n‹Hello<|im_end|>\n›",
    ),
    "messages": ({"messages": [USER, ASSISTANT], "id": 7}, {"messages": [USER, ASSISTANT]}, f"‹{CHAT}›"),
    "sharegpt": ({"conversations": SHAREGPT, "source": "x"}, {"messages": [USER, ASSISTANT]}, f"‹{CHAT}›"),
    "sharegpt (role)": ({"conversations": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}, f"‹{CHAT}›"),
    "alpaca": (
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"messages": [USER, ASSISTANT]},
        f"‹{CHAT}›",
    ),
    "alpaca (no input)": (
        {"instruction": "Hi", "output": "Hello"},
        {"messages": [USER, ASSISTANT]},
        f"‹{CHAT}›",
    ),
    "alpaca (None)": (
        {"instruction": "Hi", "input": None, "output": "Hello"},
        {"messages": [USER, ASSISTANT]},
        f"‹{CHAT}›",
    ),
    "tokenised": (
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "id": 7},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        None,
    ),
}


@pytest.mark.promise("A8")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("streaming", [False, True])
def test_formats(case, streaming, tokenizer):
    row, expected, _ = CASES[case]
    rows = Dataset.from_list([row] * 3)
    formatted, found = format_dataset(rows.to_iterable_dataset() if streaming else rows, tokenizer)
    assert isinstance(formatted, IterableDataset if streaming else Dataset)
    assert list(formatted) == [expected] * 3
    assert found.name == case.split()[0]
    assert all(column in found.reason for column in found.columns)
    unused = set(row) - set(found.columns)
    assert all(f"not used: {column}" in found.reason for column in unused)


@pytest.mark.parametrize("case", [case for case, (_, _, trained) in CASES.items() if trained])
def test_trl_trains_on_the_right_tokens(case, tokenizer, tmp_path):
    row, _, trained = CASES[case]
    rows, _ = format_dataset(Dataset.from_list([row] * 2), tokenizer)
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=None)
    trainer = SFTTrainer(tiny.build_model(), arguments, train_dataset=rows, processing_class=tokenizer)
    assert describe_sample(trainer.train_dataset[0], tokenizer).partition("\n")[2] == trained


def test_streams_without_known_columns(tokenizer):
    def produce():
        yield {"conversations": SHAREGPT}
        yield {"conversations": SHAREGPT}

    rows = IterableDataset.from_generator(produce)
    assert rows.features is None
    formatted, found = format_dataset(rows, tokenizer)
    assert (found.name, list(formatted)) == ("sharegpt", [{"messages": [USER, ASSISTANT]}] * 2)


def test_alpaca_input_follows_the_instruction(tokenizer):
    rows = Dataset.from_list([{"instruction": "Classify.", "input": "ant", "output": "insect"}])
    assert format_dataset(rows, tokenizer)[0][0]["messages"][0]["content"] == "Classify.\n\nant"


def test_text_wins_over_the_columns_it_was_made_from(tokenizer):
    rows = Dataset.from_list([{"conversations": SHAREGPT, "text": "finished"}])
    formatted, found = format_dataset(rows, tokenizer)
    assert formatted[0] == {"text": "finished"}
    assert "not used: conversations" in found.reason


def test_text_field(tokenizer):
    rows = Dataset.from_list([{"body": "finished", "text": "other"}])
    assert format_dataset(rows, tokenizer, text_field="body")[0][0] == {"body": "finished"}


def test_begin_token_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    rows = Dataset.from_list([{"text": "<s>Once."}, {"text": "Twice."}])
    assert format_dataset(rows, tokenizer)[0]["text"][:] == ["<s>Once.", "Twice."]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert format_dataset(rows, tokenizer)[0]["text"][:] == ["Once.", "Twice."]


def test_tool_calls_reach_the_template_unchanged(tokenizer, tmp_path):
    calling = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": "1"},
    ]
    rows = Dataset.from_list(
        [{"messages": calling, "tools": "[]"}, {"messages": [USER, ASSISTANT], "tools": "[]"}]
    )
    get_chat_template(tokenizer, "qwen-2.5")
    formatted, found = format_dataset(rows, tokenizer)
    assert found.columns == ("messages", "tools")
    assert formatted[0]["messages"] == [USER, {**calling[1], "content": ""}, calling[2]]
    assert formatted[1]["messages"] == [USER, ASSISTANT]
    arguments = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=None,
        shuffle_dataset=False,
    )
    trainer = SFTTrainer(tiny.build_model(), arguments, train_dataset=formatted, processing_class=tokenizer)
    text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text


def test_tool_calls_that_would_be_lost_are_refused(tokenizer):
    rows = Dataset.from_list([{"messages": [USER, {**ASSISTANT, "tool_calls": [TOOL_CALL]}]}])
    with pytest.raises(DataError, match=r"Row 0: .* holds a tool call"):
        format_dataset(rows, tokenizer)


def test_tokenizer_without_template_gets_ours_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level("INFO", logger="pantheraml")
    rows = Dataset.from_list([{"instruction": "Hi", "output": "Hello"}])
    for _ in range(2):
        tokenizer = tiny.build_tokenizer(chat_template=None)
        format_dataset(rows, tokenizer)
        assert detect_template(tokenizer).name == "alpaca"
    assert caplog.text.count("the 'alpaca' template") == 1
    assert "get_chat_template" in caplog.text


def test_plain_text_needs_no_template():
    tokenizer = tiny.build_tokenizer(chat_template=None)
    format_dataset(Dataset.from_list([{"text": "x"}]), tokenizer)
    assert tokenizer.chat_template is None


def test_unknown_columns_name_the_formats(tokenizer):
    with pytest.raises(
        DataError, match=r"columns question, answer\..*messages; conversations.*formatting_func="
    ):
        format_dataset(Dataset.from_list([{"question": "a", "answer": "b"}]), tokenizer)
    with pytest.raises(DataError, match="preference data"):
        detect_format(["prompt", "chosen", "rejected"])


@pytest.mark.parametrize("streaming", [False, True])
def test_no_rows(streaming, tokenizer):
    rows = Dataset.from_dict({"text": ["a"]})
    rows = (rows.to_iterable_dataset() if streaming else rows).filter(lambda row: False)
    with pytest.raises(DataError, match="no rows"):
        format_dataset(rows, tokenizer)


GOOD = {
    "text": {"text": "a"},
    "prompt": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "input": "b", "output": "c"},
    "chat": {"messages": [USER, ASSISTANT]},
    "ids": {"input_ids": [1, 2], "labels": [1, 2]},
}


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        ("text", {"text": None}, r"Row 2: the column 'text' holds nothing \(None\)"),
        ("prompt", {"completion": None}, "Row 2: the column 'completion' holds nothing"),
        ("alpaca", {"output": None}, "Row 2: the column 'output' holds nothing"),
        ("alpaca", {"instruction": None}, "Row 2: the column 'instruction' holds nothing"),
        ("chat", {"messages": None}, "Row 2: the column 'messages' holds nothing"),
        ("chat", {"messages": []}, "Row 2: the column 'messages' holds an empty list"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "nothing .* as the text of message 0"),
        ("chat", {"messages": [{"role": "narrator", "content": "x"}]}, "Row 2: .* the speaker 'narrator'"),
        ("ids", {"input_ids": []}, "Row 2: the column 'input_ids' holds an empty list"),
        ("ids", {"labels": [1]}, "Row 2: the column 'labels' differs in length"),
    ],
)
def test_bad_rows_are_named(kind, bad, message, tokenizer):
    good = GOOD[kind]
    with pytest.raises(DataError, match=message):
        format_dataset(Dataset.from_list([good, good, {**good, **bad}]), tokenizer)


@pytest.mark.parametrize(("kind", "column"), [("text", "text"), ("alpaca", "output"), ("chat", "messages")])
def test_columns_of_another_type_are_named(kind, column, tokenizer):
    with pytest.raises(DataError, match=f"Row 0: the column '{column}' holds a int"):
        format_dataset(Dataset.from_list([{**GOOD[kind], column: 5}]), tokenizer)


def test_conversations_the_template_refuses(tokenizer):
    get_chat_template(tokenizer, "alpaca")
    rows = Dataset.from_list([{"messages": [USER, {"role": "tool", "content": "x"}]}])
    with pytest.raises(DataError, match=r"refuses the first conversation \(user, tool\)"):
        format_dataset(rows, tokenizer)


def test_formatting_twice_changes_nothing(tokenizer):
    rows = Dataset.from_list([{"conversations": SHAREGPT}])
    once, _ = format_dataset(rows, tokenizer)
    twice, found = format_dataset(once, tokenizer)
    assert (found.name, list(twice)) == ("messages", list(once))
