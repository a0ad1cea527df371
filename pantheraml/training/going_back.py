"""Weights and optimizer go back to a checkpoint of the run; the schedule and the rows go on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pantheraml.checkpoint.names import step_of
from pantheraml.checkpoint.resuming import newest_whole


def last_whole_of(run: str, saved: Collection[str], resumed: str | None) -> str | None:
    """The last whole checkpoint of a run; rank 0 does this.

    Args:
        run: the run's folder, which may hold checkpoints of another run still: those are nothing to go back to.
        saved: what this run has saved.
        resumed: what it went on with, perhaps from another folder.
    """
    folder = newest_whole(run).folder
    ours = {Path(one).resolve() for one in saved}
    return str(folder) if folder is not None and folder.resolve() in ours else resumed


def go_back(trainer: Any, folder: str) -> int:
    """Load weights, optimizer and the scale of losses; every rank does this between two steps.

    Args:
        trainer: the transformers trainer; its schedule, its step and its rows stay where they are.
        folder: of a checkpoint with an optimizer.

    Returns:
        How many steps that undoes.
    """
    schedule = trainer.lr_scheduler.state_dict()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    trainer._load_from_checkpoint(folder)
    trainer._load_optimizer_and_scheduler(folder)
    trainer._load_scaler(folder)
    trainer.lr_scheduler.load_state_dict(schedule)
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return trainer.state.global_step - (step_of(Path(folder).name) or 0)
