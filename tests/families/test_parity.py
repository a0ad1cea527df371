"""Each family, loaded by us, is the plain transformers + PEFT model: logits, loss and every gradient."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pantheraml import FastLanguageModel
from pantheraml.models.recompute import is_recomputing
from tests import tiny

TOLERANCE = 1e-5

# What the seven well-known projection names mean in plain PEFT for each family.
_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ATTENTION = _SEVEN[:4]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PLAIN_TARGETS = {
    "phi3": dict(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "mixtral": dict(target_modules=_ATTENTION, target_parameters=_EXPERTS),
    "qwen3_moe": dict(target_modules=_ATTENTION, target_parameters=_EXPERTS),
    "gpt_oss": dict(target_modules=_ATTENTION, target_parameters=_EXPERTS),
}


@pytest.fixture(scope="module")
def batch():
    """Two rows of 24 tokens, the second padded on the right, with the prompt masked."""
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(5, 400, (2, 24), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 17:] = 0
    input_ids[1, 17:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :5] = -100
    return dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def load_plain(folder):
    """The reference: float32, eager attention (SDPA drops Gemma 2's soft-cap in transformers 5.17)."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def assert_same_run(ours, theirs, batch):
    """Logits, loss and gradients of one forward and backward pass agree."""
    our_output, their_output = ours(**batch), theirs(**batch)
    real = batch["attention_mask"].bool()
    assert relative_error(our_output.logits[real], their_output.logits[real]) <= TOLERANCE
    assert relative_error(our_output.loss, their_output.loss) <= TOLERANCE
    our_output.loss.backward()
    their_output.loss.backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    our_gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert our_gradients.keys() == their_gradients.keys()
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in our_gradients.values())
    for name, gradient in their_gradients.items():
        assert (gradient is None) == (our_gradients[name] is None), name
        if gradient is not None:
            assert relative_error(our_gradients[name], gradient) <= TOLERANCE, name


def randomise_adapter(*models):
    """Give the same random values to both factors of every adapter (B starts at zero, which hides A's gradient)."""
    generator = torch.Generator().manual_seed(11)
    parameters = [dict(model.named_parameters()) for model in models]
    for name in parameters[0]:
        if "lora_" in name:
            values = torch.randn(parameters[0][name].shape, generator=generator) * 0.1
            for own in parameters:
                own[name].data.copy_(values)


@pytest.mark.promise("F3")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lora_equals_plain_peft(checkpoints, batch, family):
    folder = checkpoints(family)
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_4bit=False)
    ours = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, random_state=5)
    plain = load_plain(folder)
    settings = PLAIN_TARGETS.get(family, dict(target_modules=_SEVEN))
    torch.manual_seed(5)
    theirs = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))

    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name]), f"{name} starts differently"
    randomise_adapter(ours, theirs)
    assert_same_run(ours, theirs, batch)


@pytest.mark.promise("F3")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_finetuning_equals_plain_transformers(checkpoints, batch, family):
    folder = checkpoints(family)
    ours, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, full_finetuning=True)
    theirs = load_plain(folder)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_run(ours, theirs, batch)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_recompute_changes_no_number(checkpoints, batch, family):
    folder = checkpoints(family)
    runs = []
    for recompute in (True, False):
        model, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=64, load_in_4bit=False, use_gradient_checkpointing=recompute
        )
        model = FastLanguageModel.get_peft_model(model, r=4)
        randomise_adapter(model)
        runs.append(FastLanguageModel.for_training(model))
    assert is_recomputing(runs[0]) and not is_recomputing(runs[1])
    assert_same_run(*runs, batch)


@pytest.mark.promise("F4")
def test_an_architecture_without_a_family_trains(tmp_path, batch, caplog):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="pantheraml"):
        model, _ = FastLanguageModel.from_pretrained(str(tmp_path), max_seq_length=64, load_in_4bit=False)
    assert "gpt_neox" in caplog.text
    ours = FastLanguageModel.get_peft_model(model, r=4)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    randomise_adapter(ours, theirs)
    assert_same_run(ours, theirs, batch)
