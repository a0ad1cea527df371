"""The planner against what torch measures: a grid of short runs, each with its plan, its prediction and its peak.

    python -m benchmarks.plan_grid --json grid.json                     24 runs on one GPU
    python -m benchmarks.plan_grid --gpus 4 --strategies ddp,fsdp       the same under strategies, on four
    python -m benchmarks.plan_grid --shape tiny --cpu                   whether the command itself works

``planned`` is what the planner says from the configuration alone, ``predicted`` what the trainer says of the model that
lies there, ``measured`` ``torch.cuda.max_memory_allocated`` of the fullest GPU; errors are in percent of the measured.
The runs of a family share a process. A strategy that this version does not have is a line that says so. Ends with code
1 when a run failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.child import environment
from benchmarks.device import GIB, free_cache, versions
from benchmarks.plan_cases import FAMILIES, METHODS, PlanCase, config_of, grid
from benchmarks.plan_run import config_for
from benchmarks.shapes import save_random


def why_not(strategy: str, gpus: int) -> str | None:
    """Why this version does not run ``strategy``, as its config says; None where it does."""
    from pantheraml.errors import PantheraMLError

    if strategy == "none":
        return None if gpus == 1 else "it is for one GPU"
    try:
        config_for(strategy, gpus)
    except PantheraMLError as error:
        return error.got + " " + error.need
    return None


def run_family(cases: list[PlanCase], options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The runs of one family and strategy, in a process or ranks of their own."""
    with tempfile.TemporaryDirectory() as place:
        told, result = Path(place, "cases.json"), Path(place, "result.json")
        runs = [asdict(one) for one in cases]
        told.write_text(
            json.dumps({"shape": options.shape, "folder": str(folder), "gpus": options.gpus, "cases": runs})
        )
        launcher = []
        # One process has all GPUs of a pipeline.
        if options.gpus > 1 and cases[0].strategy != "pipeline":
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.gpus}"]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.cpu else {}
        words = [sys.executable, *launcher, "-m", "benchmarks.plan_run", str(told), str(result)]
        try:
            done = subprocess.run(
                words, env=environment(**hidden), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, timeout=options.timeout, check=False,
            )  # fmt: skip
            ended, printed = f"the process ended with code {done.returncode}", done.stdout
        except subprocess.TimeoutExpired as error:
            ended, printed = f"stopped after {options.timeout} s", str(error.stdout or "")
        lines = json.loads(result.read_text()) if result.exists() else []
    if len(lines) < len(cases) or any(line["status"] == "failed" for line in lines):
        print(printed[-4000:], file=sys.stderr)
    rest = [{**asdict(one), "status": "failed", "reason": ended} for one in cases[len(lines) :]]
    return lines + rest


def error_of(line: dict[str, Any], name: str) -> float | None:
    """By how many percent of the measured peak a figure is above it; None where one is missing."""
    if line.get(name) is None or not line.get("measured"):
        return None
    return 100 * (line[name] / line["measured"] - 1)


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How many runs there were, and the shares of those measured that are within 5 and 10 percent, by both figures."""
    found: dict[str, Any] = {"runs": len(lines), "ok": sum(line["status"] == "ok" for line in lines)}
    for name in ("planned", "predicted"):
        errors = [error for line in lines if (error := error_of(line, name)) is not None]
        found[name] = {
            "measured": len(errors),
            "within_5": sum(abs(error) <= 5 for error in errors) / len(errors) if errors else None,
            "within_10": sum(abs(error) <= 10 for error in errors) / len(errors) if errors else None,
            "worst": max(errors, key=abs) if errors else None,
        }
    return found


def markdown(lines: list[dict[str, Any]]) -> str:
    """The runs as a table, in GiB and percent."""
    heads = [
        *("run", "strategy", "layers that recompute", "planned GiB", "predicted GiB", "measured GiB"),
        *("error of plan", "of prediction", "s"),
    ]
    table = [heads, ["---"] * len(heads)]
    for line in lines:
        name = PlanCase(**{key: line[key] for key in PlanCase.__dataclass_fields__}).name
        if line["status"] != "ok":
            table.append([name, line["strategy"], f"{line['status']}: {line['reason']}", *[""] * 6])
            continue
        sizes = [line[key] for key in ("planned", "predicted", "measured")]
        errors = [error_of(line, key) for key in ("planned", "predicted")]
        cells = ["-" if size is None else f"{size / GIB:.2f}" for size in sizes]
        cells += ["-" if error is None else f"{error:+.1f} %" for error in errors]
        table.append([name, line["strategy"], str(line["recomputing"]), *cells, f"{line['seconds']:.0f}"])
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in table)


def told(found: dict[str, Any]) -> str:
    """``summary`` as a line for each figure."""
    lines = [f"{found['ok']} of {found['runs']} runs were made."]
    for name in ("planned", "predicted"):
        one = found[name]
        if one["measured"]:
            shares = f"{one['within_5']:.0%} within 5 %, {one['within_10']:.0%} within 10 %"
            lines.append(f"{name}: {shares}, worst {one['worst']:+.1f} %.")
    if not any(found[name]["measured"] for name in ("planned", "predicted")):
        lines.append("Peak memory cannot be measured without a GPU.")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=1, help="ranks of each run")
    parser.add_argument(
        "--strategies", help="none for one GPU (the default there); ddp by default on several"
    )
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--shape", choices=("real", "tiny"), default="real")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, where no peak is measured")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of the runs of one family")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    options.strategies = options.strategies or ("none" if options.gpus == 1 else "ddp")
    return options


def main() -> int:
    options = _arguments()
    families, methods = options.families.split(","), options.methods.split(",")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for family in families:
            folder = Path(place, family)
            save_random(config_of(family, options.shape), folder, device="cpu" if options.cpu else None)
            free_cache()  # this process holds nothing of the GPU that runs are measured on
            for strategy in options.strategies.split(","):
                cases = [
                    one for one in grid(families, methods, [strategy], options.shape) if one.family == family
                ]
                reason = why_not(strategy, options.gpus)
                if reason is None:
                    lines += run_family(cases, options, folder)
                else:
                    lines += [{**asdict(one), "status": "not run", "reason": reason} for one in cases]
    found = summary(lines)
    print(markdown(lines), told(found), sep="\n\n")
    if options.json:
        options.json.write_text(
            json.dumps({"summary": found, "lines": lines, "versions": versions()}, indent=1)
        )
    return int(any(line["status"] == "failed" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
