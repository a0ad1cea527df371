"""Runs of GRPO whose every figure is kept: prompts, completions, rewards, advantages, losses."""

from __future__ import annotations

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig

from pantheraml import FastLanguageModel, MultiGPUConfig
from pantheraml.training.grpo import PantheraMLGRPOTrainer

# Prompts of several lengths: GRPO pads them on the left, on each rank to the longest of its own.
PROMPTS = [{"prompt": f"What is {'the sum of ' * (number % 3)}{number} plus two?"} for number in range(9)]


def vowels(completions, log_metric=None, **_):
    return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in completions]


def lengths(completion_ids, **_):
    return [len(ids) / 8 for ids in completion_ids]


class Kept(TrainerCallback):
    """What TRL knows of the last generation at each step, in the order of all ranks' rows."""

    def __init__(self):
        self.steps, self.trainer = [], None

    def on_step_end(self, args, state, control, **_):
        logs = self.trainer._logs
        self.steps.append(
            {
                **{name: list(logs[name]) for name in ("prompt", "completion", "advantages")},
                "rewards": {name: list(values) for name, values in logs["rewards"].items()},
            }
        )


def build(
    folder,
    output,
    *,
    kind="lora",
    config=None,
    callbacks=(),
    rewards=(vowels, lengths),
    loading=(),
    recompute="auto",
    ends=(2, *range(5, 69)),
    **settings,
):
    """A trainer of a tiny model, on the CPU if nothing else is said; ``kind`` is lora or full.

    ``ends`` are tokens that end a completion: so many that these are of several lengths.
    """
    options = {
        "max_seq_length": 64,
        **({"full_finetuning": True} if kind == "full" else {"load_in_4bit": False}),
    }
    options |= {"use_multi_gpu": config} if config is not None else {"device_map": "cpu"}
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **{**options, **dict(loading)})
    if kind == "lora":
        model = FastLanguageModel.get_peft_model(
            model, r=4, lora_dropout=0.2, use_gradient_checkpointing=recompute
        )
    model.generation_config.eos_token_id = list(ends)
    args = GRPOConfig(
        str(output),
        **{
            "num_generations": 4, "max_completion_length": 8, "max_steps": 4, "learning_rate": 1e-2, "bf16": False,
            "use_cpu": True, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "dataloader_pin_memory": False, "temperature": 0.9, "top_k": 50, **settings,
        },
    )  # fmt: skip
    return PantheraMLGRPOTrainer(
        model, list(rewards), args, tokenizer=tokenizer, train_dataset=Dataset.from_list(PROMPTS),
        eval_dataset=Dataset.from_list(PROMPTS), callbacks=list(callbacks),
    )  # fmt: skip


def figures(folder, output, strategy=None, *, evaluates=False, **settings):
    """Train; the kept steps, and loss, gradient norm, reward and entropy of each step, and an evaluation."""
    config = None if strategy is None else MultiGPUConfig(**strategy)
    kept = Kept()
    kept.trainer = build(folder, output, config=config, callbacks=[kept], **settings)
    kept.trainer.train()
    logged = [
        [line.get(name) for name in ("loss", "grad_norm", "reward", "entropy", "kl")]
        for line in kept.trainer.state.log_history
        if "loss" in line
    ]
    evaluated = {}
    if evaluates:
        found = kept.trainer.evaluate()
        evaluated = {name: found[name] for name in ("eval_loss", "eval_reward", "eval_reward_std", "eval_kl")}
        evaluated["completions"] = sorted(kept.trainer._logs["completion"])
    return {
        "evaluated": evaluated,
        "steps": kept.steps,
        "logged": logged,
        "strategy": kept.trainer._strategy.name,
    }
