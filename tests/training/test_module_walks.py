"""Modules are listed once a run: modes and gradients are what transformers makes of them, without its walks."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from pantheraml.training import trainer as trainers
from pantheraml.training.module_walks import listed_once
from tests import tiny


@pytest.fixture
def visits(monkeypatch):
    """How many modules were told their mode."""
    count = []
    original = nn.Module.train
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: count.append(1) or original(self, mode))
    return count


def test_modes_are_set_where_one_differs(visits):
    model = tiny.build_model().train()
    del visits[:]
    with listed_once(model):
        assert model.train() is model and not visits
        model.model.layers[1].mlp.eval()
        assert model.train() is model and model.model.layers[1].mlp.training and len(visits) > 10
        assert model.eval() is model and not any(module.training for module in model.modules())
        model.train()
        assert all(module.training for module in model.modules())
    assert not {"train", "zero_grad"} & vars(model).keys()


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_cleared(to_none):
    model = tiny.build_model()
    first = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with listed_once(model):
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)  # also where it was frozen since
            model.zero_grad(to_none) if not to_none else model.zero_grad()
            grads = [parameter.grad for parameter in model.parameters()]
            assert all((grad is None) if to_none else (grad == 0).all() for grad in grads)
    assert not first.requires_grad


def test_a_model_can_be_copied_meanwhile_and_is_itself_after_a_failure():
    model = tiny.build_model().train()
    with pytest.raises(ValueError, match="stop"), listed_once(model):
        pickle.loads(pickle.dumps(model.state_dict()))
        raise ValueError("stop")
    assert not {"train", "zero_grad"} & vars(model).keys()


def test_the_trainer_lists_them(tmp_path, visits, monkeypatch):
    from datasets import Dataset

    from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments

    tiny.save_checkpoint(tmp_path / "model", "llama")
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "model"), 64, device_map="cpu")
    model = FastLanguageModel.get_peft_model(model, r=2)
    arguments = PantheraMLTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
    )
    rows = Dataset.from_dict({"text": ["one two three", "four five six"] * 8})
    seen = []
    step = trainers.PantheraMLTrainer.training_step

    def counted(self, *args, **kwargs):
        before = len(visits)
        result = step(self, *args, **kwargs)
        seen.append(len(visits) - before)
        return result

    monkeypatch.setattr(trainers.PantheraMLTrainer, "training_step", counted)
    trainer = PantheraMLTrainer(model, arguments, train_dataset=rows, tokenizer=tokenizer)
    trainer.train()
    assert len(seen) == 4 and not any(seen[1:])
    assert not {"train", "zero_grad"} & vars(trainer.model).keys()
