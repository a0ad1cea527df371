"""Does memory grow while a run goes on? One training run for minutes, its memory over time, and the slope.

    python -m benchmarks.soak --model /models/llama-8b --minutes 30 --json soak.json --plot soak.png
    python -m benchmarks.soak --shape tiny --minutes 5 --save-steps 20 --eval-steps 0

Rows are of Alpaca's lengths, so that hardly any step has the shape of another; a checkpoint is saved every
``--save-steps`` steps and an evaluation run every ``--eval-steps``. What grows is told apart by leaving some out. Host
memory is that of the process and its children, where pages that N of them share count as 1/N in each (PSS), without
pages of files, which the system drops when it wants; the GPU's is what torch holds: allocated at the end of steps,
reserved, and the peak between two looks. Slopes are those of the highest of each minute, without the first fifth of
the time, in which caches fill, and in the second half. The exit code is 1 when one of the latter is above ``--most``
MiB a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import PRECISIONS
from benchmarks.process_memory import GIB, tree_shares
from benchmarks.shapes import add_model_options, model_of

MIB = 2**20
WATCHED = ("host", "allocated", "reserved", "peak")


def host_bytes() -> float:
    """Memory of this process and its children: pages that they share, as they are forked, count once."""
    return sum(tree_shares(os.getpid(), ("Pss_Anon", "Pss_Shmem"))) * GIB


def look(seconds: float, step: int) -> dict[str, float]:
    """Memory now, in bytes, and the time since the run began."""
    import torch

    found = {"seconds": seconds, "step": float(step), "host": host_bytes()}
    if torch.cuda.is_available():
        found["allocated"] = float(torch.cuda.memory_allocated())
        found["reserved"] = float(torch.cuda.memory_reserved())
        found["peak"] = float(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    return found


def highest(looks: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """Minutes since the run began, and the most MiB of ``name`` in each of them, or in each twentieth of a short run.

    Between two epochs there are no data loaders, and the longest row of five seconds is any: only the highest tells.
    """
    each = min(60.0, looks[-1]["seconds"] / 20) or 60.0
    found: dict[int, float] = {}
    for one in looks:
        at = int(one["seconds"] / each)
        found[at] = max(found.get(at, 0.0), one[name] / MIB)
    return [(at * each / 60, most) for at, most in found.items()]


def slope(looks: list[dict[str, float]], name: str, skipped: float = 0.2) -> float:
    """Growth of the ``highest`` in MiB a minute, by least squares, without the first part of the time.

    Args:
        looks: of a run.
        name: one of ``WATCHED``.
        skipped: the share of the time that is left out.
    """
    begins = looks[-1]["seconds"] / 60 * skipped
    points = [(minute, most) for minute, most in highest(looks, name) if minute >= begins]
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    square = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / square if square else 0.0


def write(looks: list[dict[str, float]], file: Path) -> None:
    """Write the looks so far; a reader finds a whole file at any time."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps({"command": sys.argv, "looks": looks}) + "\n")
    part.replace(file)


