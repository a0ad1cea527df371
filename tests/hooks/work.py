"""What the tests of hooks train: rows of several lengths whose number is no multiple of a step's."""

from __future__ import annotations

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

ROWS = Dataset.from_dict(
    {"text": [f"The capital number {i} is {i * 7}." + " And so on." * (i % 4) for i in range(21)]}
)
SETTINGS = dict(
    gradient_accumulation_steps=2, max_steps=4, logging_steps=1, learning_rate=1e-3, bf16=False, report_to="none",
    save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip


def reward_length(completions, **_):
    return [float(len(text)) for text in completions]


def grpo(folder, output, per_device):
    """A script's GRPO, by a model's name, in steps of whole groups of 4; trained."""
    args = GRPOConfig(
        str(output), num_generations=4, max_completion_length=6, per_device_train_batch_size=per_device, use_cpu=True,
        **{**SETTINGS, "gradient_accumulation_steps": 3, "max_steps": 2},
    )  # fmt: skip
    trainer = GRPOTrainer(str(folder), reward_length, args, ROWS.rename_column("text", "prompt"))
    trainer.train()
    return trainer


def logged(trainer):
    """Loss and gradient norm of each step."""
    return [[log["loss"], log["grad_norm"]] for log in trainer.state.log_history if "loss" in log]
