"""What is changed while multi-GPU is enabled, what trainers make of it, and that nothing is left of it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import pantheraml
from pantheraml.distributed import process_group
from pantheraml.errors import ConfigError, HardwareError
from pantheraml.hooks.adoption import is_trls_own
from pantheraml.hooks.sft_scripts import HookedSFTTrainer
from pantheraml.models.state import get_state
from pantheraml.training.head import needs_cpu_head
from pantheraml.training.trainer import PantheraMLTrainer
from tests.hooks.work import ROWS, SETTINGS, logged
from tests.training.starving import Starved

needs_head = pytest.mark.skipif(
    needs_cpu_head(torch.device("cpu")), reason="this TRL computes the head of its trainer in Triton only"
)


@pytest.fixture
def build(llama, tmp_path):
    """``build(kind=SFTTrainer, model=None, learning_rate=..., ...)`` -> a trainer, as a script of TRL's makes it."""

    def build(kind=SFTTrainer, model=None, arguments=(), **settings):
        model = AutoModelForCausalLM.from_pretrained(llama) if model is None else model
        settings = {**SETTINGS, "per_device_train_batch_size": 4, "use_cpu": True, **settings}
        return kind(model, SFTConfig(str(tmp_path), **settings), train_dataset=ROWS, **dict(arguments))

    return build


def weights(trainer):
    return [weight.detach().clone() for weight in trainer.model.parameters()]


KINDS = (SFTTrainer, transformers.Trainer, trl.trainer.base_trainer._BaseTrainer, GRPOTrainer)


@pytest.mark.promise("C1")
def test_disabled_nothing_is_left_of_it():
    before, settings = [dict(vars(kind)) for kind in KINDS], process_group.settings_of_run()
    pantheraml.enable_multi_gpu(num_gpus=1, debug=True, timeout_minutes=7)
    changed = [
        (kind.__name__, name)
        for kind, held in zip(KINDS, before, strict=True)
        for name in vars(kind)
        if vars(kind)[name] is not held[name]
    ]
    assert changed == [("SFTTrainer", "__init__"), ("Trainer", "__init__")]
    assert process_group.settings_of_run().timeout_minutes == 7
    assert dist.get_debug_level() == dist.DebugLevel.INFO
    pantheraml.disable_multi_gpu()
    for kind, held in zip(KINDS, before, strict=True):
        assert vars(kind).keys() == held.keys()
        assert all(vars(kind)[name] is value for name, value in held.items())
    assert process_group.settings_of_run() is settings and dist.get_debug_level() == dist.DebugLevel.OFF


@pytest.mark.promise("C1")
@needs_head
def test_disabled_it_trains_as_before_bit_by_bit(build):
    def train():
        trainer = build()
        trainer.train()
        assert type(trainer) is SFTTrainer
        return logged(trainer), weights(trainer)

    plain = train()
    pantheraml.enable_multi_gpu(num_gpus=1)
    hooked = build()
    hooked.train()
    assert type(hooked) is HookedSFTTrainer
    assert torch.tensor(logged(hooked)) == pytest.approx(torch.tensor(plain[0]), rel=1e-6)
    pantheraml.disable_multi_gpu()
    again = train()
    assert again[0] == plain[0]
    assert all(torch.equal(one, other) for one, other in zip(again[1], plain[1], strict=True))


@pytest.mark.promise("C1")
def test_the_status_is_what_is_so(build):
    nothing = pantheraml.get_multi_gpu_status()
    assert not pantheraml.is_multi_gpu_enabled() and pantheraml.get_active_config() is None
    assert (nothing["enabled"], nothing["world_size"], nothing["backend"], nothing["changed"]) == (
        False,
        1,
        None,
        [],
    )
    arguments = {"num_gpus": 1, "batch_size_per_gpu": 3, "hang_seconds": 0}
    assert pantheraml.enable_multi_gpu(**arguments) == pantheraml.get_multi_gpu_status()
    active = pantheraml.get_active_config()
    assert pantheraml.is_multi_gpu_enabled() and arguments.items() <= active.items()
    assert pantheraml.enable_multi_gpu(**active)["config"] == active, "the same again changes nothing"
    assert len(PantheraMLTrainer.__mro__) < len(type(build()).__mro__)
    assert pantheraml.get_multi_gpu_status()["trainers"] == ["SFTTrainer"]
    with pytest.raises(ConfigError, match="called again, with another batch_size_per_gpu"):
        pantheraml.enable_multi_gpu(**{**arguments, "batch_size_per_gpu": 2})
    pantheraml.disable_multi_gpu()
    pantheraml.disable_multi_gpu()
    assert pantheraml.get_multi_gpu_status() == {**nothing, "started_by": "python"}


