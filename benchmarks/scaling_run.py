"""One training run on however many ranks started it; ``benchmarks.scaling`` starts it in every way.

    python -m benchmarks.scaling_run --model /models/llama-8b --output figures --steps 15
    torchrun --nproc_per_node=4 -m benchmarks.scaling_run --model /models/llama-8b --output figures

Rank 0 writes ``figures/result.json``. The first third of the steps is warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import PRECISIONS

LOADS = {**PRECISIONS, "full": dict(full_finetuning=True)}
RECOMPUTE = {"true": True, "false": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--precision", choices=LOADS, default="bf16", help="full: all weights, no adapter")
    parser.add_argument("--recompute", choices=("auto", "true", "false", "offload"), default="auto")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of MultiGPUConfig, as JSON")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch on each rank")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--logging-steps", type=int, default=5)
    parser.add_argument(
        "--telemetry", choices=("on", "off"), default="on", help="off: no figures of the run at logging steps"
    )
    parser.add_argument("--profile", action="store_true", help="add the kernels of one more step on rank 0")
    parser.add_argument("--num-processes", type=int, help="ranks; by default one for each visible GPU")
    options = parser.parse_args()
    began = float(os.environ.get("SCALING_BEGAN", time.time()))
    passed: dict[str, float] = {}

    def note(name: str) -> None:
        passed[name] = round(time.time() - began, 2)

    note("process")
    from pantheraml import MultiGPUConfig, get_world_size, is_main_process, setup_multi_gpu

    config = setup_multi_gpu(
        MultiGPUConfig(**options.config)
        if "RANK" in os.environ
        else MultiGPUConfig(num_processes=options.num_processes, **options.config)
    )
    note("rank")
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from benchmarks.device import peaks, reset_peaks, synchronize
    from benchmarks.process_memory import (
        HostWatch,
        host_share,
        peak_together,
        processes_by_gpu,
        stays_at_home,
    )
    from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments
    from pantheraml.devices.nvml import open_nvml
    from pantheraml.distributed.process_group import gather_objects
    from pantheraml.training.pass_limit import NO_LIMIT

    note("libraries")
    before, loading = host_share(), time.perf_counter()
    with HostWatch() as host:
        model, tokenizer = FastLanguageModel.from_pretrained(
            options.model,
            max_seq_length=options.seq,
            use_multi_gpu=config,
            use_gradient_checkpointing=RECOMPUTE.get(options.recompute, options.recompute),
            **LOADS[options.precision],
        )
    if options.precision != "full":
        model = FastLanguageModel.get_peft_model(model, r=16)
    load_s = time.perf_counter() - loading
    note("model")
    ranks, warm = get_world_size(), max(1, options.steps // 3)
    generator = torch.Generator().manual_seed(0)
    steps = options.steps + options.profile
    count = steps * options.batch * options.accumulation * ranks
    vocab = min(model.config.vocab_size, 128000)
    rows = [torch.randint(3, vocab, (options.seq,), generator=generator).tolist() for _ in range(count)]

    class Clock(TrainerCallback):
        """Waits for the device at both ends of what is timed only."""

        profiler: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                note("plan")
            if state.global_step == warm:
                synchronize()
                reset_peaks()
                self.began = time.perf_counter()
            if state.global_step == options.steps and is_main_process():
                from benchmarks.kernel_times import start

                self.profiler = start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, options.steps):
                synchronize()
                if state.global_step == 1:
                    note("first step")
                else:
                    self.rest, self.memory = time.perf_counter() - self.began, peaks()
            if self.profiler is not None:
                synchronize()
                self.profiler.stop()

    cost: list[float] = []

    class Timed(PantheraMLDistributedTrainer):
        """Notes what telemetry takes of a logging step, or leaves it out."""

        def figures(self, tokens: int, logs: dict[str, float]) -> dict[str, float]:
            start = time.perf_counter()
            found = super().figures(tokens, logs) if options.telemetry == "on" else {}
            cost.append(time.perf_counter() - start)
            return found

    clock = Clock()
    trainer = Timed(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        args=PantheraMLTrainingArguments(
            output_dir=str(options.output), per_device_train_batch_size=options.batch, max_steps=steps,
            gradient_accumulation_steps=options.accumulation, learning_rate=1e-4, save_strategy="no",
            logging_steps=min(options.logging_steps, options.steps), report_to="none", disable_tqdm=True,
        ),
        multi_gpu_config=config,
        callbacks=[clock],
    )  # fmt: skip
    note("trainer")
    trainer.train()
    devices = trainer.get_model_memory_usage()
    cuda = torch.cuda.is_available()
    uuid = f"GPU-{torch.cuda.get_device_properties(trainer.args.device).uuid}" if cuda else None
    uuids, shares = gather_objects(uuid), gather_objects((before, host.seen, host_share()))
    if is_main_process():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        # Ranks that compute layers together share their rows.
        tokens = (options.steps - warm) * trainer.get_total_train_batch_size(trainer.args) * options.seq
        by_gpu = processes_by_gpu([uuid for uuid in uuids if uuid], open_nvml())
        first, watched, last = zip(*shares, strict=True)
        # Of all ranks together: before loading, at most while loading, at the end.
        host_gib = [sum(first), peak_together(watched), sum(last)] if None not in first else None
        record = options.output / "memory.json"  # predicted and measured, where a GPU was
        result = {
            "ranks": ranks,
            "config": options.config,
            "spread": trainer._strategy.describe(),
            "host_gib": host_gib,
            "gpu_processes_gib": list(by_gpu.values()),
            "own_gpu_only": stays_at_home(by_gpu),
            "telemetry_ms": 1e3 * sorted(cost)[len(cost) // 2],
            "tok_s": tokens / clock.rest,
            "ms": 1e3 * clock.rest / (options.steps - warm),
            # Seconds since the command was started, at the end of each.
            "start_to_first_step_s": passed["first step"],
            "passed_s": passed,
            "load_s": load_s,
            "loss": logs[-1]["loss"],
            "grad_norm": logs[-1]["grad_norm"],
            # Whether memory ran out for a step, which was repeated in smaller passes.
            "ran_out": trainer._limit.most < NO_LIMIT,
            **clock.memory,
            "devices": devices,
            "memory": json.loads(record.read_text()) if record.exists() else None,
        }
        if clock.profiler is not None:
            from benchmarks.kernel_times import summary

            result["kernel_times"] = summary(clock.profiler, model.config.num_hidden_layers)
        (options.output / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
