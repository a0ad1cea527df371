"""How fast a LoRA step is: ours, peers and the measured limit of the GPU, interleaved in one run.

    python -m benchmarks.lora_step --rows default,nf4 --json figures.json
    python -m benchmarks.lora_step --peers unsloth,liger,hf --rows all --model /models/llama-8b --json figures.json

Each case runs in a process of its own (peers patch theirs), in the order ours, peer, ours, peer; figures are medians
over rounds. ``ours`` is a whole run of ``PantheraMLTrainer``; ``ours-loop`` is the plain loop that peers run in:
forward, backward, AdamW. Tokens per second count tokens that are not padding. A peer that is not installed or fails is
a line that says so. The exit code is 1 when a gradient is zero or not finite, or when a case of ours fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import PEERS, PRECISIONS, ROWS, Case, Settings, cases_of
from benchmarks.child import environment
from benchmarks.shapes import SHAPES, model_of
from benchmarks.table import compare, markdown, merge


def run_case(case: Case, timeout: float) -> dict[str, Any]:
    """The outcome of ``case`` in a process of its own, whatever happens to that process."""
    # Some frameworks write caches into the working folder, or ask the hub.
    surroundings = environment(
        HF_HUB_OFFLINE=os.environ.get("HF_HUB_OFFLINE", "1"),
        TOKENIZERS_PARALLELISM="false",
        UNSLOTH_DISABLE_STATISTICS="1",
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.one_case", json.dumps(case.to_dict())]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=surroundings,
                timeout=timeout,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"not done after {timeout:.0f} s", "wall_s": timeout}
    wall = {"wall_s": time.perf_counter() - began}
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if results:
        outcome = json.loads(results[-1].removeprefix("RESULT "))
    else:
        outcome = {"status": "failed", "reason": f"ended with code {done.returncode}"}
    if outcome["status"] not in ("ok", "not installed"):
        print(f"--- {case.row} {case.who}, the end of its output:\n{done.stdout[-2000:]}\n---", flush=True)
    return {**outcome, **wall}


def run_row(name: str, settings: Settings, rounds: int, timeout: float) -> list[dict[str, Any]]:
    """All cases of a row, ``rounds`` times in turn, one merged outcome for each."""
    cases = cases_of(name, settings)
    outcomes: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            if any(outcome["status"] == "not installed" for outcome in outcomes[case]):
                continue
            outcome = run_case(case, timeout)
            outcomes[case].append(outcome)
            figure = f"{outcome['tok_s']:,.0f} tok/s" if "tok_s" in outcome else outcome["status"]
            print(
                f"{name} {case.who} round {number + 1}: {figure}, {outcome['wall_s']:.0f} s in all",
                flush=True,
            )
    return [
        {**case.to_dict(), **merge(found), "each_round": [entry.get("tok_s") for entry in found]}
        for case, found in outcomes.items()
    ]


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="default", help=f"comma-separated, or all: {', '.join(ROWS)}")
    parser.add_argument("--peers", default="", help=f"comma-separated: {', '.join(PEERS)}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", help="folder of a checkpoint")
    where.add_argument("--shape", choices=SHAPES, default="llama8b", help="random weights of this shape")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=15, help="optimizer steps of a case, a third of them warm-up"
    )
    parser.add_argument("--samples", type=int, default=1000, help="rows of the ragged data")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens generated in the decode rows")
    parser.add_argument("--adapter", action="store_true", help="generate with a LoRA adapter attached")
    parser.add_argument("--seq", type=int, help="tokens per row, for all rows of work")
    parser.add_argument("--batch", type=int, help="rows per forward, for all rows of work")
    parser.add_argument("--precision", choices=PRECISIONS, help="one precision for all rows of work")
    parser.add_argument("--memory-gib", type=float, help="pretend the GPU has no more memory than this")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step of ours")
    parser.add_argument("--no-limit", dest="limit", action="store_false", help="do not measure the limit")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one case may take")
    parser.add_argument("--json", type=Path, help="file for all figures, written after every row")
    options = parser.parse_args(words)
    options.rows = list(ROWS) if options.rows == "all" else options.rows.split(",")
    options.peers = tuple(peer for peer in options.peers.split(",") if peer)
    for name, known in ((options.rows, ROWS), (options.peers, PEERS)):
        unknown = [word for word in name if word not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return options


def main(words: list[str] | None = None) -> int:
    """Run the command; 0, or 1 when a gradient is bad or ours fails."""
    options = parse(words)
    model = model_of(options)
    chosen = {
        name: getattr(options, name)
        for name in Settings.__dataclass_fields__
        if name != "model"  # resolved above
    }
    settings = Settings(model=model, **chosen)
    command = " ".join(["python -m benchmarks.lora_step", *(words if words is not None else sys.argv[1:])])
    lines: list[dict[str, Any]] = []
    for name in options.rows:
        lines += run_row(name, settings, options.rounds, options.timeout)
        compare(lines)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            written = {"command": command, "date": time.strftime("%Y-%m-%d"), "lines": lines}
            options.json.write_text(json.dumps(written, indent=1) + "\n")
    changed = [f"--{name} {getattr(options, name)}" for name in ("seq", "batch", "precision", "layers")]
    changed = [word for word in changed if not word.endswith("None")]
    note = f" (changed: {', '.join(changed)})" if changed else ""
    print(markdown(lines, {name: row.title + note for name, row in ROWS.items()}))
    for line in lines:
        if line.get("kernel_times"):
            from benchmarks.kernel_times import table

            print(f"\n**{line['row']}**, {line['who']}\n\n{table(line['kernel_times'])}")
    seen = [line["versions"] for line in lines if line.get("versions")]
    if seen:
        print("\n" + ", ".join(f"{name} {version}" for name, version in seen[0].items()))
    print(command)
    return int(any(is_failure(line) for line in lines))


def is_failure(line: dict[str, Any]) -> bool:
    """Whether a line fails the run: a bad gradient of anyone, or any failure of ours."""
    ours = line["who"].startswith("ours") or line["who"] == "limit"
    return line["status"] == "bad gradient" or (ours and line["status"] != "ok")


if __name__ == "__main__":
    raise SystemExit(main())
