"""How any PyTorch model scales: the example of algorithm distillation on 1, 2, 4, ... GPUs.

    python -m benchmarks.distillation --gpus 1,2,4,8 --json distillation.json
    python -m benchmarks.distillation --gpus 1,4 --ways python,torchrun,accelerate mixed_precision=fp16
    python -m benchmarks.distillation --gpus 1,2 --cpu --config examples/algorithm_distillation/config/darkroom.yaml

Each run is a process of its own that sees the first N GPUs of CUDA_VISIBLE_DEVICES, with as many histories on each GPU
as the file says; words replace settings of it. Time is that of steps, without the first ones, evaluation and saving.
The last column is what the same work takes: as many histories as 50,000 steps of one GPU see. The exit code is 1 when a
run fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.child import ROOT, environment
from benchmarks.scaling import WAYS, tell, visible

EXAMPLE = ROOT / "examples" / "algorithm_distillation"
STEPS = 50_000


def run(way: str, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, or how it failed, with the end of what it printed."""
    launcher = [word.format(ranks=ranks) for word in WAYS[way]]
    launcher += ["--multi_gpu"] if way == "accelerate" and ranks > 1 else []
    words = [
        f"train_steps={options.steps}",
        "log_every=20",
        "eval_every=0",
        "save_every=0",
        *options.settings,
    ]
    words += [f"--config={options.config}"] + ([f"--num-processes={ranks}"] if way == "python" else [])
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *launcher, str(EXAMPLE / "train.py"), *words, f"--output={folder}"],
            env=environment(CUDA_VISIBLE_DEVICES="" if options.cpu else visible(ranks)),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=options.timeout, check=False,
        )  # fmt: skip
        summary = Path(folder, "summary.json")
        if done.returncode or not summary.exists():
            return {
                "way": way,
                "ranks": ranks,
                "status": f"code {done.returncode}",
                "printed": done.stdout[-4000:],
            }
        return {"way": way, "ranks": ranks, "status": "ok", **json.loads(summary.read_text())}


def markdown(lines: list[dict[str, Any]]) -> str:
    """The runs as a table; what a GPU is compared with is the first run of one rank."""
    one = next((line for line in lines if line["status"] == "ok" and line["ranks"] == 1), None)
    heads = [
        "ranks",
        "by",
        "device",
        "histories a step",
        "ms a step",
        "transitions/s",
        "x one",
        "hours, same work",
    ]
    rows = [heads, ["---"] * len(heads)]
    for line in lines:
        cells = [str(line["ranks"]), line["way"]]
        if line["status"] != "ok":
            rows.append([*cells, f"{line['status']}: {line['printed'].strip().splitlines()[-1][:100]}"])
            continue
        speed = line["transitions_per_second"]
        cells += [
            line["device"],
            str(line["histories_per_step"]),
            f"{line['ms_per_step']:.2f}",
            f"{speed:,.0f}",
        ]
        if one is not None:
            transitions = STEPS * one["transitions_per_second"] * one["ms_per_step"] / 1e3
            cells += [f"{speed / one['transitions_per_second']:.2f}", f"{transitions / speed / 3600:.2f}"]
        rows.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings that replace those of the file: key=value")
    parser.add_argument("--gpus", default="1,2", help="numbers of ranks, with commas")
    ways = [way for way in WAYS if way != "alone"]
    parser.add_argument("--ways", default="python", help=f"of {', '.join(ways)}, with commas")
    parser.add_argument("--config", type=Path, default=EXAMPLE / "config" / "darkroom_gpu.yaml")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cpu", action="store_true", help="ranks on the CPU")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one run may take")
    parser.add_argument("--json", type=Path, help="file for all figures, written after every run")
    options = parser.parse_args()
    ranks, asked = map(int, options.gpus.split(",")), options.ways.split(",")
    return tell((run(way, count, options) for count in ranks for way in asked), markdown, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
