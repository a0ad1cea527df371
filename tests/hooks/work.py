"""What the tests of hooks train: rows of several lengths whose number is no multiple of a step's."""

from __future__ import annotations

from datasets import Dataset

ROWS = Dataset.from_dict(
    {"text": [f"The capital number {i} is {i * 7}." + " And so on." * (i % 4) for i in range(21)]}
)
SETTINGS = dict(
    gradient_accumulation_steps=2, max_steps=4, logging_steps=1, learning_rate=1e-3, bf16=False, report_to="none",
    save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip


def logged(trainer):
    """Loss and gradient norm of each step."""
    return [[log["loss"], log["grad_norm"]] for log in trainer.state.log_history if "loss" in log]
