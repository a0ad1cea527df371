"""How a split model scales: tokens per second of device_map="balanced" on 1, 2, 4, ... GPUs, in one process each.

    python -m benchmarks.split --model /models/llama-8b --gpus 1,2,4 --micro-batches 16 --json split.json
    python -m benchmarks.split --gpus 1,2 --batch 1 --device-map sequential --max-memory 20GiB
    python -m benchmarks.split --model /models/llama-8b --gpus 4,8 --ranks 2    two pipelines of 2 and of 4 GPUs

A step has --micro-batches times --batch rows of --seq tokens for each of the --ranks, on any number of GPUs. Without
--model a checkpoint of the shape is made. The exit code is 1 when a run fails. The first third of the steps is warm-up.
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

from benchmarks.cases import PRECISIONS
from benchmarks.child import ROOT, environment
from benchmarks.scaling import tell, visible
from benchmarks.shapes import add_model_options, model_of


def train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run in this process, on all GPUs that it sees."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from benchmarks.device import reset_peaks, synchronize
    from pantheraml import (
        FastLanguageModel,
        MultiGPUConfig,
        PantheraMLDistributedTrainer,
        PantheraMLTrainingArguments,
    )

    count, warm = max(1, torch.cuda.device_count()), max(1, options.steps // 3)
    limits = dict.fromkeys(range(count), options.max_memory) if options.max_memory else None
    ranks, config = options.ranks, None
    if ranks > 1:
        degree = torch.cuda.device_count() // ranks or 2  # without GPUs, stages share the CPU
        config = MultiGPUConfig(
            micro_batches=options.micro_batches, pipeline_parallel=degree, num_processes=ranks
        )
    elif count > 1:
        config = MultiGPUConfig(micro_batches=options.micro_batches, strategy="none")
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.seq, device_map=options.device_map if ranks == 1 else None,
        max_memory=limits, use_multi_gpu=config if ranks > 1 else None, **PRECISIONS[options.precision],
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(model, r=16)
    generator = torch.Generator().manual_seed(0)
    vocab, rows = min(model.config.vocab_size, 128000), ranks * options.micro_batches * options.batch
    data = torch.randint(3, vocab, (options.steps * rows, options.seq), generator=generator).tolist()
    host: list[float] = []

    class Clock(TrainerCallback):
        """Waits for the devices at both ends of what is timed only."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == warm:
                _of_all(synchronize, model)
                _of_all(reset_peaks, model)
                self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == options.steps:
                _of_all(synchronize, model)
                self.rest = time.perf_counter() - self.began

    class Timed(PantheraMLDistributedTrainer):
        """Notes how long the host takes to launch a pipelined step."""

        def _pipelined_step(self, *args: Any) -> Any:
            start = time.perf_counter()
            found = super()._pipelined_step(*args)
            host.append(time.perf_counter() - start)
            return found

    clock = Clock()
    trainer = Timed(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": data}),
        args=PantheraMLTrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=options.batch, max_steps=options.steps,
            gradient_accumulation_steps=options.micro_batches, learning_rate=1e-4, logging_steps=options.steps,
            save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        multi_gpu_config=config,
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    log = next(entry for entry in reversed(trainer.state.log_history) if "grad_norm" in entry)
    timed = options.steps - warm
    stats = trainer.get_model_memory_usage().values()
    return {
        "gpus": count,
        "ranks": ranks,
        "tok_s": timed * rows * options.seq / clock.rest,
        "ms": 1e3 * clock.rest / timed,
        "host_ms": 1e3 * sorted(host)[len(host) // 2] if host else None,
        "allocated_gib": [one["peak_allocated"] for one in stats if "peak_allocated" in one],
        "loss": log["loss"],
        "grad_norm": log["grad_norm"],
    }


def _of_all(function: Any, model: Any) -> None:
    """Call a function of ``benchmarks.device`` for every GPU that ``model`` is on."""
    import torch

    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    for gpu in gpus:
        with torch.cuda.device(gpu):
            function()
    if not gpus:
        function()


def run(gpus: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run of its own process, or how it failed, with the end of what it printed."""
    surroundings = environment(CUDA_VISIBLE_DEVICES="" if options.cpu else visible(gpus))
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "benchmarks.split", *sys.argv[1:], f"--model={options.model}", f"--run-in={folder}"]
        done = subprocess.run(
            [sys.executable, *words], env=surroundings, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=options.timeout, check=False,
        )  # fmt: skip
        result = Path(folder, "result.json")
        if done.returncode or not result.exists():
            return {"gpus": gpus, "status": f"code {done.returncode}", "printed": done.stdout[-6000:]}
        return {"status": "ok", "printed": done.stdout[-6000:], **json.loads(result.read_text())}


def markdown(lines: list[dict[str, Any]]) -> str:
    """The runs as a table."""
    one = next((line["tok_s"] for line in lines if line["status"] == "ok" and line["gpus"] == 1), None)
    rows = [
        "| GPUs | pipelines | tok/s | x one | ms | host ms | GiB of each | loss | gradient norm |",
        "|" + "---|" * 9,
    ]
    for line in lines:
        if line["status"] != "ok":
            rows.append(f"| {line['gpus']} | {line['status']}: {line['printed'].splitlines()[-1][:100]} |")
            continue
        times = f"{line['tok_s'] / one:.2f}" if one else ""
        host = "" if line["host_ms"] is None else f"{line['host_ms']:.0f}"
        memory = ", ".join(f"{gib:.1f}" for gib in line["allocated_gib"])
        rows.append(
            f"| {line['gpus']} | {line['ranks']} | {line['tok_s']:,.0f} | {times} | {line['ms']:.0f} | {host} | "
            f"{memory} | {line['loss']:.4f} | {line['grad_norm']:.4f} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs, with commas")
    parser.add_argument("--ranks", type=int, default=1, help="pipelines, each over its share of the GPUs")
    parser.add_argument("--device-map", choices=("balanced", "sequential", "auto"), default="balanced")
    parser.add_argument("--max-memory", help="of each GPU, such as 20GiB")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cpu", action="store_true", help="no GPUs")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one run may take")
    parser.add_argument("--json", type=Path, help="file for all figures, written after every run")
    parser.add_argument("--run-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_in is not None:
        found = train(options, options.run_in)
        if os.environ.get("RANK", "0") == "0":
            (options.run_in / "result.json").write_text(json.dumps(found))
        return 0
    options.model = model_of(options)
    counts = map(int, options.gpus.split(","))
    return tell((run(gpus, options) for gpus in counts), markdown, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
