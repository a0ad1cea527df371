"""One case through a whole trainer: ours through ``PantheraMLTrainer``, a peer through TRL's ``SFTTrainer``.

    python -m benchmarks.train_run --make /tmp/llama8b
    python -m benchmarks.train_run --model /tmp/llama8b --precision bf16 --steps 30
    python -m benchmarks.train_run --model /tmp/llama8b --precision nf4 --steps 30 --profile

Rows are random token ids: of equal length, or of Alpaca's lengths. The first third of the steps is warm-up; the rest is
timed as a whole, and only tokens that are not padding count. A gradient that is zero or not finite fails the run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import PRECISIONS, Case
from benchmarks.device import check_norm, checked_norm, peaks, reset_peaks, synchronize, versions
from benchmarks.peers import build, recompute_of


def alpaca_lengths(samples: int) -> list[int]:
    """Token counts with a fixed seed, shaped like Alpaca's: median about 90, a long tail to about 1,000."""
    import torch

    noise = torch.randn(samples, generator=torch.Generator().manual_seed(3407))
    return (90 * (0.7 * noise).exp()).clamp(20, 1024).long().tolist()


def rows_of(case: Case, vocab: int) -> Any:
    """Random rows as a dataset of ``input_ids``: enough for all steps."""
    import torch
    from datasets import Dataset

    count = case.steps * case.batch * case.accumulation
    lengths = alpaca_lengths(case.samples) if case.kind == "ragged" else [case.seq] * count
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, min(vocab, 128000), (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids})


class TokenCounter:
    """Counts the tokens of each step that are not padding, whatever the trainer makes of its micro-batches.

    Args:
        trainer: a transformers Trainer; its ``get_batch_samples`` is watched.
    """

    def __init__(self, trainer: Any) -> None:
        self._steps: list[list[Any]] = []
        self._collect = trainer.get_batch_samples
        trainer.get_batch_samples = self._watched

    def _watched(self, *args: Any) -> Any:
        batches, number = self._collect(*args)
        # Masks are kept as they are and summed after the run: nothing here waits for the device.
        self._steps.append([batch.get("attention_mask", batch["input_ids"].numel()) for batch in batches])
        return batches, number

    def between(self, first: int, last: int) -> int:
        """Tokens of the steps ``first`` to ``last - 1``."""
        found = [entry for step in self._steps[first:last] for entry in step]
        return sum(entry if isinstance(entry, int) else int(entry.sum()) for entry in found)


def clock_of(case: Case) -> Any:
    """A callback that times the steps after warm-up as a whole and checks gradients."""
    from transformers import TrainerCallback

    last = case.steps - 1 if case.profile else case.steps

    class StepClock(TrainerCallback):
        """Waits for the device at both ends of what is timed only."""

        def __init__(self) -> None:
            self.norms: list[float] = []
            self.first = self.rest = 0.0
            self.last, self.profiler, self.memory = last, None, {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (0, case.warm):
                synchronize()
                if state.global_step:
                    reset_peaks()
                self.began = time.perf_counter()
            if case.profile and state.global_step == last:
                from benchmarks.kernel_times import start

                self.profiler = start()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # After a step with a learning rate above zero LoRA's B is not zero, and so no gradient is.
            if state.global_step == case.warm - 1 and case.warm > 1:
                checked_norm(kwargs["model"].parameters())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, last):
                synchronize()
                elapsed = time.perf_counter() - self.began
                if state.global_step == 1:
                    self.first = elapsed
                if state.global_step == last:
                    self.rest, self.memory = elapsed, peaks()
            if self.profiler is not None and state.global_step == case.steps:
                synchronize()
                self.profiler.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "grad_norm" in logs:
                self.norms.append(float(logs["grad_norm"]))

    return StepClock()


def trainer_of(case: Case, built: Any, clock: Any, folder: str) -> Any:
    """The trainer of ``case`` over its rows."""
    rows = rows_of(case, built.model.config.vocab_size)
    settings: dict[str, Any] = dict(
        output_dir=folder,
        per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=case.accumulation,
        max_steps=case.steps,
        learning_rate=1e-4,
        logging_steps=min(5, case.steps),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if case.who.startswith("ours"):
        from pantheraml import PantheraMLTrainer, PantheraMLTrainingArguments

        return PantheraMLTrainer(
            built.model,
            PantheraMLTrainingArguments(**settings),
            train_dataset=rows,
            tokenizer=built.tokenizer,
            callbacks=[clock],
        )
    import torch
    from trl import SFTConfig, SFTTrainer

    on_gpu = torch.cuda.is_available()
    return SFTTrainer(
        model=built.model,
        args=SFTConfig(**settings, bf16=on_gpu, use_cpu=not on_gpu, max_length=case.seq),
        train_dataset=rows,
        processing_class=built.tokenizer,
        callbacks=[clock],
    )


def measure(case: Case) -> dict[str, Any]:
    """The figures of ``case``: loading, first step, and the mean of the steps after warm-up."""
    built = build(case)
    clock = clock_of(case)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(case, built, clock, folder)
        counter = TokenCounter(trainer)
        began = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - began
    for norm in clock.norms:
        check_norm(norm)
    tokens = counter.between(case.warm, clock.last)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "tok_s": tokens / clock.rest,
        "ms": 1e3 * clock.rest / (clock.last - case.warm),
        **clock.memory,
        "first_step_s": clock.first,
        "load_s": built.load_s,
        "import_s": built.import_s,
        "recompute": recompute_of(built.model, case),
        "loss": losses[-1],
        "loss_first": losses[0],
        "grad_norm": check_norm(clock.norms[-1] if clock.norms else 0.0),
        "run_s": whole,
    }
    if clock.profiler is not None:
        from benchmarks.kernel_times import summary

        layers = built.model.config.get_text_config().num_hidden_layers
        result["kernel_times"] = summary(clock.profiler, layers)
    return result


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
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--profile", action="store_true", help="print the kernels of the last step")
    options = parser.parse_args()
    if options.make:
        from benchmarks.shapes import make_llama

        make_llama(options.make, layers=options.layers)
    elif options.model:
        given = {key: value for key, value in vars(options).items() if key not in ("make", "layers")}
        case = Case(row="one run", kind="step", who="ours", **given)
        result = measure(case)
        if "kernel_times" in result:
            from benchmarks.kernel_times import table

            print(table(result["kernel_times"]))
        command = " ".join(["python -m benchmarks.train_run", *sys.argv[1:]])
        print("RESULT " + json.dumps({**given, **result, "versions": versions(), "command": command}))
    else:
        parser.error("give --make FOLDER or --model FOLDER")


if __name__ == "__main__":
    main()
