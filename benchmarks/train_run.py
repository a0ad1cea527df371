"""A whole training run through ``FastLanguageModel`` and ``PantheraMLTrainer``: tokens per second and memory.

    python -m benchmarks.train_run --make /tmp/llama8b
    python -m benchmarks.train_run --model /tmp/llama8b --precision bf16 --steps 30
    python -m benchmarks.train_run --model /tmp/llama8b --precision nf4 --steps 30

Rows are random token ids of equal length, so every token counts. The first third of the steps is warm-up; the rest is
timed as a whole. A
gradient norm that is zero or not finite fails the run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

PRECISIONS = {
    "bf16": dict(load_in_16bit=True),
    "nf4": dict(load_in_4bit=True),
    "int8": dict(load_in_8bit=True),
    "float32": dict(load_in_4bit=False, dtype="float32"),
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments

    warm = options.steps // 3
    last = options.steps - 1 if options.profile else options.steps

    class StepClock(TrainerCallback):
        """Wall time of the first step and of the steps after warm-up, the device idle at both ends only."""

        def __init__(self) -> None:
            self.norms: list[float] = []
            self.first = self.rest = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (0, warm):
                _synchronize()
                self.began = time.perf_counter()
            if options.profile and state.global_step == last:
                self.profiler = torch.profiler.profile()
                self.profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, last):
                _synchronize()
                elapsed = time.perf_counter() - self.began
                self.first, self.rest = (elapsed, 0.0) if state.global_step == 1 else (self.first, elapsed)
            if options.profile and state.global_step == options.steps:
                _synchronize()
                self.profiler.stop()
                print(self.profiler.key_averages().table(sort_by="self_device_time_total", row_limit=40))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "grad_norm" in logs:
                self.norms.append(float(logs["grad_norm"]))

    def _synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    began = time.perf_counter()
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.seq, kernels=options.kernels, **PRECISIONS[options.precision]
    )
    _synchronize()
    load_s = time.perf_counter() - began
    model = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing=options.recompute)
    generator = torch.Generator().manual_seed(0)
    vocab = min(model.config.vocab_size, 128000)
    ids = torch.randint(3, vocab, (options.steps * options.batch, options.seq), generator=generator)
    clock = StepClock()
    trainer = PantheraMLTrainer(
        model,
        PantheraMLTrainingArguments(
            output_dir=options.output,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=1e-4,
            logging_steps=options.log_every,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        tokenizer=tokenizer,
        callbacks=[clock],
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = clock.rest / (last - warm)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "model": options.model,
        "precision": options.precision,
        "recompute": options.recompute,
        "kernels": options.kernels,
        "rows x tokens": f"{options.batch} x {options.seq}",
        "steps": options.steps,
        "tok_per_s": round(options.batch * options.seq / seconds),
        "ms_per_step": round(seconds * 1e3, 1),
        "first_step_s": round(clock.first, 2),
        "load_s": round(load_s, 2),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if torch.cuda.is_available()
        else None,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)
        if torch.cuda.is_available()
        else None,
        "loss_first_last": [losses[0], losses[-1]],
        "grad_norm_first_last": [clock.norms[0], clock.norms[-1]],
        "versions": _versions(),
        "command": " ".join(["python -m benchmarks.train_run", *sys.argv[1:]]),
    }
    if not all(math.isfinite(norm) and norm > 0 for norm in clock.norms):
        raise SystemExit(f"a gradient norm is zero or not finite, so the speed means nothing: {clock.norms}")
    return result


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers
    import trl

    import pantheraml

    modules = (pantheraml, torch, transformers, trl, peft)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"device": device, "python": platform.python_version()} | {
        m.__name__: m.__version__ for m in modules
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--make", type=Path, help="write an 8B-shaped checkpoint with random weights here, and stop"
    )
    parser.add_argument("--layers", type=int, default=32, help="layers of the checkpoint that is made")
    parser.add_argument("--model", help="model folder or hub id")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument(
        "--recompute", type=lambda text: {"true": True, "false": False}.get(text, text), default="auto"
    )
    parser.add_argument("--kernels", choices=("auto", "off"), default="auto")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--log-every", type=int, default=5, help="steps per log line; each one waits for the device"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of the last step")
    parser.add_argument("--output", default="outputs/benchmark")
    options = parser.parse_args()
    if options.make:
        from benchmarks.shapes import make_llama

        make_llama(options.make, layers=options.layers)
    elif options.model:
        print("RESULT " + json.dumps(run(options)))
    else:
        parser.error("give --make FOLDER or --model FOLDER")


if __name__ == "__main__":
    main()
