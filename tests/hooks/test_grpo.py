"""``enable_grpo_support``: what it changes, what trainers make of it, and that nothing is left of it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import pantheraml
from pantheraml.checkpoint.manifest import has_manifest, problems
from pantheraml.errors import ConfigError, HardwareError
from pantheraml.hooks.grpo_scripts import HookedGRPOTrainer
from pantheraml.training.grpo import PantheraMLGRPOTrainer
from pantheraml.training.head import needs_cpu_head
from tests.hooks.work import ROWS, SETTINGS, grpo, logged, reward_length
from tests.training.starving import Starved

needs_head = pytest.mark.skipif(
    needs_cpu_head(torch.device("cpu")), reason="this TRL computes the head of its trainer in Triton only"
)


def config(output, **settings):
    given = {"num_generations": 4, "max_completion_length": 4, "use_cpu": True, **SETTINGS, **settings}
    return GRPOConfig(str(output), **given)


def test_disabled_nothing_is_left_of_it():
    kinds = (GRPOTrainer, GRPOConfig)
    before = [dict(vars(kind)) for kind in kinds]
    status = pantheraml.enable_grpo_support()
    assert pantheraml.enable_grpo_support() == status == pantheraml.get_grpo_status()
    changed = [
        f"{kind.__name__}.{name}"
        for kind, held in zip(kinds, before, strict=True)
        for name in vars(kind)
        if vars(kind)[name] is not held[name]
    ]
    assert status["enabled"] and status["changed"] == changed
    assert changed == ["GRPOTrainer.__init__", "GRPOConfig.__post_init__"]
    pantheraml.disable_grpo_support()
    pantheraml.disable_grpo_support()
    assert [dict(vars(kind)) for kind in kinds] == before
    assert not pantheraml.get_grpo_status()["enabled"]


@pytest.mark.promise("C2")
@needs_head
def test_disabled_trls_trainer_trains_what_it_trained_before_bit_by_bit(llama, tmp_path):
    def weights():
        trainer = grpo(llama, tmp_path, 4)
        assert type(trainer) is GRPOTrainer
        return [*trainer.model.parameters()]

    before = weights()
    pantheraml.enable_grpo_support()
    assert type(grpo(llama, tmp_path, 4)) is HookedGRPOTrainer
    pantheraml.disable_grpo_support()
    assert all(map(torch.equal, before, weights()))


@pytest.mark.parametrize("is_on", [True, False])
def test_memory_that_runs_out_is_met_as_enable_multi_gpu_says(llama, tmp_path, is_on):
    pantheraml.enable_grpo_support()
    pantheraml.enable_multi_gpu(num_gpus=1, enable_memory_optimization=is_on)
    model, rows = AutoModelForCausalLM.from_pretrained(llama), ROWS.rename_column("text", "prompt")
    args = config(tmp_path, per_device_train_batch_size=4, max_steps=1)
    trainer = GRPOTrainer(model, reward_length, args, rows)
    Starved(model, 100)  # rows have up to 47
    if is_on:
        trainer.train()
        assert trainer._limit.most < 10**9 and trainer.state.global_step == 1
        return
    with pytest.raises(HardwareError, match="outside of what is repeated"):
        trainer.train()


def test_a_scripts_own_class_keeps_its_methods(llama, tmp_path):
    class Doubling(GRPOTrainer):
        """Whose rewards count twice."""

        def _calculate_rewards(self, *args, **kwargs):
            return 2 * super()._calculate_rewards(*args, **kwargs)

    pantheraml.enable_grpo_support()
    model, rows = AutoModelForCausalLM.from_pretrained(llama), ROWS.rename_column("text", "prompt")
    args = config(tmp_path, per_device_train_batch_size=4, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = Doubling(model, reward_length, args, rows)
    assert type(trainer).__mro__[1:3] == (Doubling, HookedGRPOTrainer) and isinstance(trainer, GRPOTrainer)
    assert type(trainer).__name__ == "Doubling" and trainer.args is not args
    trainer.train()
    rewards = trainer._logs["rewards"]["reward_length"]
    assert list(rewards) == [2.0 * len(text) for text in trainer._logs["completion"]]
    assert len(logged(trainer)) == 1
    assert has_manifest(tmp_path / "checkpoint-1") and not problems(tmp_path / "checkpoint-1")


@pytest.mark.promise("C2")
def test_a_generation_holds_whole_groups(tmp_path, caplog):
    caplog.set_level("INFO", "pantheraml")
    unsaid = {"gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match="must be divisible by num_generations"):
        config(tmp_path, per_device_train_batch_size=6, num_generations=8, **unsaid)
    pantheraml.enable_grpo_support()
    raised = config(tmp_path, per_device_train_batch_size=6, num_generations=8, **unsaid)
    assert (raised.gradient_accumulation_steps, raised.generation_batch_size) == (4, 24)
    assert "gradient_accumulation_steps=4 makes it 24" in caplog.text
    assert config(tmp_path, per_device_train_batch_size=8, **unsaid).gradient_accumulation_steps == 1
    for written in (
        {"gradient_accumulation_steps": 2},
        {"steps_per_generation": 2, **unsaid},
        {"generation_batch_size": 12, **unsaid},
    ):
        with pytest.raises(ConfigError, match=r"Write gradient_accumulation_steps=4 .* or num_generations=6"):
            config(tmp_path, per_device_train_batch_size=6, num_generations=8, **written)
    with pytest.raises(ConfigError, match="Write per_device_eval_batch_size=4"):
        config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3)


def test_a_vllm_server_that_is_named_is_asked(tmp_path):
    given = {"use_vllm": True, "per_device_train_batch_size": 4}
    pantheraml.enable_grpo_support()
    for named in ({"vllm_server_host": "127.0.0.1"}, {"vllm_server_port": 8001}):
        assert config(tmp_path, **given, **named).vllm_mode == "server"
    assert config(tmp_path, **given).vllm_mode == "colocate"


def test_what_cannot_be_is_refused_with_what_to_type(llama, tmp_path):
    def build(model=None, split=None, **settings):
        model = AutoModelForCausalLM.from_pretrained(llama) if model is None else model
        args = config(tmp_path, per_device_train_batch_size=4, **settings)
        rows = ROWS.rename_column("text", "prompt")
        spread = None if split is None else pantheraml.MultiGPUConfig(num_processes=1, batch_split=split)
        return PantheraMLGRPOTrainer(
            model, reward_length, args, train_dataset=rows, eval_dataset=rows, multi_gpu_config=spread
        )

    with pytest.raises(ConfigError, match=r"vllm is not installed.*pip install 'trl\[vllm\]'"):
        build(use_vllm=True)
    with pytest.raises(ConfigError, match=r"from_pretrained\('some/model'\)"):
        build("some/model")
    fused, _ = pantheraml.FastLanguageModel.from_pretrained(
        str(llama), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    with pytest.raises(ConfigError, match=r'load the model with kernels="off"'):
        build(fused, use_transformers_continuous_batching=True)
    with pytest.raises(ConfigError, match=r"batch_split='speed'.*Leave batch_split out"):
        build(split="speed")
