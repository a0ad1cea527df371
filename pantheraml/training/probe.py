"""Two real steps of a plan's micro-batch on a GPU of this machine, beside what the estimate says of them."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pantheraml.devices.estimate import Work, estimate
from pantheraml.devices.known_gpus import GIB, gpu_of
from pantheraml.devices.layout import Layout
from pantheraml.devices.peak_memory import MemoryEstimate
from pantheraml.devices.plan import Plan, PlanRequest, best_plan
from pantheraml.errors import ConfigError, HardwareError
from pantheraml.models.optimal_config import METHODS
from pantheraml.training.memory_record import NAME

_STEPS = 2
# Ids of a random row begin behind those that tokenizers keep for special tokens.
_FIRST_ID = 3


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
        gpu: its name.
        rows: of the micro-batch.
        seq: tokens of a row.
        recomputing: layers that did.
        estimated: for just that.
        measured: bytes that torch allocated at its peak.
    """

    gpu: str
    rows: int
    seq: int
    recomputing: int
    estimated: MemoryEstimate
    measured: int

    @property
    def ratio(self) -> float:
        """Of the estimate, what was measured."""
        return self.measured / self.estimated.total

    def describe(self) -> str:
        """As a line of the plan."""
        return (
            f"{_STEPS} steps of {self.rows} x {self.seq:,} tokens on one {self.gpu}, {self.recomputing or 'no'} layers "
            f"recomputing: {self.measured / GIB:.2f} GiB allocated, {self.estimated.total / GIB:.2f} estimated "
            f"({self.ratio:.3f} of it, by which the plan counts)"
        )


class _Steps(NamedTuple):
    """What steps came to: layers that recomputed, and the peak in bytes, None on a CPU."""

    recomputing: int
    peak: int | None


def probe(model: str, method: str, rank: int, request: PlanRequest, plan: Plan) -> Probe:
    """Train for two steps on the first GPU that this process sees, on random rows.

    Args:
        model: local folder or hub id, with weights.
        method: of ``METHODS``.
        rank: the adapter's r.
        request: what was planned.
        plan: the one whose micro-batch is tried.

    Raises:
        HardwareError: there is no GPU, on which alone peaks are measured.
        ConfigError: a GPU alone does not hold the model.
    """
    import torch

    if not torch.cuda.is_available():
        raise HardwareError(
            got="A probe was asked for, and this process sees no GPU.",
            need="Peaks are measured on GPUs alone.",
            fix="Run this command with --probe on a machine that has one, or leave --probe out.",
        )
    gpu = gpu_of(torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[0])
    alone = replace(request, gpus=(gpu,), rows=plan.rows, strategy="none", offload=False)
    if best_plan(alone, Layout("none")) is None:
        raise ConfigError(
            got=f"One {gpu.name} with {gpu.memory / GIB:.1f} GiB free does not train '{model}' by itself.",
            need="A probe trains the whole model on one GPU.",
            fix="Leave --probe out, or probe shorter rows (--seq) or --method qlora.",
        )
    done = train_two_steps(model, method, rank, request, plan.rows)
    assert done.peak is not None, "a GPU has a peak"
    work = Work(
        plan.rows * request.seq, recomputing=(done.recomputing,), optim=request.optim, room=gpu.memory
    )
    (estimated,) = estimate(request.parts, Layout("none"), work)
    return Probe(gpu.name, plan.rows, request.seq, done.recomputing, estimated, done.peak)


def train_two_steps(model: str, method: str, rank: int, request: PlanRequest, rows: int) -> _Steps:
    """Load ``model`` and train it on random rows of ``request.seq`` tokens, ``rows`` at a time."""
    import torch
    from datasets import Dataset

    from pantheraml.fast_model import FastLanguageModel
    from pantheraml.kernels.utils import clear_gpu_cache
    from pantheraml.models.state import get_state
    from pantheraml.training.arguments import PantheraMLTrainingArguments
    from pantheraml.training.trainer import PantheraMLTrainer

    # Of this process, before the probe; what nothing refers to any more would go during it.
    clear_gpu_cache()
    there = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    loaded: Any
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        model,
        max_seq_length=request.seq,
        use_gradient_checkpointing=request.recompute,
        use_multi_gpu=False,
        **METHODS[method],
    )
    if method != "full":
        loaded = FastLanguageModel.get_peft_model(loaded, r=rank)
    shape, generator = (_STEPS * rows, request.seq), torch.Generator().manual_seed(0)
    ids = torch.randint(_FIRST_ID, loaded.config.get_text_config().vocab_size, shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        args = PantheraMLTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=_STEPS,
            optim=request.optim,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"input_ids": ids.tolist()})
        PantheraMLTrainer(loaded, args, train_dataset=data, tokenizer=tokenizer).train()
        record = Path(folder, NAME)
        told = json.loads(record.read_text()) if record.exists() else []
    state = get_state(loaded)
    recomputing = sum(plan.layers for plan in state.plans) if state is not None else 0
    return _Steps(recomputing, told[0]["measured_allocated"] - there if told else None)
