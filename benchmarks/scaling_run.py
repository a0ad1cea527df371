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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch on each rank")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--num-processes", type=int, help="ranks; by default one for each visible GPU")
    options = parser.parse_args()
    began = float(os.environ.get("SCALING_BEGAN", time.time()))

    from pantheraml import MultiGPUConfig, get_world_size, is_main_process, setup_multi_gpu

    config = setup_multi_gpu(
        None if "RANK" in os.environ else MultiGPUConfig(num_processes=options.num_processes)
    )
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from benchmarks.device import peaks, reset_peaks, synchronize
    from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments

    loading = time.perf_counter()
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.seq, **PRECISIONS[options.precision]
    )
    model = FastLanguageModel.get_peft_model(model, r=16)
    load_s = time.perf_counter() - loading
    ranks, warm = get_world_size(), max(1, options.steps // 3)
    generator = torch.Generator().manual_seed(0)
    count = options.steps * options.batch * ranks
    vocab = min(model.config.vocab_size, 128000)
    rows = [torch.randint(3, vocab, (options.seq,), generator=generator).tolist() for _ in range(count)]

    class Clock(TrainerCallback):
        """Waits for the device at both ends of what is timed only."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == warm:
                synchronize()
                reset_peaks()
                self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, options.steps):
                synchronize()
                if state.global_step == 1:
                    self.first = time.time() - began
                else:
                    self.rest, self.memory = time.perf_counter() - self.began, peaks()

    clock = Clock()
    trainer = PantheraMLDistributedTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        args=PantheraMLTrainingArguments(
            output_dir=str(options.output), per_device_train_batch_size=options.batch, max_steps=options.steps,
            learning_rate=1e-4, logging_steps=min(5, options.steps), save_strategy="no", report_to="none",
            disable_tqdm=True,
        ),
        multi_gpu_config=config,
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    devices = trainer.get_model_memory_usage()
    if is_main_process():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        tokens = (options.steps - warm) * options.batch * options.seq * ranks
        result = {
            "ranks": ranks,
            "tok_s": tokens / clock.rest,
            "ms": 1e3 * clock.rest / (options.steps - warm),
            "start_to_first_step_s": clock.first,
            "load_s": load_s,
            "loss": logs[-1]["loss"],
            "grad_norm": logs[-1]["grad_norm"],
            **clock.memory,
            "devices": devices,
        }
        (options.output / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
