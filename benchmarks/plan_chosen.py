"""Do the plans that are chosen run? Models of several sizes, each trained as ``get_optimal_config`` says, on N GPUs.

    python -m benchmarks.plan_chosen --gpus 1,2,4,8 --json chosen.json
    python -m benchmarks.plan_chosen --shapes llama70b --methods lora,qlora --gpus 4
    python -m benchmarks.plan_chosen --shapes tiny --gpus 1,2 --as H200 --cpu         whether the command itself works

Each run is ``benchmarks.scaling_run`` with the strategy, micro-batch and accumulation of the plan, on the first N GPUs
of CUDA_VISIBLE_DEVICES. "ran out" says that memory was too short for a step, which was repeated; "refused" that nothing
fits by the plan, with what would. Checkpoints of random weights are made in the temporary folder. Ends with code 1 when
memory ran out, or a run failed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.device import GIB
from benchmarks.scaling import run_once, tell, visible
from benchmarks.shapes import SHAPES, checkpoint

# As benchmarks.scaling calls what a method loads.
LOADS = {"lora": "bf16", "qlora": "nf4", "fp8": "fp8", "full": "full"}


def run(shape: str, method: str, gpus: int, options: argparse.Namespace) -> dict[str, Any]:
    """The plan of one run, and what became of it."""
    from pantheraml import MultiGPUConfig, get_optimal_config
    from pantheraml.devices.plan_advice import NothingFits

    line = {"shape": shape, "method": method, "gpus": gpus}
    folder = checkpoint(shape)
    try:
        best = get_optimal_config(
            str(folder), method=method, max_seq_length=options.seq, gpus=f"{gpus}x{options.kind}"
        )
    except NothingFits as error:
        return {**line, "status": "refused", "why": str(error)}
    usual = asdict(MultiGPUConfig())
    config = {name: value for name, value in asdict(best.multi_gpu_config).items() if value != usual[name]}
    settings = argparse.Namespace(
        precision=LOADS[method], seq=options.seq, steps=options.steps, telemetry="on", recompute="auto",
        profile=False, cpu=options.cpu, timeout=options.timeout, config=json.dumps(config),
        batch=best.per_device_train_batch_size, accumulation=best.gradient_accumulation_steps,
    )  # fmt: skip
    plan = best.choice.plan
    return {
        **line,
        "layout": plan.layout.describe(),
        "batch": settings.batch,
        "accumulation": settings.accumulation,
        "planned": plan.fullest.total,
        "planned_on_card": plan.fullest.reserved,
        **run_once("python", gpus, visible(gpus), settings, str(folder)),
    }


def markdown(lines: list[dict[str, Any]]) -> str:
    """The runs as a table."""
    rows = ["| model | method | GPUs | plan | planned GiB | measured GiB | | tok/s | gradient norm | |"]
    rows += ["|" + "---|" * 10]
    for line in lines:
        head = f"| {line['shape']} | {line['method']} | {line['gpus']} |"
        if line["status"] == "refused":
            rows.append(f"{head} refused: {line['why'].splitlines()[0]} |")
            continue
        head += f" {line['layout']}, {line['batch']} x {line['accumulation']} | {line['planned'] / GIB:.2f} |"
        if line["status"] != "ok":
            rows.append(f"{head} {line['status']}: {line['printed'].splitlines()[-1][:200]} |")
            continue
        measured = line["allocated_gib"]
        error = f"{100 * (line['planned'] / GIB / measured - 1):+.1f} %" if measured else ""
        told = "ran out" if line["ran_out"] else "ok"
        rows.append(
            f"{head} {measured or 0:.2f} | {error} | {line['tok_s']:,.0f} | {line['grad_norm']:.4f} | {told} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sizes = "llama1b,llama8b,llama32b,llama70b"
    parser.add_argument("--shapes", default=sizes, help=f"of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--methods", default="lora,full", help=f"of {', '.join(LOADS)}, with commas")
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs, with commas")
    parser.add_argument("--as", dest="kind", default="H200", help="the kind of GPU that is planned for")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cpu", action="store_true", help="ranks on the CPU")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one run may take")
    parser.add_argument("--json", type=Path, help="file for all figures, written after every run")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []

    def each() -> Iterator[dict[str, Any]]:
        for shape in options.shapes.split(","):
            for method in options.methods.split(","):
                for gpus in map(int, options.gpus.split(",")):
                    runs.append(run(shape, method, gpus, options))
                    yield runs[-1]

    tell(each(), markdown, options.json)
    return int(any(line.get("ran_out") or line["status"] not in ("ok", "refused") for line in runs))


if __name__ == "__main__":
    raise SystemExit(main())