def soak(options: argparse.Namespace, model_name: str) -> list[dict[str, float]]:
    """Train until the time is over; memory every ``--every`` seconds, in ``--json`` as soon as it is known."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from benchmarks.train_run import alpaca_lengths
    from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name, max_seq_length=1024, **PRECISIONS[options.precision]
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_dropout=0.05)
    vocab = min(model.config.vocab_size, 128000)
    lengths = [256] * 4096 if options.one_length else alpaca_lengths(4096)
    ids = [[3 + (7919 * row + place) % (vocab - 3) for place in range(n)] for row, n in enumerate(lengths)]
    looks: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        """Looks at step ends, and stops the run in time."""

        began, next_look = 0.0, 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = self.began or time.monotonic()
            seconds = time.monotonic() - self.began
            if seconds >= self.next_look:
                self.next_look = seconds + options.every
                looks.append(look(seconds, state.global_step))
                if options.json:
                    write(looks, options.json)
            control.should_training_stop |= seconds > 60 * options.minutes

    with tempfile.TemporaryDirectory() as folder:
        trainer = PantheraMLTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            eval_dataset=Dataset.from_dict({"input_ids": ids[:16]}),
            args=PantheraMLTrainingArguments(
                output_dir=folder, per_device_train_batch_size=8, gradient_accumulation_steps=2,
                per_device_eval_batch_size=4, max_steps=10**6, learning_rate=1e-5, logging_steps=20,
                save_strategy="steps" if options.save_steps else "no", save_steps=options.save_steps or 1,
                save_total_limit=2, eval_strategy="steps" if options.eval_steps else "no",
                eval_steps=options.eval_steps or 1, dataloader_num_workers=options.workers, report_to="none",
                disable_tqdm=True,
            ),
            callbacks=[Watch()],
        )  # fmt: skip
        trainer.train()
    return looks


def plot(looks: list[dict[str, float]], file: Path, beside: Path | None = None) -> None:
    """Memory over time, one panel for each kind; in grey, those of a file of ``--json`` from another run."""
    import matplotlib.pyplot as plt

    names = [name for name in WATCHED if name in looks[0]]
    grey = [] if beside is None else [(beside.stem, json.loads(beside.read_text())["looks"])]
    figure, panels = plt.subplots(
        len(names), 1, figsize=(8, 2.2 * len(names)), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, name in zip(panels[:, 0], names, strict=True):
        for label, others in grey:
            _draw(axes, others, name, color="0.6", label=label)
        _draw(axes, looks, name, label="this run")
        axes.set_ylabel(f"{name}, GiB")
        axes.set_title(
            f"{slope(looks, name, 0.5):+.2f} MiB a minute in the second half", fontsize=9, loc="right"
        )
        axes.grid(alpha=0.3)
    if grey:
        panels[0, 0].legend(fontsize=8)
    panels[-1, 0].set_xlabel("minutes")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _draw(axes: Any, looks: list[dict[str, float]], name: str, **style: Any) -> None:
    axes.plot([one["seconds"] / 60 for one in looks], [one[name] / GIB for one in looks], **style)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks at memory")
    parser.add_argument("--save-steps", type=int, default=50, help="0: no checkpoints")
    parser.add_argument("--eval-steps", type=int, default=50, help="0: no evaluations")
    parser.add_argument(
        "--one-length", action="store_true", help="rows of 256 tokens, instead of Alpaca's lengths"
    )
    parser.add_argument("--workers", type=int, default=2, help="of the data loader")
    parser.add_argument("--most", type=float, default=1.0, help="MiB a minute that memory may grow")
    parser.add_argument("--json", type=Path, help="file of all looks")
    parser.add_argument("--plot", type=Path, help="PNG to draw; of the looks in --json where it exists")
    parser.add_argument("--beside", type=Path, help="file of another run's looks, to draw in the same plot")
    options = parser.parse_args()
    if options.plot and options.json and options.json.exists():
        looks = json.loads(options.json.read_text())["looks"]
    else:
        looks = soak(options, model_of(options))
    if options.plot:
        plot(looks, options.plot, options.beside)
    steps = int(looks[-1]["step"])
    print(f"{steps} steps in {looks[-1]['seconds'] / 60:.1f} minutes; MiB a minute, and in the second half:")
    slopes: list[float] = []
    for name in (name for name in WATCHED if name in looks[0]):
        slopes.append(slope(looks, name, 0.5))
        minutes = highest(looks, name)
        print(
            f"{name}: {slope(looks, name):+.2f}, {slopes[-1]:+.2f} (highest of a minute: first {minutes[0][1]:,.0f}, "
            f"last {minutes[-1][1]:,.0f} MiB)"
        )
    return int(max(slopes) > options.most)


if __name__ == "__main__":
    raise SystemExit(main())
