"""Does training on FP8 weights end where training on 16-bit weights ends? The demo's task, several times.

    python -m benchmarks.fp8_loss                                  # the demo's random model, 200 steps
    python -m benchmarks.fp8_loss --model /path/to/model --lr 2e-4 # a trained one

Each run loads the same base, attaches the same LoRA and trains on the instructions that ship with the package: 16-bit
weights (float32 on a CPU), FP8, FP8 with ``kernels="off"``, and 16-bit once more with another order of the rows, which
shows what chance alone does. Printed is the loss on the training rows before and after, and its ratio to the first run.
Fails if FP8 ends more than ``--within`` above the first run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

RUNS: dict[str, dict[str, Any]] = {
    "16-bit": dict(load_in_4bit=False),
    "fp8": dict(load_in_fp8=True),
    "fp8, not fused": dict(load_in_fp8=True, kernels="off"),
    "16-bit, other order": dict(load_in_4bit=False),
}


def train(name: str, base: str, options: argparse.Namespace, output: Path) -> tuple[float, float]:
    """Loss on the training rows before and after."""
    from pantheraml import (
        FastLanguageModel,
        PantheraMLTrainer,
        PantheraMLTrainingArguments,
        get_chat_template,
        train_on_responses_only,
    )
    from pantheraml.data.debug_dataset import load_debug_dataset

    model, tokenizer = FastLanguageModel.from_pretrained(base, max_seq_length=256, **RUNS[name])
    if tokenizer.chat_template is None:
        tokenizer = get_chat_template(tokenizer, "chatml" if options.model is None else "alpaca")
    whole = ["embed_tokens", "lm_head"] if options.model is None else None
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, modules_to_save=whole)
    rows = load_debug_dataset("train")
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=16,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1 if "order" in name else 3407,
    )
    trainer = PantheraMLTrainer(
        model=model, tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows, args=args
    )
    trainer = train_on_responses_only(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or hub id; without it a small random model is made")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--within", type=float, default=0.01)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = options.model
        if base is None:
            from pantheraml.data.debug_dataset import load_debug_dataset
            from pantheraml.demo.base_model import build_base_model

            base = str(Path(folder) / "base")
            texts = [
                f"{row['instruction']}\n{row['output']}" for row in load_debug_dataset("train").to_list()
            ]
            build_base_model(Path(base), texts)
        found = {name: train(name, base, options, Path(folder) / "run") for name in RUNS}
    first = found["16-bit"][1]
    print(f"{'':22}{'before':>9}{'after':>9}{'ratio':>9}")
    for name, (before, after) in found.items():
        print(f"{name:22}{before:9.4f}{after:9.4f}{after / first:9.4f}")
    worst = max(found[name][1] for name in RUNS if name.startswith("fp8"))
    if worst > (1 + options.within) * first:
        raise SystemExit(f"FP8 ends {worst / first - 1:.1%} above 16-bit")


if __name__ == "__main__":
    main()