class Recomputing(transformers.TrainerCallback):
    """Whether layers recompute in a step."""

    def on_step_end(self, args, state, control, model, **_):
        self.found = model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize("recompute", [False, True, "auto"])
def test_arguments_win_over_the_scripts(build, recompute):
    pantheraml.enable_multi_gpu(num_gpus=1, batch_size_per_gpu=3, enable_gradient_checkpointing=recompute)
    seen = Recomputing()
    trainer = build(gradient_checkpointing=not recompute, max_steps=1, arguments={"callbacks": [seen]})
    trainer.train()
    assert trainer.args.per_device_train_batch_size == 3
    assert seen.found == trainer.args.gradient_checkpointing == bool(recompute)


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        (transformers.TrainingArguments, "auto", "auto"),
        (SFTConfig, "auto", "auto"),
        (SFTConfig, True, True),
        (transformers.TrainingArguments, False, False),
        (SFTConfig, None, "offload"),
    ],
)
def test_models_of_ours_recompute_as_asked(llama, tmp_path, kind, asked, expected):
    pantheraml.enable_multi_gpu(num_gpus=1, enable_gradient_checkpointing=asked)
    model, tokenizer = pantheraml.FastLanguageModel.from_pretrained(
        str(llama), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    model = pantheraml.FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing="offload")
    SFTTrainer(
        model, kind(str(tmp_path), use_cpu=True, **SETTINGS), train_dataset=ROWS, processing_class=tokenizer
    )
    assert get_state(model).recompute == expected


def test_memory_that_runs_out(build):
    """A step is repeated in smaller passes, or ends the run, as it is asked for."""
    pantheraml.enable_multi_gpu(num_gpus=1, enable_memory_optimization=True)
    trainer = build()
    starved = Starved(trainer.model, 64)
    trainer.train()
    assert starved.failures and len(logged(trainer)) == 4
    pantheraml.disable_multi_gpu()
    pantheraml.enable_multi_gpu(num_gpus=1, enable_memory_optimization=False)
    trainer = build()
    starved = Starved(trainer.model, 64)
    with pytest.raises(HardwareError, match="ran out"):
        trainer.train()
    assert len(starved.failures) == 1


def test_models_by_name_and_older_arguments(build, llama, tmp_path):
    pantheraml.enable_multi_gpu(num_gpus=1)
    given = build()
    given.train()
    named = build(model=str(llama))
    named.train()
    assert logged(named) == logged(given)
    older = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(llama), tokenizer=AutoTokenizer.from_pretrained(llama),
        train_dataset=ROWS.rename_column("text", "words"), dataset_text_field="words", max_seq_length=24,
        args=transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, use_cpu=True, **SETTINGS
        ),
    )  # fmt: skip
    assert older.args.max_length == 24 and max(map(len, older.train_dataset["input_ids"])) == 24
    with pytest.raises(ValueError, match="bf16"):  # TRL's own default, which it has on a CPU, too
        SFTTrainer(str(llama), train_dataset=ROWS)
    with pytest.raises(TypeError, match="by place and by name"):
        SFTTrainer(str(llama), model=str(llama))
    with pytest.raises(TypeError, match="no_such_argument"):
        build(arguments={"no_such_argument": 1})


class Halved(SFTTrainer):
    """A script's own trainer."""

    def __init__(self, *args, share, **kwargs):
        self.share = share
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        return self.share * super().compute_loss(*args, **kwargs)


def test_a_scripts_own_class_keeps_its_methods(build):
    pantheraml.enable_multi_gpu(num_gpus=1)
    whole, half = build(), build(Halved, arguments={"share": 0.5})
    assert isinstance(half, Halved) and isinstance(half, HookedSFTTrainer) and type(half).__name__ == "Halved"
    whole.train()
    half.train()
    assert logged(half)[0] == pytest.approx([value / 2 for value in logged(whole)[0]], rel=1e-5)
    assert half._why_not_merged(forced=True) == "Halved has a compute_loss of its own"
    assert whole._loss_is_plain() and not half._loss_is_plain()
    assert type(build(Halved, arguments={"share": 0.5})) is type(half)


