"""Checkpoints that are written beside the training: the same files, of the step they belong to, whole or not there."""

from __future__ import annotations

import errno
import os
import signal
import threading
from logging import getLogger
from logging.handlers import BufferingHandler

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from pantheraml import FastLanguageModel, PantheraMLTrainer
from pantheraml.checkpoint.manifest import problems
from pantheraml.checkpoint.pointers import read_pointer
from pantheraml.checkpoint.resuming import newest_whole
from pantheraml.errors import SaveError
from pantheraml.training.async_saves import saved_weights
from tests.checkpoint.runs import hidden, in_a_process, tree
from tests.distributed.ranks import run_ranks
from tests.training.test_checkpoints import build, folder, names, train  # noqa: F401 - a fixture


class Waits(PantheraMLTrainer):
    """Writes the first checkpoint, of step 2, when step 4 has begun."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.has_gone_on, self.waited = threading.Event(), []

    def training_step(self, *args, **kwargs):
        if self.state.global_step >= 3:
            self.has_gone_on.set()
        return super().training_step(*args, **kwargs)

    def _write_model(self, *args):
        self.waited.append(self.has_gone_on.wait(60))
        super()._write_model(*args)


def contents(checkpoint):
    """What is loaded from a checkpoint, by file, without what says when and where it was made."""
    found = tree(checkpoint)
    for name in ("manifest.json", "run.json", "README.md", "training_args.bin"):
        assert found.pop(name)
    states = {name: torch.load(checkpoint / name, weights_only=False) for name in found if ".pt" in name}
    return {**found, **{name: repr(state) for name, state in states.items()}}


def test_training_goes_on_while_a_checkpoint_is_written(folder, tmp_path):  # noqa: F811
    settings = dict(
        save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=2
    )
    train(folder, tmp_path / "at_the_step", **settings)
    trainer = build(folder, tmp_path / "beside", Waits, async_save=True, **settings)
    trainer.train()
    assert trainer.waited == [True, True, True]
    assert names(tmp_path / "beside") == names(tmp_path / "at_the_step")
    assert hidden(tmp_path / "beside") == []
    for step in (4, 6):
        plain, mine = (tmp_path / where / f"checkpoint-{step}" for where in ("at_the_step", "beside"))
        assert problems(mine) == []
        theirs = contents(plain)
        theirs["trainer_state.json"] = theirs["trainer_state.json"].replace(b"at_the_step", b"beside")
        ours = contents(mine)
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"trainer_state.json"}:  # in which times of evaluations are
            assert ours[name] == theirs[name], name
    assert (
        read_pointer(tmp_path / "beside", "best").step == read_pointer(tmp_path / "at_the_step", "best").step
    )


def full_at(step):
    """A trainer whose disk is full when it writes the checkpoint of ``step``."""

    class Full(PantheraMLTrainer):
        def _write_model(self, target, weights):
            super()._write_model(target, weights)
            if target.endswith(f"checkpoint-{step}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    return Full


def test_a_last_checkpoint_that_fails_is_raised(folder, tmp_path):  # noqa: F811
    with pytest.raises(SaveError, match=r"Saving to .*checkpoint-6 stopped: No space left"):
        build(folder, tmp_path, full_at(6), async_save=True).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "latest.json"]
    assert read_pointer(tmp_path, "latest").checkpoint == "checkpoint-4"


def goes_on(folder, output):  # noqa: F811
    """What a run said whose disk was full at one checkpoint, and which one it takes for the best."""
    said = BufferingHandler(999)
    getLogger("pantheraml").addHandler(said)
    evaluating = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    trainer = build(folder, output, full_at(4), async_save=True, **evaluating)
    trainer.train()
    lines = [record.getMessage() for record in said.buffer]
    return [line for line in lines if "checkpoint-4" in line], trainer.state.best_model_checkpoint


def test_another_costs_that_checkpoint_on_all_ranks(folder, tmp_path):  # noqa: F811
    (warned, best), (quiet, same) = run_ranks(2, goes_on, folder, tmp_path)
    assert len(warned) == 1 and "No space left" in warned[0] and "Training goes on" in warned[0]
    assert quiet == [] and best == same == str(tmp_path / "checkpoint-6")
    assert names(tmp_path) == ["best.json", "checkpoint-2", "checkpoint-6", "latest.json"]


def test_killed_while_a_checkpoint_is_written(folder, tmp_path):  # noqa: F811
    class Killed(PantheraMLTrainer):
        def _write_model(self, target, weights):
            super()._write_model(target, weights)
            if target.endswith("checkpoint-4"):
                os.kill(os.getpid(), signal.SIGKILL)

    code = in_a_process(lambda: build(folder, tmp_path, Killed, async_save=True).train())
    assert code == -signal.SIGKILL and len(hidden(tmp_path)) == 1
    choice = newest_whole(tmp_path)
    assert choice.folder.name == "checkpoint-2" and "unfinished: removed" in str(choice.passed_over[0])


class Ended(Exception):
    pass


def test_a_run_that_fails_ends_its_save(folder, tmp_path):  # noqa: F811
    class Fails(PantheraMLTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise Ended
            return super().training_step(*args, **kwargs)

    with pytest.raises(Ended):
        build(folder, tmp_path, Fails, async_save=True).train()
    assert newest_whole(tmp_path, end_saves=False).folder.name == "checkpoint-2" and hidden(tmp_path) == []


def adapters(**settings):
    return lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **settings))


def two_adapters(model):
    model = adapters()(model)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["v_proj"]))
    return model


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (adapters(), 4),
        (adapters(modules_to_save=["lm_head"], use_dora=True, bias="lora_only"), 7),
        (two_adapters, 8),
        (lambda model: model, 21),
    ],
)
def test_what_is_saved_is_copied_and_no_more(folder, tmp_path, make, most):  # noqa: F811
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64, load_in_4bit=False, device_map="cpu")
    model = make(model)
    weights = saved_weights(model)
    assert len(weights) == most
    model.save_pretrained(str(tmp_path / "model"))
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    model.save_pretrained(str(tmp_path / "copy"), state_dict=copies)
    assert tree(tmp_path / "model") == tree(tmp_path / "copy")


def test_what_is_not_part_of_the_model_is_saved_at_the_step(folder):  # noqa: F811
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64, load_in_4bit=False, device_map="cpu")
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert saved_weights(model) is None


def test_where_it_cannot_be_the_log_says_why(folder, tmp_path, caplog):  # noqa: F811
    trainer = build(folder, tmp_path, async_save=True)
    assert trainer.saves_beside()
    trainer.args.push_to_hub = True
    with caplog.at_level("INFO", "pantheraml"):
        assert not trainer.saves_beside()
    assert "not written beside the training: with push_to_hub" in caplog.text
