"""What the log shows of a training row."""

from __future__ import annotations

from pantheraml.data.preview import describe_sample


def test_trained_text_is_marked(tokenizer):
    one, two, three = (tokenizer(text)["input_ids"] for text in ("What is", " the capital", " of France?"))
    row = {"input_ids": one + two + three, "labels": [-100] * len(one) + two + [-100] * len(three)}
    head, _, text = describe_sample(row, tokenizer).partition("\n")
    assert text == "What is‹ the capital› of France?"
    assert head == f"{len(two)} of {len(one + two + three)} tokens are trained on, marked ‹›:"


def test_rows_without_labels_are_trained_whole(tokenizer):
    assert describe_sample({"input_ids": tokenizer("Paris.")["input_ids"]}, tokenizer).endswith("‹Paris.›")


def test_special_tokens_and_line_breaks_are_shown(tokenizer):
    row = {"input_ids": tokenizer("<s>a\nb</s>")["input_ids"]}
    assert describe_sample(row, tokenizer).endswith("‹<s>a\nb</s>›")


def test_long_rows_are_shortened(tokenizer):
    ids = tokenizer("begin " + "the fox " * 2000 + "end")["input_ids"]
    text = describe_sample({"input_ids": ids}, tokenizer)
    assert len(text) < 1000
    assert "‹begin the fox" in text and text.endswith("fox end›") and "[... 15409 characters ...]" in text


def test_packed_rows_tell_their_documents(tokenizer):
    ids = tokenizer("one two")["input_ids"]
    row = {"input_ids": ids * 3, "seq_lengths": [len(ids)] * 3}
    assert "3 documents packed" in describe_sample(row, tokenizer)
