"""What N processes that train one checkpoint take of the host, and of each GPU.

    python -m benchmarks.host_memory --model /models/llama-8b --gpus 1,2,4,8 --json host.json
    python -m benchmarks.host_memory --shape tiny --gpus 1,2 --cpu

Each run is ``python -m pantheraml.train`` with a run file of three steps, on the first N GPUs of CUDA_VISIBLE_DEVICES;
``--cpu`` takes processes on the CPU instead. Rows are short and adapters thin: activations and what is trained, of
which each process has its own, are little beside weights. All processes, the one that starts the others included, are
looked at from outside, ten times a second: on the host by their shares (PSS), which add up, on GPUs by the driver.
"copies" is what the host holds beside the same run of a tiny model, in sizes of the checkpoint's files. Without --model
a checkpoint of the shape is made. The exit code is 1 when a run fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.child import environment
from benchmarks.device import versions
from benchmarks.process_memory import GIB, processes_by_gpu, stays_at_home, tree_shares
from benchmarks.scaling import tell, visible
from benchmarks.shapes import add_model_options, checkpoint, model_of
from pantheraml.devices.nvml import open_nvml

ByGpu = dict[str, dict[int, float | None]]


def run_file(model: str, ranks: int, cpu: bool) -> str:
    """Adapters on 16-bit weights, as the checkpoint has them; rank 1, rows of 16 tokens."""
    devices = "cpu" if cpu else list(range(ranks))
    processes = f"multi_gpu: {{num_processes: {ranks}}}\n" if cpu else ""
    return f"""\
devices: {devices}
{processes}model: {{model_name: {model}, load_in_16bit: true, max_seq_length: 16}}
lora: {{r: 1}}
data: {{use_debug_dataset: true, max_rows: 64}}
trainer: {{output_dir: run, max_steps: 3, per_device_train_batch_size: 1, gradient_accumulation_steps: 1,
          per_device_eval_batch_size: 1, logging_steps: 1, save_strategy: 'no', report_to: none, disable_tqdm: true}}
save: {{formats: []}}
"""


def watch(master: subprocess.Popen[Any], until: float) -> tuple[float, ByGpu]:
    """The most GiB of the host that a process and its descendants held together, and each of them on each GPU.

    Until it has ended, or the clock (``time.monotonic``) says ``until``; it is killed then.
    """
    nvml, peak, seen = open_nvml(), 0.0, {}
    uuids = [gpu.uuid for gpu in nvml.gpus()] if nvml is not None else []
    before = processes_by_gpu(uuids, nvml)  # others may be there
    while master.poll() is None:
        if time.monotonic() > until:
            master.kill()
        peak = max(peak, sum(tree_shares(master.pid)))
        for uuid, processes in processes_by_gpu(uuids, nvml).items():
            for pid, used in processes.items():
                if pid not in before.get(uuid, {}):
                    most = seen.setdefault(uuid, {})
                    most[pid] = max(most.get(pid) or 0.0, used or 0.0) or None
        time.sleep(0.1)
    return peak, seen


def run_once(model: str, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, or how it failed, with the end of what it printed."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        Path(folder, "run.yaml").write_text(run_file(model, ranks, options.cpu))
        gpus = "" if options.cpu else visible(ranks)
        master = subprocess.Popen(
            [sys.executable, "-m", "pantheraml.train", "run.yaml"], cwd=folder, stdout=said, stderr=said,
            env=environment(CUDA_VISIBLE_DEVICES=gpus),
        )  # fmt: skip
        host_gib, by_gpu = watch(master, time.monotonic() + options.timeout)
        if master.returncode:
            said.seek(0)
            return {"ranks": ranks, "status": f"code {master.returncode}", "printed": said.read()[-4000:]}
        last = Path(folder, "run", "telemetry.jsonl").read_text().splitlines()[-1]
    return {
        "ranks": ranks,
        "status": "ok",
        "host_gib": host_gib,
        "gpu_processes_gib": list(by_gpu.values()),
        "own_gpu_only": stays_at_home(by_gpu),
        "devices": json.loads(last)["devices"],
    }


def run(model: str, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """A run of the model beside that of a tiny one."""
    found, tiny = run_once(model, ranks, options), run_once(str(checkpoint("tiny")), ranks, options)
    failed = next((one for one in (found, tiny) if one["status"] != "ok"), None)
    if failed is not None:
        return failed
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) / GIB
    copies = (found["host_gib"] - tiny["host_gib"]) / size
    return {**found, "checkpoint_gib": size, "tiny_host_gib": tiny["host_gib"], "copies": copies}


def markdown(lines: list[dict[str, Any]]) -> str:
    """The runs as a table."""
    head = (
        "| processes | checkpoint, GiB | host, GiB | of a tiny model | copies | GiB allocated on each GPU | by the \
driver | own GPU only |"
    )
    rows = [head, "|" + "---|" * 8]
    for line in lines:
        if line["status"] != "ok":
            end = (line["printed"].splitlines() or [""])[-1]
            rows.append(f"| {line['ranks']} | {line['status']}: {end[:100]} |")
            continue
        peaks = ", ".join(
            f"{row['peak_allocated']:.2f}" for row in line["devices"].values() if "peak_allocated" in row
        )
        driver = ", ".join(f"{used or 0:.2f}" for one in line["gpu_processes_gib"] for used in one.values())
        own = {True: "yes", False: "no", None: ""}[line["own_gpu_only"]]
        rows.append(
            f"| {line['ranks']} | {line['checkpoint_gib']:.2f} | {line['host_gib']:.2f} | "
            f"{line['tiny_host_gib']:.2f} | {line['copies']:.2f} | {peaks} | {driver} | {own} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--gpus", default="1,2", help="numbers of processes, with commas")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one run may take")
    parser.add_argument("--json", type=Path, help="file for all figures, written after every run")
    options = parser.parse_args()
    model = model_of(options)
    print(" ".join(["python -m benchmarks.host_memory", *sys.argv[1:]]), versions(), sep="\n")
    return tell(
        (run(model, count, options) for count in map(int, options.gpus.split(","))), markdown, options.json
    )


if __name__ == "__main__":
    raise SystemExit(main())
