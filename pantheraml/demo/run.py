"""The main job from end to end: load, adapt, train, evaluate, save, merge, reload, generate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from datasets import Dataset

QUESTIONS = ("What is the capital of France?", "What is the opposite of hot?", "Add 7 and 5.")


def main(model: str | None = None, output: str | Path = "demo-output", max_steps: int | None = None) -> dict[str, Any]:
    """Run the demonstration and print what happened.

    Args:
        model: a hub id or local folder to fine-tune; None builds a small random model first.
        output: folder for everything that is written.
        max_steps: optimizer steps; None: 150 for the random model, 60 for a trained one.

    Returns:
        ``loss_before`` and ``loss_after`` (nats per label token), ``answers`` (question to text), ``folders``.
    """
    from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
    from pantheraml.data.chat_templates import get_chat_template
    from pantheraml.data.debug_dataset import load_debug_dataset
    from pantheraml.data.masking import train_on_responses_only

    started = time.perf_counter()
    console, folder = Console(), Path(output)
    train_rows, eval_rows = load_debug_dataset("train"), load_debug_dataset("validation")

    is_random = model is None
    if is_random:
        model = str(folder / "base-model")
        from pantheraml.demo.base_model import build_base_model

        count = build_base_model(Path(model), _texts(train_rows))
        console.rule(f"1. A random Llama with {count / 1e6:.1f} million parameters, in {model}")
    else:
        console.rule(f"1. Load {model}")
    base, tokenizer = FastLanguageModel.from_pretrained(model, max_seq_length=256, load_in_4bit=False)
    if is_random or tokenizer.chat_template is None:
        tokenizer = get_chat_template(tokenizer, "chatml" if is_random else "alpaca")

    console.rule("2. Attach LoRA")
    # A random model has no word meanings yet, so its embedding and head are trained along with the adapter.
    whole = ["embed_tokens", "lm_head"] if is_random else None
    adapted = FastLanguageModel.get_peft_model(base, r=16, lora_alpha=32, modules_to_save=whole)
    args = PantheraMLTrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=16,
        max_steps=max_steps or (150 if is_random else 60),
        learning_rate=3e-3 if is_random else 2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=3407,
    )
    trainer = PantheraMLTrainer(
        adapted, args, train_dataset=train_rows, eval_dataset={"train": train_rows, "new": eval_rows}, tokenizer=tokenizer
    )
    trainer = train_on_responses_only(trainer)

    console.rule("3. Train")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()

    console.rule("4. Save, merge, reload, generate")
    adapter, merged = folder / "adapter", folder / "merged"
    adapted.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    adapted.save_pretrained_merged(merged, tokenizer, save_method="merged_16bit")
    answers = _answer(merged)

    _report(console, before, after, answers, {"adapter": adapter, "merged model": merged, "training run": folder / "run"})
    console.print(f"Finished in {time.perf_counter() - started:.0f} s.")
    return {
        "loss_before": before["eval_train_loss"],
        "loss_after": after["eval_train_loss"],
        "answers": answers,
        "folders": {"adapter": str(adapter), "merged": str(merged)},
    }


def _texts(rows: Dataset) -> list[str]:
    return [f"{row['instruction']}\n{row['input'] or ''}\n{row['output']}" for row in rows]


def _answer(folder: Path) -> dict[str, str]:
    """Load the merged model afresh and let it answer, without sampling."""
    from pantheraml import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, load_in_4bit=False)
    FastLanguageModel.for_inference(model)
    answers = {}
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        answers[question] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return answers


def _report(
    console: Console, before: dict[str, float], after: dict[str, float], answers: dict[str, str], folders: dict[str, Path]
) -> None:
    table = Table("", "before", "after", title="Fine-tuning, per label token")
    for title, key in (("loss, trained rows", "train_loss"), ("loss, new rows", "new_loss")):
        table.add_row(title, f"{before['eval_' + key]:.3f}", f"{after['eval_' + key]:.3f}")
    for title, key in (("accuracy, trained rows", "train"), ("accuracy, new rows", "new")):
        name = f"eval_{key}_mean_token_accuracy"
        table.add_row(title, f"{before[name]:.1%}", f"{after[name]:.1%}")
    console.print(table)
    for question, answer in answers.items():
        console.print(f"  [bold]{question}[/bold] {answer}")
    for title, path in folders.items():
        console.print(f"  {title}: {path.resolve()}")
