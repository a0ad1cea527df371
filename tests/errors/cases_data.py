"""Rows that cannot be read, recognised or trained on."""

from __future__ import annotations

from datasets import Dataset

from pantheraml import get_chat_template, standardize_sharegpt, to_sharegpt, train_on_responses_only
from pantheraml.data.sources import load_rows
from tests.errors.workshop import Workshop, case


@case
def no_usable_column(shop: Workshop) -> None:
    shop.trainer([{"question": "two and two", "answer": "four"}])


@case
def preference_rows(shop: Workshop) -> None:
    shop.trainer([{"prompt": "a", "chosen": "b", "rejected": "c"}])


@case
def no_rows(shop: Workshop) -> None:
    shop.trainer(Dataset.from_dict({"text": []}))


@case
def all_labels_masked(shop: Workshop) -> None:
    shop.trainer([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 2)


@case
def nothing_in_a_needed_field(shop: Workshop) -> None:
    rows = [{"instruction": "Add.", "output": "Done."}, {"instruction": "Add.", "output": None}]
    shop.trainer(rows)


@case
def nothing_said(shop: Workshop) -> None:
    shop.trainer(
        [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": None}]}]
    )


@case
def unknown_role(shop: Workshop) -> None:
    shop.trainer([{"messages": [{"role": "usr", "content": "Hello"}]}])


@case
def responses_that_do_not_occur(shop: Workshop) -> None:
    trainer = shop.trainer([{"text": "one two three"}])
    train_on_responses_only(trainer, instruction_part="### Question:", response_part="### Answer:")


@case
def responses_with_one_part(shop: Workshop) -> None:
    train_on_responses_only(tokenizer=shop.tokenizer, instruction_part="### Question:")


@case
def responses_without_a_tokenizer(shop: Workshop) -> None:
    train_on_responses_only()


@case
def unknown_chat_template(shop: Workshop) -> None:
    get_chat_template(shop.tokenizer, "lama-3")


@case
def unknown_key_of_a_mapping(shop: Workshop) -> None:
    get_chat_template(shop.tokenizer, "chatml", mapping={"rol": "from"})


@case
def standardized_without_conversations(shop: Workshop) -> None:
    standardize_sharegpt(Dataset.from_list([{"text": "a"}]))


@case
def merged_prompt_of_a_missing_column(shop: Workshop) -> None:
    to_sharegpt(
        Dataset.from_list([{"question": "a", "answer": "b"}]),
        merged_prompt="{instruction}",
        output_column_name="answer",
    )


@case
def broken_line(shop: Workshop) -> None:
    load_rows(shop.file("rows.jsonl", '{"text": "a"}\n{"text": "b"\n'))


@case
def unknown_extension(shop: Workshop) -> None:
    load_rows(shop.file("rows.xlsx", "a"))


@case
def missing_file(shop: Workshop) -> None:
    shop.file("rows.jsonl", '{"text": "a"}\n')
    load_rows(shop.root / "row.jsonl")


@case
def empty_file(shop: Workshop) -> None:
    load_rows(shop.file("empty.jsonl", ""))


@case
def folder_without_data(shop: Workshop) -> None:
    load_rows(shop.folder("nothing"))


@case
def missing_split(shop: Workshop) -> None:
    load_rows(shop.file("rows.jsonl", '{"text": "a"}\n'), split="validation")


@case
def data_set_offline(shop: Workshop) -> None:
    load_rows("nobody/nothing-at-all")