def test_our_own_trainer_is_left_as_it_is(build, llama):
    pantheraml.enable_multi_gpu(num_gpus=1, batch_size_per_gpu=1)
    ours = build(PantheraMLTrainer, arguments={"tokenizer": AutoTokenizer.from_pretrained(llama)})
    assert type(ours) is PantheraMLTrainer and ours.args.per_device_train_batch_size == 4


class Processor(transformers.ProcessorMixin):
    """Of a model that reads images, too."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


@needs_head
def test_what_is_left_to_trl(build, llama):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        from trl.experimental.gkd import GKDTrainer
    pantheraml.enable_multi_gpu(num_gpus=1)
    processor = Processor(AutoTokenizer.from_pretrained(llama))
    given = {"processing_class": processor, "data_collator": list}
    sees = build(arguments=given, dataset_kwargs={"skip_prepare_dataset": True})
    assert (
        type(sees) is SFTTrainer
        and is_trls_own(GKDTrainer, SFTTrainer)
        and not is_trls_own(SFTTrainer, SFTTrainer)
    )
    assert pantheraml.get_multi_gpu_status()["trainers"] == []


def test_other_trainers_have_their_own_arguments(llama, tmp_path):
    def grpo(**settings):
        config = GRPOConfig(
            str(tmp_path), num_generations=2, use_cpu=True, bf16=False, report_to="none",
            **{"per_device_train_batch_size": 2, **settings},
        )  # fmt: skip
        return GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(llama), lambda completions, **_: [0.0] * len(completions), config,
            ROWS.rename_column("text", "prompt"),
        )  # fmt: skip

    pantheraml.enable_multi_gpu(
        num_gpus=1, batch_size_per_gpu=2, find_unused_parameters=True, enable_gradient_checkpointing=True
    )
    trainer = grpo()
    assert type(trainer) is GRPOTrainer and trainer.args.ddp_find_unused_parameters
    with pytest.raises(ConfigError, match=r"batch_size_per_gpu=2.*per_device_train_batch_size=4"):
        grpo(per_device_train_batch_size=4)
    with pytest.raises(ConfigError, match="enable_gradient_checkpointing=True"):
        grpo(gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_gpu": 2}, "Did you mean 'num_gpus'"),
        ({"backend": "gloo"}, "It is called ddp_backend here"),
        ({"num_processes": 2}, "Write num_gpus="),
        ({"num_gpus": 0}, "a whole number of 1 or more"),
        ({"batch_size_per_gpu": True}, "a whole number of 1 or more"),
        ({"ddp_backend": "ncll"}, "Did you mean 'nccl'"),
        ({"debug": 1}, "It is True or False"),
        ({"enable_memory_optimization": None}, "It is True or False"),
        ({"enable_gradient_checkpointing": "always"}, "It is True, False or 'auto'"),
        ({"num_gpus": 3, "pipeline_parallel": 2}, "the degree divides the GPUs"),
        ({"strategy": "ddp", "cpu_offload": True}, "cpu_offload is a setting of"),
        ({"num_gpus": 2}, "this process runs pytest"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_changes_nothing(arguments, said):
    init, settings = SFTTrainer.__init__, process_group.settings_of_run()
    with pytest.raises(ConfigError, match=said):
        pantheraml.enable_multi_gpu(**arguments)
    assert SFTTrainer.__init__ is init and process_group.settings_of_run() is settings
    assert not pantheraml.is_multi_gpu_enabled() and dist.get_debug_level() == dist.DebugLevel.OFF


def test_somebody_elses_change_is_not_thrown_away():
    pantheraml.enable_multi_gpu(num_gpus=1)
    ours = SFTTrainer.__init__
    SFTTrainer.__init__ = copy.copy(lambda self: None)
    with pytest.raises(ConfigError, match="Undo the later change first"):
        pantheraml.disable_multi_gpu()
    assert pantheraml.is_multi_gpu_enabled()
    SFTTrainer.__init__ = ours
