"""Micro-batches of a step in one pass: the same numbers, fewer forwards, no padding."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.errors import ConfigError
from pantheraml.training.few_lengths import FILLED, filled_length, repeated_tokens
from pantheraml.training.merging import FlatCollator, merge_batches
from pantheraml.training.rank_batches import without_labels
from pantheraml.training.sample_keys import KEYS

WORDS = ["The", "quick", "brown", "fox", "and", "the", "lazy", "dog", "in", "the", "capital", "of", "France"]
ROWS = Dataset.from_list(
    [
        {"prompt": " ".join(WORDS[: 1 + i % 3]), "completion": " " + " ".join(WORDS[: 2 + 5 * i % 13])}
        for i in range(11)
    ]
)


@pytest.fixture
def train(checkpoints, tmp_path):
    def train(family="llama", *, recompute="auto", load=None, **settings):
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(checkpoints(family)), max_seq_length=64, load_in_4bit=False, dtype="float32",
            use_gradient_checkpointing=recompute, **(load or {}),
        )  # fmt: skip
        model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=True)
        args = PantheraMLTrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4,
            learning_rate=5e-3, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, bf16=False,
            fp16=False, **settings,
        )  # fmt: skip
        trainer = PantheraMLTrainer(
            model, args, train_dataset=ROWS, eval_dataset=ROWS.select(range(3)), tokenizer=tokenizer
        )
        seen = []
        model.base_model.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape) if module.training else None,
            with_kwargs=True,
        )
        trainer.train()
        figures = [
            (entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry
        ]
        return trainer, seen, figures

    return train


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_same_losses_and_gradient_norms_in_fewer_passes(train, family):
    merged, passes, ours = train(family, merge_micro_batches=True)
    unmerged, padded, theirs = train(family, merge_micro_batches=False)
    # 11 rows: an epoch has six micro-batches of two rows, the last of one row; a step takes three.
    assert len(passes) == 4 and len(padded) == 12
    assert all(rows == 1 for rows, _ in passes)
    assert sum(tokens for _, tokens in passes) < sum(rows * tokens for rows, tokens in padded)
    for (loss, norm), (their_loss, their_norm) in zip(ours, theirs, strict=True):
        assert math.isclose(loss, their_loss, rel_tol=1e-5) and math.isclose(norm, their_norm, rel_tol=1e-4)
    assert num_tokens(merged) == num_tokens(unmerged)
    assert math.isfinite(merged.evaluate()["eval_loss"])


def test_passes_are_filled_up_to_few_lengths(train, monkeypatch):
    rows = Dataset.from_list([{"text": " ".join(WORDS * 5)[: 90 + 37 * i % 211]} for i in range(11)])
    monkeypatch.setattr(sys.modules[__name__], "ROWS", rows)
    filled, passes, ours = train(merge_micro_batches=True)
    _, _, theirs = train(merge_micro_batches=False)
    real = num_tokens(filled)
    assert all(tokens % (2 ** (tokens.bit_length() - 1) // 32) == 0 for _, tokens in passes)
    assert real < sum(tokens for _, tokens in passes) < 1.03 * real, "what fills up is not counted"
    for (loss, norm), (their_loss, their_norm) in zip(ours, theirs, strict=True):
        assert math.isclose(loss, their_loss, rel_tol=1e-6) and math.isclose(norm, their_norm, rel_tol=1e-5)


def test_a_pass_takes_at_most_so_many_tokens(train, monkeypatch):
    monkeypatch.setattr("pantheraml.training.merging.MOST_TOKENS", 60)
    _, passes, ours = train(merge_micro_batches=True)
    _, _, theirs = train(merge_micro_batches=False)
    assert 4 < len(passes) < 12 and all(tokens <= 60 for _, tokens in passes)
    assert all(math.isclose(a[0], b[0], rel_tol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_what_merging_needs(train):
    with pytest.raises(ConfigError, match="attention is not PantheraML's"):
        train(merge_micro_batches=True, load=dict(attn_implementation="sdpa"))
    _, passes, _ = train(merge_micro_batches=None)
    assert len(passes) == (12 if not torch.cuda.is_available() else 4)


def test_merged_batches():
    collate = FlatCollator(collator())
    batches = [collate([{"input_ids": [7] * n} for n in sizes]) for sizes in ((2, 3), (4,), (2, 1), (9,))]
    assert batches[0]["cu_seq_lens_q"].tolist() == [0, 2, 5] and batches[0]["lengths"] == [2, 3]
    merged = merge_batches(batches, 12)
    assert [batch["input_ids"].numel() for batch in merged] == [0, 0, 12, 9]
    assert merged[2]["cu_seq_lens_q"].tolist() == [0, 2, 5, 9, 11, 12] and merged[2]["max_length_q"] == 4
    assert merged[2]["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 0]]
    assert merged[2]["labels"][0, [0, 2, 5, 9, 11]].tolist() == [-100] * 5
    alone = merge_batches(batches, 1)[1]
    assert alone["input_ids"].shape == (1, 4), "one that is too large goes alone"
    even = merge_batches([collate([{"input_ids": [7, 8, 9]}] * 2) for _ in range(2)], 99)[1]
    assert even["input_ids"].tolist() == [[7, 8, 9]] * 4 and even["labels"].tolist() == [[-100, 8, 9]] * 4
    assert set(even) == {"input_ids", "labels", "label_index"}
    for batch in (*merged[2:], alone, even):
        labels = batch["labels"][:, 1:].flatten()
        assert batch["label_index"].tolist() == (labels != -100).nonzero().flatten().tolist()
    assert merge_batches([], 8) == []
    sizes = [
        [batch["input_ids"].numel() for batch in merge_batches(batches, 99, at_least=n)] for n in (1, 2, 3, 9)
    ]
    assert sizes == [[0, 0, 0, 21], [0, 9, 0, 12], [0, 9, 3, 9], [5, 4, 3, 9]], (
        "as many passes as others need"
    )


def test_a_filled_pass():
    collate = FlatCollator(collator())
    sizes = (20, 30, 21)
    batches = [
        collate([{"input_ids": list(range(100 * n, 100 * n + size))}])
        | {KEYS: torch.arange(size)[None] + 1000 * n}
        for n, size in enumerate(sizes)
    ]
    alone, filled = (merge_batches(batches, 99, filled=filled)[2] for filled in (False, True))
    assert FILLED not in alone and filled[FILLED] == 1 and filled["input_ids"].shape == (1, 72)
    for name in ("input_ids", "position_ids", "labels", KEYS):
        assert torch.equal(filled[name][:, :71], alone[name]), name
    assert [filled[name][0, 71].item() for name in ("input_ids", "position_ids", "labels", KEYS)] == [
        100, 0, -100, 1000,
    ], "the longest document begins again"  # fmt: skip
    assert filled["cu_seq_lens_q"].tolist() == [0, 20, 50, 71, 72] and filled["max_length_q"] == 30
    assert torch.equal(filled["label_index"], alone["label_index"])
    at_most = merge_batches(batches, 71, filled=True)[2]
    assert FILLED not in at_most, "no pass is longer than memory allows"


def test_few_lengths():
    lengths = [filled_length(tokens, 16384) for tokens in range(1, 16385)]
    assert all(1 <= length / tokens < 1 + 1 / 32 for tokens, length in enumerate(lengths, 1))
    assert len(set(lengths)) == 320 and sorted(lengths) == lengths
    assert repeated_tokens([2, 4, 3], 6) == [slice(2, 6), slice(2, 4)]


def test_what_has_no_labels_is_left_out_while_something_stays():
    collate = FlatCollator(collator())
    none, some = (collate([{"input_ids": [7] * n}]) for n in (1, 3))
    joined = merge_batches([none, some, none], 99)
    assert [batch["input_ids"].numel() for batch in joined] == [0, 0, 3]
    masked = without_labels(some)
    assert masked["label_at"].size == 0 and some["label_at"].tolist() == [1, 2]
    grouped = merge_batches([masked, some], 99, grouped=True)[1]["router_groups"]
    assert grouped["index"].tolist() == [0] * 3 + [1] * 3 and grouped["labelled"].tolist() == [0.0, 1.0]
    assert merge_batches([none, none], 99)[1]["input_ids"].numel() == 1


def num_tokens(trainer):
    return [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry][-1]


def collator():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=0)


def test_operations_are_counted_as_transformers_counts_them(train):
    trainer, _, _ = train(merge_micro_batches=True)
    inputs = {"input_ids": torch.ones(1, 7, dtype=torch.long)}
    assert trainer.floating_point_ops(inputs) == SFTTrainer.floating_point_ops(trainer, inputs) > 0
