"""Packed and padding-free batches train exactly what the rows alone would: no document sees another."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from pantheraml.errors import ConfigError
from pantheraml.models.packed_rows import documents_mix, keep_documents_apart
from tests import tiny

MAX_LENGTH = 64
# Sums over different shapes of float32 agree to a few units in the last place.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Nine ragged rows (3 to 40 tokens; the sliding window is 16), half of them with a masked prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 40, 17, 9, 25, 31, 5, 20, 12)
    ids = [torch.randint(5, tiny.VOCAB, (length,), generator=generator).tolist() for length in lengths]
    labels = [[-100] * (2 * (index % 2)) + row[2 * (index % 2) :] for index, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def build_trainer(model, rows, tmp_path, **options) -> SFTTrainer:
    # gradient_checkpointing=None: trl's default of True is a name that newer transformers warn about.
    settings = {"max_length": MAX_LENGTH, "gradient_checkpointing": None} | options
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **settings)
    return SFTTrainer(model, arguments, train_dataset=rows, processing_class=tiny.build_tokenizer())


def token_losses(model, inputs) -> torch.Tensor:
    """The summed loss of all label tokens; the model is given what the trainer gives it, less the labels."""
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum"
    )


def measure(trainer: SFTTrainer, alone: bool):
    """Number of label tokens, mean loss over them and its gradient, with the trainer's rows and collator."""
    model, rows = trainer.model.train(), list(trainer.train_dataset)
    batches = [trainer.data_collator(batch) for batch in ([[row] for row in rows] if alone else [rows])]
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = token_losses(model, batch) / tokens
        loss.backward()
        total += loss.item()
    return tokens, total, {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.promise("F7")
@pytest.mark.parametrize(
    ("family", "attention"),
    # gpt_oss has no sdpa attention, and does not look at positions when it makes its masks.
    [("llama", "eager"), ("llama", "sdpa"), ("mistral", "eager"), ("mistral", "sdpa"), ("gpt_oss", "eager")],
)
@pytest.mark.parametrize(
    "options", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=["packed", "padding_free"]
)
def test_joined_rows_train_as_the_rows_alone(family, attention, options, rows, tmp_path):
    model = tiny.build_model(family, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    keep_documents_apart(model)
    tokens, loss, gradients = measure(build_trainer(model, rows, tmp_path, max_length=None), alone=True)
    trainer = build_trainer(model, rows, tmp_path, **options)
    if "packing" in options:
        assert max(len(row["seq_lengths"]) for row in trainer.train_dataset) > 1
        assert len(trainer.train_dataset) < len(rows)
    joined_tokens, joined_loss, joined_gradients = measure(trainer, alone=False)
    assert joined_tokens == tokens
    assert joined_loss == pytest.approx(loss, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            joined_gradients[name], gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.promise("F7")
def test_the_comparison_can_fail(rows, tmp_path):
    """Without positions that restart, the documents of a packed row do see one another."""
    model = tiny.build_model("llama", attn_implementation="sdpa")
    trainer = build_trainer(model, rows, tmp_path, packing=True)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    mixed = {**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}
    tokens = int((inputs["labels"] != -100).sum())
    assert abs(token_losses(model, mixed) - token_losses(model, inputs)).item() / tokens > 1e-4


def test_models_that_keep_documents_apart_are_left_alone():
    model = tiny.build_model("mistral", attn_implementation="sdpa").train()
    keep_documents_apart(model)
    assert not model.base_model._forward_pre_hooks
    assert model.training


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks for it
def test_models_that_mix_documents_are_given_masks():
    from peft import LoraConfig, get_peft_model

    plain = tiny.build_model("gpt_oss", attn_implementation="eager")
    assert documents_mix(plain)
    ids = torch.arange(5, 25)[None]
    before = plain(input_ids=ids).logits
    model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))
    keep_documents_apart(model)
    assert not documents_mix(model)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_models_that_cannot_keep_documents_apart_are_refused():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    model = MambaForCausalLM(MambaConfig(**sizes))
    with pytest.raises(ConfigError, match="packing=False"):
        keep_documents_apart(model)
    assert not model.base_model._forward_pre_hooks
