"""What a run says before its first step, and after its last: who takes part, what is trained, what memory it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from pantheraml.devices.memory import GIB, describe_bytes
from pantheraml.devices.peak_memory import ONE_BUCKET_BYTES, Outliving
from pantheraml.devices.zero import Zero
from pantheraml.models.adapters import count_parameters
from pantheraml.models.memory_estimate import MemoryEstimate, Share, describe, predicted_bytes
from pantheraml.models.recompute import sections
from pantheraml.models.recompute_plan import RecomputePlan
from pantheraml.models.split import Split, is_split
from pantheraml.models.state import ModelState, get_state
from pantheraml.training.global_batch import GlobalBatch
from pantheraml.training.rows import token_counts

# What a step takes of each device that a rank trains on.
Predicted = dict[torch.device, MemoryEstimate]


def device_name(device: torch.device) -> str:
    """``NVIDIA H200``, or ``CPU``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def device_names(model: nn.Module, device: torch.device) -> str:
    """``NVIDIA H200``, or ``2 x NVIDIA H200`` where ``model`` is split over two; ``device`` is that of the run."""
    state = get_state(model)
    devices = (device,) if state is None or state.split is None else state.split.devices
    counts = Counter(map(device_name, devices))
    return " and ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())


def describe_ranks(places: list[tuple[str, str]], spread: str) -> str:
    """Who takes part, and how the work is spread.

    Args:
        places: host and device names of each rank.
        spread: how the work is spread, as its strategy describes it.
    """
    by_host: dict[str, list[str]] = {}
    for host, name in places:
        by_host.setdefault(host, []).append(name)
    hosts = "; ".join(
        f"{len(names)} on {host}: {', '.join(dict.fromkeys(names))}" for host, names in by_host.items()
    )
    return f"{len(places)} ranks ({hosts}); {spread}."


def describe_run(model: nn.Module, args: TrainingArguments, rows: Any, batch: GlobalBatch) -> str:
    """What is trained, in what precision, and of what a step is made."""
    trainable, total = count_parameters(model)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    state = get_state(model)
    devices = [args.device] if state is None or state.split is None else state.split.devices
    kinds = ", ".join(dict.fromkeys(device_name(device) for device in devices))
    alone = f" on {', '.join(map(str, devices))} ({kinds})" if args.world_size == 1 else ""
    count = f"{len(rows)} rows" if isinstance(rows, Dataset) else "streamed rows"
    each = f"{batch.per_device} x {batch.accumulation} x {batch.ranks}"
    step = (
        f"{each} = {batch.rows} rows a step" if batch.is_even else f"{batch.rows} rows a step, up to {each}"
    )
    return (
        f"{trainable:,} of {total:,} parameters are trained{alone} in {precision}; {count}; {step} "
        f"(per device x accumulation x ranks)."
    )


class BatchTokens(NamedTuple):
    """Tokens of micro-batches of as many rows as one has at most.

    Attributes:
        least: of the shortest rows.
        most: of the longest ones, padding included.
    """

    least: int
    most: int


def batch_tokens(rows: Any, most: int) -> BatchTokens | None:
    """Of micro-batches of ``most`` rows; None where that cannot be known."""
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return None
    counts = token_counts(rows)
    return BatchTokens(int(counts.min()) * most, int(counts.max()) * most)


def joined_tokens(batch: BatchTokens | None, merged: int) -> int:
    """Tokens of the largest pass that micro-batches are merged to, where ``merged`` is the limit.

    They stay whole: of rows of equal length, few fill it.
    """
    if batch is None or not merged:
        return merged
    together = merged // max(1, batch.least)
    return min(merged, max(1, together) * batch.most)


def predict_memory(
    model: Any, args: TrainingArguments, longest: int | None, merged: int, zero: Zero | None = None
) -> Predicted | None:
    """What a step takes of each device of a rank; None where that cannot be known.

    Args:
        model: with its plan to recompute for ``longest`` tokens.
        args: of the run.
        longest: tokens of the largest micro-batch.
        merged: tokens up to which micro-batches are merged; 0 where they are not.
        zero: of DeepSpeed, where it trains.
    """
    state = get_state(model)
    if state is None or longest is None or (is_split(model) and state.split is None):
        return None
    optim = str(getattr(args.optim, "value", args.optim))
    if state.split is not None:
        return {
            share.device: predicted_bytes(model, longest, plan, optim, share, outliving=Outliving(sums=True))
            for share, plan in _shares(model, state, longest)
        }
    tokens = max(longest, min(merged, longest * args.gradient_accumulation_steps))
    # Micro-batches are merged up to what needs no recompute.
    is_planned = bool(state.plans) and state.plans[0].tokens >= tokens
    plan = state.plans[0] if is_planned else RecomputePlan(tokens, 0)
    outliving = _outliving(model, args, zero, sums=longest * args.gradient_accumulation_steps > tokens)
    found = predicted_bytes(model, tokens, plan, optim, outliving=outliving, zero=zero)
    return {cast(torch.device, args.device): found}


def _outliving(model: Any, args: TrainingArguments, zero: Zero | None, *, sums: bool) -> Outliving:
    """Which gradients outlive a backward; ``sums``: a step has several passes."""
    if zero is not None:
        return zero.outliving(sums=sums)
    sharding = getattr(get_state(model), "sharding", None)
    if args.world_size == 1 or (sharding is not None and sharding.trained):
        return Outliving(sums=sums)  # FSDP2 gives a step's gradients back
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    cap = ONE_BUCKET_BYTES if args.ddp_bucket_cap_mb is None else args.ddp_bucket_cap_mb * 2**20
    return Outliving(True, sums, late=sharding is not None or trained <= cap)


def _shares(model: Any, state: ModelState, tokens: int) -> list[tuple[Share, RecomputePlan]]:
    """What each device has of a split model, and the plan for it."""
    split = cast(Split, state.split)
    parts = {section.device: section for section in sections(model, state)}
    plans = dict(zip(parts, state.plans, strict=False))
    found: list[tuple[Share, RecomputePlan]] = []
    for device in split.devices:
        part = parts.get(device)
        layers, in_flight = (0, 1.0) if part is None else (len(part.layers), part.in_flight)
        share = Share(device, layers, in_flight, has_head=device == split.head)
        found.append((share, plans.get(device, RecomputePlan(tokens, 0))))
    return found


def describe_memory(predicted: Predicted, totals: Mapping[torch.device, float]) -> str:
    """What each device will hold, a line for each; ``totals`` is what GPUs have, in GiB."""
    lines: list[str] = []
    for device, one in predicted.items():
        room = f" of {totals[device]:.1f}" if device in totals else ""
        whose = "each device" if len(predicted) == 1 else str(device)
        lines.append(f"predicted memory of {whose}: {describe_bytes(one.total)}{room} = {describe(one)}.")
    return "\n".join(lines)


def compare_memory(predicted: Predicted, measured: Sequence[Sequence[float]]) -> str:
    """The prediction beside the peaks in GiB, ``measured[rank][device]``; of the ranks the highest."""
    peaks = [max(column) for column in zip(*measured, strict=True)]
    expected = ", ".join(describe_bytes(one.total) for one in predicted.values())
    return f"memory: predicted {expected}, measured {', '.join(describe_bytes(int(peak * GIB)) for peak in peaks)}."
