"""What a run says before its first step, and after its last: who takes part, what is trained, what memory it takes."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from pantheraml.devices.memory import GIB, describe_bytes
from pantheraml.models.adapters import count_parameters
from pantheraml.models.memory_estimate import MemoryEstimate, predicted_bytes
from pantheraml.models.recompute_plan import RecomputePlan
from pantheraml.models.split import is_split
from pantheraml.models.state import get_state
from pantheraml.training.rows import token_counts


def device_name(device: torch.device) -> str:
    """``NVIDIA H200``, or ``CPU``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def describe_ranks(places: list[tuple[str, str]], strategy: str) -> str:
    """Who takes part, and how the work is spread.

    Args:
        places: host and device name of each rank.
        strategy: of ``MultiGPUConfig``.
    """
    by_host: dict[str, list[str]] = {}
    for host, name in places:
        by_host.setdefault(host, []).append(name)
    hosts = "; ".join(
        f"{len(names)} on {host}: {', '.join(dict.fromkeys(names))}" for host, names in by_host.items()
    )
    why = 'as strategy="ddp" says' if strategy == "ddp" else "since the model fits on each device"
    return f"{len(places)} ranks ({hosts}); DDP, {why}: each has the whole model and rows of its own."


def describe_run(model: nn.Module, args: TrainingArguments, rows: Any) -> str:
    """What is trained, in what precision, and of what a step is made."""
    trainable, total = count_parameters(model)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    alone = f" on {args.device} ({device_name(args.device)})" if args.world_size == 1 else ""
    count = f"{len(rows)} rows" if isinstance(rows, Dataset) else "streamed rows"
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return (
        f"{trainable:,} of {total:,} parameters are trained{alone} in {precision}; {count}; "
        f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {args.world_size} = {step} "
        f"rows a step (per device x accumulation x ranks)."
    )


def longest_batch(rows: Any, args: TrainingArguments) -> int | None:
    """Tokens of the largest micro-batch, padding included; None where that cannot be known."""
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return None
    return int(token_counts(rows).max()) * args.per_device_train_batch_size


def predict_memory(
    model: Any, args: TrainingArguments, longest: int | None, merged: int
) -> MemoryEstimate | None:
    """What a step takes of each rank's device; None where that cannot be known.

    Args:
        model: with its plan to recompute for ``longest`` tokens.
        args: of the run.
        longest: tokens of the largest micro-batch.
        merged: tokens up to which micro-batches are merged; 0 where they are not.
    """
    state = get_state(model)
    if state is None or longest is None or is_split(model):
        return None
    tokens = max(longest, min(merged, longest * args.gradient_accumulation_steps))
    # Micro-batches are merged up to what needs no recompute.
    is_planned = bool(state.plans) and state.plans[0].tokens >= tokens
    plan = state.plans[0] if is_planned else RecomputePlan(tokens, 0)
    return predicted_bytes(model, tokens, plan, str(getattr(args.optim, "value", args.optim)))


def describe_memory(predicted: MemoryEstimate, total: float | None) -> str:
    """What each device will hold; ``total`` is what it has in GiB, if it is a GPU."""
    room = f" of {total:.1f}" if total is not None else ""
    return (
        f"predicted memory of each device: {describe_bytes(predicted.total)}{room} = {predicted.describe()}."
    )


def compare_memory(predicted: MemoryEstimate, measured: list[float]) -> str:
    """The prediction beside the peaks of all ranks' devices in GiB."""
    return f"memory: predicted {describe_bytes(predicted.total)}, measured {describe_bytes(int(max(measured) * GIB))}."
