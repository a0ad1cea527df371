"""How a run scales: tokens per second on 1, 2, 4, ... GPUs, and started by python, torchrun and accelerate launch.

    python -m benchmarks.scaling --model /models/llama-8b --gpus 1,2,4,8 --json scaling.json
    python -m benchmarks.scaling --gpus 1,2 --ways python,torchrun,accelerate --precision nf4
    python -m benchmarks.scaling --gpus 1,4 --ways python,alone

Each run is a process of its own that sees the first N GPUs of CUDA_VISIBLE_DEVICES; ``--cpu`` takes ranks on the CPU
instead. "alone" is N runs of one GPU each at the same time, which say nothing to one another: what their sum lacks of N
times one GPU is the machine's (power, heat, GPUs that differ), not the ranks'. Without --model a checkpoint of the
shape is made. The exit code is 1 when a run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import kernel_times
from benchmarks.child import environment
from benchmarks.scaling_run import LOADS
from benchmarks.shapes import add_model_options, model_of

WAYS: dict[str, list[str]] = {
    "python": [],
    "alone": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node={ranks}"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--num_processes={ranks}", "--num_machines=1", "--main_process_port=0",
        "--mixed_precision=no", "--dynamo_backend=no",
    ],
}  # fmt: skip


def visible(count: int, first: int = 0) -> str:
    """CUDA_VISIBLE_DEVICES of a run on ``count`` of the GPUs that this process sees, from the ``first`` on."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = names.split(",") if names else [str(index) for index in range(first + count)]
    return ",".join(found[first : first + count])


def run(way: str, ranks: int, options: argparse.Namespace, model: str) -> dict[str, Any]:
    """The figures of one run, or how it failed, with the end of what it printed."""
    if way != "alone":
        return run_once(way, ranks, visible(ranks), options, model)
    with ThreadPoolExecutor(ranks) as pool:
        runs = [pool.submit(run_once, way, 1, visible(1, index), options, model) for index in range(ranks)]
    return together([one.result() for one in runs])


def run_once(way: str, ranks: int, gpus: str, options: argparse.Namespace, model: str) -> dict[str, Any]:
    """One run of ``ranks`` on ``gpus``."""
    words = ["-m", "benchmarks.scaling_run"]
    launcher = [word.format(ranks=ranks) for word in WAYS[way]]
    if way == "accelerate":
        words = ["--module", "benchmarks.scaling_run"]
        launcher += ["--multi_gpu"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        words += [f"--model={model}", f"--output={folder}", f"--precision={options.precision}"]
        words += [f"--seq={options.seq}", f"--batch={options.batch}", f"--steps={options.steps}"]
        words += [f"--accumulation={options.accumulation}"]
        words += [f"--num-processes={ranks}", f"--telemetry={options.telemetry}"]
        words += [f"--recompute={options.recompute}", f"--config={options.config if ranks > 1 else '{}'}"]
        words += ["--profile"] if options.profile else []
        surroundings = environment(
            CUDA_VISIBLE_DEVICES="" if options.cpu else gpus, SCALING_BEGAN=str(time.time())
        )
        done = subprocess.run(
            [sys.executable, *launcher, *words], env=surroundings, cwd=folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=options.timeout, check=False,
        )  # fmt: skip
        result = Path(folder, "result.json")
        if done.returncode or not result.exists():
            return {
                "way": way,
                "ranks": ranks,
                "status": f"code {done.returncode}",
                "printed": done.stdout[-4000:],
            }
        return {"way": way, "status": "ok", **json.loads(result.read_text())}


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs at the same time as one line: their tokens in all, and the rest of the slowest."""
    failed = next((one for one in runs if one["status"] != "ok"), None)
    if failed is not None:
        return failed | {"ranks": len(runs)}
    slowest = min(runs, key=lambda one: one["tok_s"])
    of_each = [one["tok_s"] for one in runs]
    return slowest | {"ranks": len(runs), "tok_s": sum(of_each), "tok_s_of_each": of_each}


def markdown(lines: list[dict[str, Any]]) -> str:
    """The runs as a table; ``share`` is that of N times the run of one rank."""
    one = next((line["tok_s"] for line in lines if line["status"] == "ok" and line["ranks"] == 1), None)
    head = (
        "| ranks | by | tok/s | share | ms | start to first step | GiB allocated, reserved | host GiB before, while \
loading, after | own GPU only | telemetry | loss | gradient norm |"
    )
    rows = [head, "|" + "---|" * 12]
    for line in lines:
        if line["status"] != "ok":
            rows.append(
                f"| {line['ranks']} | {line['way']} | {line['status']}: {line['printed'].splitlines()[-1][:100]} |"
            )
            continue
        share = f"{line['tok_s'] / (line['ranks'] * one):.3f}" if one else ""
        memory = f"{line['allocated_gib'] or 0:.2f}, {line['reserved_gib'] or 0:.2f}"
        host = ", ".join(f"{gib:.1f}" for gib in line["host_gib"] or [])
        own = {True: "yes", False: "no", None: ""}[line["own_gpu_only"]]
        rows.append(
            f"| {line['ranks']} | {line['way']} | {line['tok_s']:,.0f} | {share} | {line['ms']:.1f} | "
            f"{line['start_to_first_step_s']:.1f} s | {memory} | {host} | {own} | "
            f"{line['telemetry_ms']:.2f} ms | {line['loss']:.4f} | {line['grad_norm']:.4f} |"
        )
    return "\n".join(rows)


def tell(
    runs: Iterable[dict[str, Any]], table: Callable[[list[dict[str, Any]]], str], file: Path | None
) -> int:
    """Print each run as it ends, all of them at the end, and keep them in ``file``; 1 if one failed."""
    lines: list[dict[str, Any]] = []
    for line in runs:
        lines.append(line)
        print(table(lines[-1:]).splitlines()[-1], flush=True)
        if "kernel_times" in line:
            print(f"\n{kernel_times.table(line['kernel_times'])}\n")
        if file:
            file.write_text(json.dumps({"command": sys.argv, "lines": lines}, indent=1) + "\n")
    print(table(lines))
    return int(any(line["status"] != "ok" for line in lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--gpus", default="1,2", help="numbers of ranks, with commas")
    parser.add_argument("--ways", default="python", help=f"of {', '.join(WAYS)}, with commas")
    parser.add_argument("--precision", choices=LOADS, default="bf16", help="full: all weights, no adapter")
    parser.add_argument("--recompute", choices=("auto", "true", "false", "offload"), default="auto")
    parser.add_argument(
        "--config", default="{}", help='fields of MultiGPUConfig, as JSON: {"strategy": "fsdp"}'
    )
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch on each rank")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--telemetry", choices=("on", "off"), default="on")
    parser.add_argument("--profile", action="store_true", help="show the kernels of one more step")
    parser.add_argument("--cpu", action="store_true", help="ranks on the CPU")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one run may take")
    parser.add_argument("--json", type=Path, help="file for all figures, written after every run")
    options = parser.parse_args()
    model = model_of(options)
    ranks, ways = map(int, options.gpus.split(",")), options.ways.split(",")
    return tell((run(way, count, options, model) for count in ranks for way in ways), markdown, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
