"""The trainer beside the known script: no arguments, plain models, several evaluation sets, experts, checkpoints."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.models.patching import PatchSet
from pantheraml.training.evaluation import TokenSums
from pantheraml.training.head import bind_cpu_head
from tests import tiny

ROWS = Dataset.from_dict({"text": ["one two three four", "five six", "seven eight nine", "ten"]})
OTHERS = Dataset.from_dict({"text": ["What is the capital of France? Paris.", "Add two and three."]})


@pytest.fixture
def load(checkpoints):
    def load(name="llama", **flags):
        folder = str(checkpoints(name) if name in tiny.FAMILIES else name)
        flags = {"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **flags}
        return FastLanguageModel.from_pretrained(folder, **flags)

    return load


@pytest.fixture
def arguments(tmp_path):
    def build(**kwargs):
        base = dict(
            output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_steps=1, use_cpu=True,
        )  # fmt: skip
        return PantheraMLTrainingArguments(**{**base, **kwargs})

    return build


def token_mean(model, rows) -> float:
    """Mean negative log-likelihood over all label tokens, row by row."""
    total = tokens = 0.0
    model.eval()
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            target = torch.tensor(row["labels"])[1:]
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits, target, ignore_index=-100, reduction="sum"
            ).item()
            tokens += (target != -100).sum().item()
    return total / tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="the defaults would train on the GPU")
def test_the_defaults_train(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load()
    trainer = PantheraMLTrainer(model, train_dataset=ROWS, tokenizer=tokenizer)
    assert (trainer.args.bf16, trainer.args.fp16, trainer.args.max_length) == (False, False, 64)
    assert trainer.args.gradient_checkpointing is False and trainer.args.dataloader_pin_memory is False


def test_several_evaluation_sets(load, arguments):
    model, tokenizer = load()
    trainer = PantheraMLTrainer(
        model,
        arguments(),
        train_dataset=ROWS,
        eval_dataset={"same": ROWS, "other": OTHERS},
        tokenizer=tokenizer,
    )
    metrics = trainer.evaluate()
    for name in ("same", "other"):
        expected = token_mean(trainer.model, trainer.eval_dataset[name])
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics[f"eval_{name}_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_loaders_of_evaluations_are_let_go(load, arguments):
    model, tokenizer = load()
    alive = []

    class Count(TrainerCallback):
        def on_evaluate(self, *_, **__):
            gc.collect()
            alive.append(sum(isinstance(one, DataLoader) for one in gc.get_objects()))

    settings = dict(max_steps=4, eval_strategy="steps", eval_steps=1)
    PantheraMLTrainer(
        model,
        arguments(**settings),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        tokenizer=tokenizer,
        callbacks=[Count()],
    ).train()
    assert len(alive) == 4 and alive[3] == alive[1]


def test_a_second_trainer_goes_on_with_the_adapter_of_the_first(load, arguments, caplog):
    """A cell of a notebook that is run again."""
    caplog.set_level("INFO", logger="pantheraml")
    model, tokenizer = load()
    first, second = (
        PantheraMLTrainer(model, arguments(), train_dataset=ROWS, tokenizer=tokenizer) for _ in range(2)
    )
    assert first.model is second.model
    assert caplog.text.count("LoRA r=16 is attached") == 1
    second.train()
    assert any(p.abs().max() > 0 for name, p in first.model.named_parameters() if "lora_B" in name)


def test_a_plain_model_is_trained_as_it_is(arguments):
    model = tiny.build_model()
    before = model.lm_head.weight.detach().clone()
    trainer = PantheraMLTrainer(
        model,
        arguments(max_length=5, learning_rate=1e-2),
        train_dataset=OTHERS,
        tokenizer=tiny.build_tokenizer(),
    )
    trainer.train()
    assert not isinstance(trainer.model, PeftModel) and trainer.args.max_length == 5
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 5
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_evaluation_leaves_the_routers_loss_out(arguments, tmp_path, load):
    """The balancing loss of a mixture of experts belongs to training; perplexity is of the text alone."""
    tiny.save_checkpoint(tmp_path / "model", "mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    model, tokenizer = load(tmp_path / "model")
    model = FastLanguageModel.get_peft_model(model, r=2)
    trainer = PantheraMLTrainer(
        model, arguments(), train_dataset=ROWS, eval_dataset=OTHERS, tokenizer=tokenizer
    )
    assert trainer.aux_loss_enabled
    expected = token_mean(model, trainer.eval_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        ids = torch.tensor([trainer.eval_dataset[0]["input_ids"]])
        assert model(input_ids=ids, labels=ids).aux_loss > 0.1


def test_a_checkpoint_of_a_run_loads_and_the_run_goes_on(load, arguments):
    def trainer(steps, **more):
        model, tokenizer = load()
        model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1)
        args = arguments(max_steps=steps, save_strategy="steps", save_steps=2, learning_rate=1e-2, **more)
        return PantheraMLTrainer(model, args, train_dataset=ROWS, tokenizer=tokenizer)

    whole = trainer(4)
    whole.train()
    saved = f"{whole.args.output_dir}/checkpoint-2"
    loaded, _ = load(saved)
    assert isinstance(loaded, PeftModel)
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=saved)
    losses = [
        [entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, resumed)
    ]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    weights = [dict(one.model.named_parameters()) for one in (whole, resumed)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_sums_over_no_token_give_no_figure():
    sums = TokenSums()
    assert sums.metrics("eval") == {}
    sums.add(1000.0, 0.5, 2)
    assert sums.metrics("eval") == {
        "eval_loss": 1000.0, "eval_perplexity": math.inf, "eval_mean_token_accuracy": 0.5
    }  # fmt: skip


def test_the_cpu_head_leaves_other_calls_alone():
    model, ids = tiny.build_model(), torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = model(ids, labels=ids)
        patches = PatchSet()
        bind_cpu_head(model, patches)
        for kwargs in ({"labels": ids}, {"labels": ids, "fused_lm_head": False}):
            again = model(ids, **kwargs)
            assert torch.equal(again.loss, plain.loss) and torch.equal(again.logits, plain.logits)
        assert torch.equal(model(ids, fused_lm_head=True).logits, plain.logits)
        fused = model(ids, labels=ids, fused_lm_head=True)
        torch.testing.assert_close(fused.loss, plain.loss)
        patches.revert()
        assert "forward" not in vars(model)
