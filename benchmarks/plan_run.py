"""Some runs of the plan grid in this process (or on the ranks of torchrun), one after the other.

    python -m benchmarks.plan_run CASES.json RESULT.json

Each run is a few steps of a trainer on random rows. What the planner says before anything is loaded, what the trainer
predicts of the model that lies there, and the peak that torch measured are written side by side; see
``benchmarks.plan_grid``, which starts this.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.plan_cases import PlanCase, config_of

STEPS = 3
FLAGS: dict[str, dict[str, Any]] = {
    "lora": dict(load_in_16bit=True),
    "qlora": dict(load_in_4bit=True),
    "fp8": dict(load_in_fp8=True),
    "full": dict(full_finetuning=True),
}


def planned(case: PlanCase, shape: str, ranks: int, recomputing: int) -> int:
    """Bytes that torch would hand out by the planner, from the configuration alone.

    Args:
        case: the run.
        shape: of its model.
        ranks: GPUs.
        recomputing: layers that recomputed in the run.
    """
    import torch

    from pantheraml.devices.estimate import Work, estimate
    from pantheraml.models.precision import PrecisionFlags, choose_precision
    from pantheraml.models.weight_sizes import measure_parts

    config, flags = config_of(case.family, shape), PrecisionFlags(**FLAGS[case.method])
    dtype = None if flags.full_finetuning else "bfloat16"
    precision = choose_precision(flags, dtype, torch.device("cpu"), None)
    parts = measure_parts(config, precision, full_finetuning=flags.full_finetuning)
    assert parts is not None, "the grid has known families"
    room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    work = Work(case.rows * case.seq, recomputing=(recomputing,), room=room)
    return max(one.total for one in estimate(parts, layout_of(case, ranks), work))


def layout_of(case: PlanCase, ranks: int) -> Any:
    """How the planner calls what ``config_for`` asks for."""
    from pantheraml.devices.layout import Layout

    name: Any = case.strategy
    if name in ("tensor", "pipeline"):
        return Layout(name, **{name: ranks})
    if name not in ("fsdp", "deepspeed"):
        return Layout(name, data=ranks)
    config = config_for(name, ranks, case.method)
    if name == "deepspeed":
        stage = config.zero_stage
        return Layout(name, data=ranks, shard=ranks, shard_frozen=stage == 3, zero_stage=stage)
    shares_frozen = case.method == "full" or bool(config.shard_frozen)
    return Layout(name, data=ranks, shard=config.shard_size or ranks, shard_frozen=shares_frozen)


def config_for(strategy: str, ranks: int, method: str = "lora") -> Any:
    """The ``MultiGPUConfig`` of a strategy; it refuses one that this version does not have.

    Args:
        strategy: as ``MultiGPUConfig`` names it.
        ranks: GPUs.
        method: of ``FLAGS``; beside adapters, FSDP2 shares frozen weights out though a GPU holds them.
    """
    from pantheraml import MultiGPUConfig

    settings: dict[str, Any] = {}
    if strategy in ("tensor", "pipeline"):
        settings[f"{strategy}_parallel"] = ranks
    if strategy == "fsdp" and method != "full":
        settings["shard_frozen"] = True
    return MultiGPUConfig(strategy=strategy, **settings)  # pyright: ignore[reportArgumentType]


def measure(case: PlanCase, folder: Path, shape: str, gpus: int) -> dict[str, Any]:
    """Train for a few steps on ``gpus`` GPUs, of which this process has one, or, of a pipeline, all."""
    import torch
    from datasets import Dataset

    from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments
    from pantheraml.distributed.process_group import get_world_size
    from pantheraml.models.state import get_state

    several = None if case.strategy == "none" else config_for(case.strategy, gpus, case.method)
    on_gpu = torch.cuda.is_available()
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=case.seq,
        use_gradient_checkpointing=case.recompute,
        use_multi_gpu=several,
        device_map=None if on_gpu else "cpu",
        **FLAGS[case.method],
    )
    if case.method != "full":
        model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=case.recompute)
    vocabulary, ranks = model.config.vocab_size, get_world_size()
    ids = torch.randint(
        3, vocabulary, (STEPS * case.rows * ranks, case.seq), generator=torch.Generator().manual_seed(0)
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    with tempfile.TemporaryDirectory() as output:
        args = PantheraMLTrainingArguments(
            output_dir=output,
            per_device_train_batch_size=case.rows,
            max_steps=STEPS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=STEPS,
        )
        trainer = PantheraMLDistributedTrainer(
            model, args, train_dataset=rows, tokenizer=tokenizer, multi_gpu_config=several
        )
        trainer.train()
        state, record = get_state(model), Path(output, "memory.json")
        told = json.loads(record.read_text()) if record.exists() else []
    recomputing = sum(plan.layers for plan in state.plans) if state is not None else 0
    return {
        "recomputing": recomputing,
        "planned": planned(case, shape, gpus, recomputing),
        "predicted": max((one["predicted_allocated"] for one in told), default=None),
        "measured": max((one["measured_allocated"] for one in told), default=None),
        "moment": told[0]["moment"] if told else None,
        "predicted_parts": [one["predicted"] for one in told],
        "loss": trainer.state.log_history[0].get("loss"),
    }


def run(case: PlanCase, folder: Path, shape: str, gpus: int = 1) -> dict[str, Any]:
    """``measure``, and a status instead of an exception; memory of a run is gone before the next."""
    import torch

    from pantheraml.errors import HardwareError, NotYetError

    began = time.perf_counter()
    try:
        found = {"status": "ok", **measure(case, folder, shape, gpus)}
    except (HardwareError, NotYetError, ImportError) as error:
        found = {"status": "not run", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        found["left_bytes"] = torch.cuda.memory_allocated()
    return {**vars(case), "seconds": round(time.perf_counter() - began, 1), **found}


def main(cases: Path, result: Path) -> None:
    """Run what ``cases`` lists: {"shape", "folder", "gpus", "cases"}; rank 0 writes ``result``, after every run."""
    told = json.loads(cases.read_text())
    lines: list[dict[str, Any]] = []
    for one in told["cases"]:
        lines.append(run(PlanCase(**one), Path(told["folder"]), told["shape"], told["gpus"]))
        from pantheraml.distributed.process_group import get_rank

        if get_rank() == 0:
            result.write_text(json.dumps(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
