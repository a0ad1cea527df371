"""What a run goes on with: one file, written by the main process, read by every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pantheraml.errors import CheckpointError


def save_checkpoint(
    file: Path, accelerator: Accelerator, model: Any, optimizer: Any, *, step: int, run: dict[str, Any]
) -> None:
    """Write the state after ``step`` to ``file``: to another name first, so that it is whole or not there.

    Every rank calls this. Weights are saved in no wrapper: their names have no ``module.`` in front.

    Args:
        file: the checkpoint.
        accelerator: of the run.
        model: as ``accelerator.prepare`` gave it.
        optimizer: as ``accelerator.prepare`` gave it.
        step: the last one that was done.
        run: what a run must share to go on with it: plain values.
    """
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    state = {
        "step": step,
        "run": run,
        "model": accelerator.unwrap_model(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    unfinished = file.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(file)


def load_checkpoint(
    file: Path, accelerator: Accelerator, model: Any, optimizer: Any, run: dict[str, Any]
) -> int:
    """Give ``model`` and ``optimizer``, prepared, the state in ``file``.

    Nothing else has a state: a run draws no random numbers, and the order of its rows follows from the step.
    Every rank calls this, on any number of them.

    Returns:
        The last step that was done.

    Raises:
        CheckpointError: it is of another run.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)
    others = {
        name: (state["run"].get(name), now) for name, now in run.items() if state["run"].get(name) != now
    }
    if others:
        raise CheckpointError(
            got=f"{file} is of a run with {', '.join(f'{name}={was}' for name, (was, _) in others.items())}.",
            need=f"This one has {', '.join(f'{name}={now}' for name, (_, now) in others.items())}; a run that goes on "
            "takes the steps of the one before, on any number of ranks.",
            fix="Write the settings of that run (histories_per_step is train_batch_size x ranks x "
            "gradient_accumulation_steps), or give another --output.",
        )
    accelerator.unwrap_model(model).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"]
