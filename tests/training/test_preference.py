"""TRL's own trainers with models of FastLanguageModel: preferences, rewards, GRPO and plain fine-tuning."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset

from pantheraml import FastLanguageModel
from pantheraml.training.head import needs_cpu_head

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

PAIRS = [
    {
        # Prompts of several lengths: GRPO pads them on the left, where a lost mask would be seen.
        "prompt": f"What is {'the sum of ' * (number % 3)}{number} plus two?",
        "chosen": f" It is {number + 2}.",
        "rejected": " The question is short and the answer about the world.",
    }
    for number in range(8)
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
    for row in PAIRS
    for kind in ("chosen", "rejected")
]
TEXTS = [{"text": row["prompt"] + row["chosen"]} for row in PAIRS]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]

needs_head = pytest.mark.skipif(
    needs_cpu_head(torch.device("cpu")), reason="this TRL computes the head of its trainer in Triton only"
)


def count_vowels(completions, **_):
    return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in completions]


@dataclass(frozen=True)
class Setup:
    """A trainer of TRL, its configuration, and rows for it."""

    trainer: type[transformers.Trainer]
    config: type[transformers.TrainingArguments]
    rows: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    num_labels: int | None = None


SETUPS = {
    "dpo": Setup(trl.DPOTrainer, trl.DPOConfig, PAIRS, {"max_length": 64}),
    "kto": Setup(trl.KTOTrainer, trl.KTOConfig, LABELLED, {"max_length": 64}),
    "sft": Setup(trl.SFTTrainer, trl.SFTConfig, TEXTS, {"max_length": 64}),
    "grpo": Setup(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        PROMPTS,
        {"num_generations": 2, "max_completion_length": 8, "beta": 0.04},
        {"reward_funcs": count_vowels},
    ),
    "orpo": Setup(ORPOTrainer, ORPOConfig, PAIRS, {"max_length": 64, "remove_unused_columns": False}),
    "reward": Setup(trl.RewardTrainer, trl.RewardConfig, PAIRS, {"max_length": 64}, num_labels=1),
}
each_trainer = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_head if name in ("dpo", "kto", "sft", "grpo") else ())
        for name in SETUPS
    ],
)


@pytest.fixture
def load(llama):
    """``load(r=4, num_labels=1, ...)`` -> a model on the CPU, with an adapter if a rank is given, and its tokenizer."""

    def load(name=llama, r=None, **options):
        options = {"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **options}
        model, tokenizer = FastLanguageModel.from_pretrained(str(name), **options)
        return FastLanguageModel.get_peft_model(model, r=r) if r else model, tokenizer

    return load


@pytest.fixture
def build(tmp_path):
    """``build("dpo", model, tokenizer, max_steps=3)`` -> that trainer, ready."""

    def build(name, model, tokenizer, **settings):
        setup = SETUPS[name]
        config = setup.config(
            **{
                "output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_train_batch_size": 4, "bf16": False,
                "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
                "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
                **setup.settings, **settings,
            }
        )  # fmt: skip
        rows = Dataset.from_list(setup.rows)
        return setup.trainer(
            model=model, args=config, train_dataset=rows, processing_class=tokenizer, **setup.arguments
        )

    return build


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.promise("F12")
@each_trainer
def test_it_trains_the_adapter_alone_and_the_adapter_is_found_again(name, load, build, tmp_path):
    model, tokenizer = load(r=4, num_labels=SETUPS[name].num_labels)
    trainer = build(name, model, tokenizer)
    before = {key: (weight, weight.detach().clone()) for key, weight in model.named_parameters()}
    trainer.train()
    assert len(logged(trainer, "loss")) == 4 and all(map(math.isfinite, logged(trainer, "loss")))
    trained = {key for key, (weight, _) in before.items() if weight.requires_grad}
    assert {key for key, (weight, old) in before.items() if not torch.equal(weight, old)} == trained
    assert any("lora_A" in key for key in trained)

    model.save_pretrained(tmp_path / "adapter", tokenizer)
    again, _ = load(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.promise("F12")
@each_trainer
def test_it_trains_exactly_like_a_plain_model(name, load, build, llama):
    """transformers' own model with PEFT's own adapter and the same weights has the same losses and gradients."""
    setup, histories = SETUPS[name], []
    model, tokenizer = load(r=4, num_labels=setup.num_labels, use_gradient_checkpointing=False)
    if setup.num_labels:
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(
            llama, num_labels=setup.num_labels
        )
    else:
        plain = transformers.AutoModelForCausalLM.from_pretrained(llama)
    plain = peft.get_peft_model(plain, copy.deepcopy(model.peft_config["default"]))
    plain.load_state_dict(model.state_dict())
    assert (plain.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "pantheraml")
    for one in (model, plain):
        trainer = build(name, one, tokenizer, max_steps=3)
        trainer.train()
        histories.append([logged(trainer, "loss"), logged(trainer, "grad_norm")])
    assert torch.allclose(*(torch.tensor(history) for history in histories), rtol=0, atol=1e-5)


@pytest.mark.promise("F12")
@needs_head
def test_dpo_learns_the_preference(load, build):
    model, tokenizer = load(r=4)
    trainer = build("dpo", model, tokenizer, max_steps=20)
    trainer.train()
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == 0 and margins[-1] > margins[5] > 0.1
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(trainer, "rewards/accuracies")[-1] == 1


@needs_head
def test_dpo_of_all_weights_keeps_its_reference(load, build, llama):
    """Without an adapter TRL loads the reference anew, by the name and the attention that our model tells it."""
    model, tokenizer = load(full_finetuning=True, load_in_4bit=None)
    start = logits(model)
    trainer = build("dpo", model, tokenizer, learning_rate=1e-3)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(trainer, "loss")[-1] < 0.6
    assert torch.allclose(logits(trainer.ref_model), start, atol=1e-5)
    assert not torch.allclose(logits(model), start, atol=1e-2)


@needs_head
def test_dpo_resumes_where_it_stopped(load, build, tmp_path):
    """Checkpoints are written by the bound save_pretrained; TRL's frozen reference adapter is in them too."""
    whole, tokenizer = load(r=4)
    build("dpo", whole, tokenizer, save_strategy="steps", save_steps=2).train()
    resumed, tokenizer = load(r=4)
    build("dpo", resumed, tokenizer).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert torch.allclose(logits(resumed), logits(whole), atol=1e-6)


@pytest.mark.promise("F12")
def test_a_reward_model_ranks_the_chosen_first(load, build, tmp_path):
    model, tokenizer = load(r=4, num_labels=1)
    trainer = build("reward", model, tokenizer, max_steps=20)
    trainer.train()
    assert logged(trainer, "accuracy")[-1] == 1

    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    for row in PAIRS:
        chosen, rejected = (
            merged(
                **tokenizer(row["prompt"] + row[kind] + tokenizer.eos_token, return_tensors="pt")
            ).logits.item()
            for kind in ("chosen", "rejected")
        )
        assert chosen > rejected + 1


@pytest.mark.promise("F12")
def test_orpo_learns_the_preference(load, build):
    model, tokenizer = load(r=4)
    trainer = build("orpo", model, tokenizer, max_steps=20)
    trainer.train()
    odds, nll = logged(trainer, "log_odds_chosen"), logged(trainer, "nll_loss")
    assert odds[-1] > odds[0] + 0.5 and nll[-1] < nll[0] - 0.5
