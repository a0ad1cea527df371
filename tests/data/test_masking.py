"""Only what the assistant says is trained on: every turn, with its end, whatever the tokenizer merges."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from pantheraml.data.chat_templates import CHAT_TEMPLATES, get_chat_template
from pantheraml.data.masking import (
    check_labels,
    find_responses,
    mask_rows_to_responses,
    train_on_responses_only,
)
from pantheraml.data.offsets import decode_with_offsets
from pantheraml.data.preview import describe_sample
from pantheraml.data.turns import TurnParts
from pantheraml.errors import ConfigError, DataError
from tests import tiny

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And 12 + 5? Gr\u00fc\u00dfe \u2014 \U0001f600"},
    {"role": "assistant", "content": "17, \U0001f43e of course."},
]
INSTRUCTION, RESPONSE = "<|im_start|>user\n", "<|im_start|>assistant\n"


def sentencepiece_tokenizer():
    """As the tokenizers of Llama 2 and Mistral: words carry their space, unknown characters are bytes."""
    words = ["\u2581", "\u2581USER", "\u2581ASSISTANT", "USER", "ASSISTANT", ":", "\u2581Paris", "Paris", "."]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ?!,'+#\n[]/":
        vocabulary.setdefault(character, len(vocabulary))
    merges = [
        (word[:i], word[i:])
        for word in words
        for i in range(1, len(word))
        if word[:i] in vocabulary and word[i:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def tokenise(tokenizer, messages=MESSAGES):
    return {"input_ids": tokenizer.apply_chat_template(messages, return_dict=False)}


def shown(row, tokenizer):
    return describe_sample(row, tokenizer).partition("\n")[2]


def responses(row, tokenizer):
    """What is trained on, one text a span."""
    return [part.partition("›")[0] for part in shown(row, tokenizer).split("‹")[1:]]


def build_trainer(rows, tmp_path, tokenizer, **options):
    arguments = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=None, **options
    )
    return SFTTrainer(
        tiny.build_model(), arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )


@pytest.mark.promise("F6")
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize(
    "build", [lambda: tiny.build_tokenizer(None), sentencepiece_tokenizer], ids=["bytes", "sp"]
)
def test_every_template_and_tokenizer(name, build):
    tokenizer = build()
    specials = CHAT_TEMPLATES[name].special_tokens
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    get_chat_template(tokenizer, name)
    rows = mask_rows_to_responses(Dataset.from_list([tokenise(tokenizer)]), tokenizer)
    end = CHAT_TEMPLATES[name].eos_token or "</s>"
    # A token may begin with the white space before a response; it is needed to say its first word.
    found = [text.lstrip() for text in responses(rows[0], tokenizer)]
    thoughts = "<think>\n\n</think>\n\n" if name == "qwen-3" else ""
    assert found == [f"Paris.{end}", f"{thoughts}{MESSAGES[-1]['content']}{end}"]


@pytest.mark.promise("F6")
def test_trainer(tokenizer, tmp_path):
    rows = Dataset.from_list([{"messages": MESSAGES}, {"messages": MESSAGES[:3]}])
    trainer = build_trainer(rows, tmp_path, tokenizer)
    assert train_on_responses_only(trainer, INSTRUCTION, RESPONSE) is trainer
    expected = [["Paris.<|im_end|>", f"{MESSAGES[-1]['content']}<|im_end|>"], ["Paris.<|im_end|>"]]
    assert sorted(responses(row, tokenizer) for row in trainer.train_dataset) == sorted(expected)
    assert sorted(responses(row, tokenizer) for row in trainer.eval_dataset) == sorted(expected)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = batch["labels"] != -100
    assert trained.any() and (batch["labels"][trained] == batch["input_ids"][trained]).all()
    assert int(trained.sum()) == sum(
        label != -100 for row in trainer.train_dataset for label in row["labels"]
    )


def test_trainer_with_named_validation_sets_and_parts_of_the_template(tokenizer, tmp_path):
    trainer = build_trainer(Dataset.from_list([{"messages": MESSAGES}]), tmp_path, tokenizer)
    trainer.eval_dataset = {"a": trainer.eval_dataset}
    train_on_responses_only(trainer, num_proc=None)
    assert len(responses(trainer.train_dataset[0], tokenizer)) == 2
    assert len(responses(trainer.eval_dataset["a"][0], tokenizer)) == 2


@pytest.mark.promise("F6")
def test_packed_rows_are_masked_document_by_document(tokenizer, tmp_path):
    no_system = Dataset.from_list([{"messages": MESSAGES[1:3]}] * 3)
    trainer = build_trainer(no_system, tmp_path, tokenizer, packing=True, max_length=256)
    lengths = trainer.train_dataset[0]["seq_lengths"]
    assert len(lengths) == 3
    train_on_responses_only(trainer)
    assert responses(trainer.train_dataset[0], tokenizer) == ["Paris.<|im_end|>"] * 3
    assert trainer.train_dataset[0]["seq_lengths"] == lengths
    # Without an end of turn a response runs to the end of its document, never into the next one.
    row = {"input_ids": [*tokenizer("Q:a A:b")["input_ids"], *tokenizer("Hello Q:c A:d")["input_ids"]]}
    row["seq_lengths"] = [
        len(tokenizer("Q:a A:b")["input_ids"]),
        len(tokenizer("Hello Q:c A:d")["input_ids"]),
    ]
    masked = mask_rows_to_responses(Dataset.from_list([row]), tokenizer, "Q:", "A:")
    assert shown(masked[0], tokenizer) == "Q:a A:‹b›Hello Q:c A:‹d›"


def test_tool_results_are_not_trained_on():
    tokenizer = tiny.build_tokenizer(None)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(CHAT_TEMPLATES["llama-3.1"].special_tokens)}
    )
    get_chat_template(tokenizer, "llama-3.1")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = tokenise(
        tokenizer,
        [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    masked = mask_rows_to_responses(
        Dataset.from_list([row]), tokenizer, header.format("user"), header.format("assistant")
    )
    assert responses(masked[0], tokenizer) == [
        '{"name": "add", "parameters": {"a": 1}}<|eot_id|>',
        "Three.<|eot_id|>",
    ]


def test_words_merged_over_the_boundary_are_trained(tokenizer):
    row = {"input_ids": tokenizer("Question: the fox Answer: the dog")["input_ids"]}
    pieces = [tokenizer.decode([token]) for token in row["input_ids"]]
    assert " the" in pieces  # the space belongs to the part, the word to the response
    masked = mask_rows_to_responses(Dataset.from_list([row]), tokenizer, "Question: ", "Answer: ")
    assert shown(masked[0], tokenizer) == "Question: the fox Answer:‹ the dog›"


def test_parts_are_found_as_the_tokenizer_decodes_them():
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TEMPLATES["phi-3"].special_tokens)})
    get_chat_template(tokenizer, "phi-3")
    row = tokenise(tokenizer, MESSAGES[1:3])
    assert "<|user|> \n" in tokenizer.decode(row["input_ids"])  # a space that no template wrote
    masked = mask_rows_to_responses(Dataset.from_list([row]), tokenizer, "<|user|>\n", "<|assistant|>\n")
    assert responses(masked[0], tokenizer) == ["Paris.<|end|>"]


def test_force_match(tokenizer):
    rows = Dataset.from_list([{"input_ids": tokenizer("Q: a\nA: b\nQ: c\nA: d")["input_ids"]}])
    with pytest.raises(DataError, match=r"A row begins with 'Q: a\\nA: b.*after '\\n\\nA:'"):
        mask_rows_to_responses(rows, tokenizer, "Q:", "\n\nA:")
    masked = mask_rows_to_responses(rows, tokenizer, "Q:", "\n\nA:", force_match=False)
    assert responses(masked[0], tokenizer) == [" b\n", " d"]


def test_rows_without_a_response_are_removed_and_counted(tokenizer, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    rows = Dataset.from_list([tokenise(tokenizer), tokenise(tokenizer, MESSAGES[:2]), tokenise(tokenizer)])
    assert len(mask_rows_to_responses(rows, tokenizer)) == 2
    assert "1 of 3 given rows hold no response" in caplog.text


def test_labels_that_are_masked_already_stay_masked(tokenizer):
    row = tokenise(tokenizer)
    half = len(row["input_ids"]) // 2
    row["labels"] = [-100] * half + row["input_ids"][half:]
    masked = mask_rows_to_responses(Dataset.from_list([row]), tokenizer)
    assert responses(masked[0], tokenizer) == [f"{MESSAGES[-1]['content']}<|im_end|>"]


@pytest.mark.parametrize("parts", [(INSTRUCTION, RESPONSE), (None, None)])
def test_streams(parts, tokenizer):
    rows = Dataset.from_list([tokenise(tokenizer, MESSAGES[:2]), tokenise(tokenizer)]).to_iterable_dataset()
    masked = list(mask_rows_to_responses(rows, tokenizer, *parts))
    assert len(masked) == 1 and len(responses(masked[0], tokenizer)) == 2
    with pytest.raises(DataError, match="No row holds a response"):
        mask_rows_to_responses(rows, tokenizer, "Q:", "A:")


def test_function(tokenizer):
    mask = train_on_responses_only(tokenizer=tokenizer, return_function=True)
    row = tokenise(tokenizer)
    labels = mask(row)["labels"]
    assert mask({"input_ids": [row["input_ids"]] * 2}) == {"labels": [labels] * 2}
    assert mask({"input_ids": np.array(row["input_ids"])}) == {"labels": labels}
    assert len(responses({**row, "labels": labels}, tokenizer)) == 2


def test_rows_cut_inside_a_response_are_trained_to_the_cut(tokenizer):
    row = tokenise(tokenizer)
    row["input_ids"] = row["input_ids"][:-6]
    masked = mask_rows_to_responses(Dataset.from_list([row]), tokenizer)
    assert masked[0]["labels"][-1] != -100
    assert sum(label != -100 for label in masked[0]["labels"]) > 4


def test_collators_that_write_labels_are_replaced(tokenizer, tmp_path):
    trainer = build_trainer(Dataset.from_list([{"messages": MESSAGES}]), tmp_path, tokenizer)
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    train_on_responses_only(trainer)
    assert isinstance(trainer.data_collator, DataCollatorForSeq2Seq)
    batch = next(iter(trainer.get_train_dataloader()))
    assert int((batch["labels"] != -100).sum()) < batch["labels"].numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither a trainer nor a tokenizer"),
        ({"tokenizer": tiny.build_tokenizer(None)}, "no chat template .*get_chat_template"),
        ({"tokenizer": tiny.build_tokenizer(), "instruction_part": "Q:"}, "Only one of"),
    ],
)
def test_missing_parts(options, message):
    with pytest.raises(ConfigError, match=message):
        train_on_responses_only(return_function=True, **options)


def test_rows_that_are_not_tokenised(tokenizer):
    with pytest.raises(DataError, match=r"columns \['text'\].*after the trainer is built"):
        mask_rows_to_responses(Dataset.from_list([{"text": "x"}]), tokenizer)


def test_check_labels():
    check_labels(Dataset.from_list([{"labels": [-100]}, {"labels": [-100, 5]}]))
    check_labels(Dataset.from_list([{"input_ids": [1]}]))
    masked = Dataset.from_list([{"labels": [-100, -100]}] * 3)
    with pytest.raises(DataError, match="All labels of all 3 rows are -100"):
        check_labels(masked)
    with pytest.raises(DataError, match="All labels of all 3 rows are -100"):
        check_labels(masked.to_iterable_dataset())
    with pytest.raises(DataError, match="no rows left"):
        check_labels(masked.select([]))


def test_find_responses():
    parts = TurnParts("Q:", "A:", "#")
    text = "sys Q:one A:two# Q:three A:four</s>tail A:five Q:six A:"
    found = [text[start:end] for start, end in find_responses(text, parts, "</s>")]
    assert found == ["two#", "four</s>", "five ", ""]
    assert find_responses("Q:one", parts) == []


TEXT = "Gr\u00fc\u00dfe \u2014 \U0001f43e\U0001f600 Paris. the fox"


@pytest.mark.parametrize("build", [tiny.build_tokenizer, sentencepiece_tokenizer], ids=["bytes", "sp"])
def test_offsets_of_ids_that_encode_back(build):
    tokenizer = build()
    ids = tokenizer(TEXT)["input_ids"]
    text, spans = decode_with_offsets(ids, tokenizer)
    assert text == TEXT
    assert len(spans) == len(ids) and spans[-1][1] == len(text)
    assert all(before[0] <= after[0] for before, after in pairwise(spans))


@pytest.mark.parametrize("build", [tiny.build_tokenizer, sentencepiece_tokenizer], ids=["bytes", "sp"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_offsets_of_ids_that_do_not(build, cut):
    """Ids joined from parts tokenised alone, and cut inside a character."""
    tokenizer = build()
    one, two = tokenizer("fo")["input_ids"], tokenizer("x \U0001f43e")["input_ids"]
    text, spans = decode_with_offsets([*one, *two], tokenizer)
    joined = "fo x \U0001f43e" if build is sentencepiece_tokenizer else "fox \U0001f43e"
    assert text == joined
    assert text[spans[len(one)][0] :].lstrip().startswith("x")
    cut_text, cut_spans = decode_with_offsets([*one, *two[:-cut]], tokenizer)
    assert len(cut_spans) == len(one) + len(two) - cut
    assert cut_text.startswith(joined[:-1]) and cut_spans[-1][1] == len(cut_text)
