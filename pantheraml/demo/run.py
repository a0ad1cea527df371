"""The main job from end to end: load, adapt, train, evaluate, save, merge, reload, generate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

QUESTIONS = (
    "What is the capital of France?",
    "Name the capital city of Japan.",
    "What is the opposite of hot?",
)


def main(
    model: str | None = None, output: str | Path = "demo-output", max_steps: int | None = None
) -> dict[str, Any]:
    """Run the demonstration and print what happened.

    Args:
        model: a hub id or local folder to fine-tune; None builds a small random model first.
        output: folder for everything that is written.
        max_steps: optimizer steps; None: 400 for the random model, 60 for a trained one.

    Returns:
        ``before`` and ``after`` (evaluation metrics), ``answers`` (question to text), ``folders``.
    """
    started = time.perf_counter()
    console, folder = Console(), Path(output)
    adapted, tokenizer = _prepare_model(console, model, folder / "base-model")
    trainer = _prepare_trainer(adapted, tokenizer, folder / "run", max_steps, is_random=model is None)

    console.rule("3. Train")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()

    console.rule("4. Save, merge, reload, generate")
    folders = {
        "adapter": folder / "adapter",
        "merged model": folder / "merged",
        "training run": folder / "run",
    }
    adapted.save_pretrained(folders["adapter"], tokenizer)
    adapted.save_pretrained_merged(folders["merged model"], tokenizer, save_method="merged_16bit")
    answers = _answer(folders["merged model"])

    _report(console, before, after)
    for question, answer in answers.items():
        console.print(f"  [bold]{question}[/bold] {answer}", highlight=False)
    for title, path in folders.items():
        console.print(f"  {title}: {path.resolve()}", highlight=False, soft_wrap=True)
    console.print(f"Finished in {time.perf_counter() - started:.0f} s.")
    return {"before": before, "after": after, "answers": answers, "folders": folders}


def _prepare_model(console: Console, model: str | None, base: Path) -> tuple[Any, Any]:
    """Build or load the base model, give it a chat template, attach LoRA."""
    from pantheraml import FastLanguageModel, get_chat_template
    from pantheraml.data.debug_dataset import load_debug_dataset
    from pantheraml.demo.base_model import build_base_model

    is_random = model is None
    if is_random:
        rows = cast("list[dict[str, str]]", load_debug_dataset("train").to_list())
        texts = [f"{row['instruction']}\n{row['input'] or ''}\n{row['output']}" for row in rows]
        count = build_base_model(base, texts)
        console.rule(f"1. A random Llama with {count / 1e6:.1f} million parameters, in {base}")
    else:
        console.rule(f"1. Load {model}")
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        str(base) if model is None else model, max_seq_length=256, load_in_4bit=False
    )
    if is_random or tokenizer.chat_template is None:
        tokenizer = get_chat_template(tokenizer, "chatml" if is_random else "alpaca")

    console.rule("2. Attach LoRA")
    # A random model has no word meanings yet, so its embedding and head are trained along with the adapter.
    whole = ["embed_tokens", "lm_head"] if is_random else None
    return FastLanguageModel.get_peft_model(loaded, r=16, lora_alpha=32, modules_to_save=whole), tokenizer


def _prepare_trainer(
    model: Any, tokenizer: Any, output: Path, max_steps: int | None, *, is_random: bool
) -> Any:
    """A trainer on the instructions that ship with the package, trained on the answers only."""
    from pantheraml import PantheraMLTrainer, PantheraMLTrainingArguments, train_on_responses_only
    from pantheraml.data.debug_dataset import load_debug_dataset

    train_rows = load_debug_dataset("train")
    args = PantheraMLTrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=16,
        max_steps=max_steps or (400 if is_random else 60),
        learning_rate=2e-3 if is_random else 2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=3407,
    )
    trainer = PantheraMLTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=train_rows,
        eval_dataset={"train": train_rows, "new": load_debug_dataset("validation")},
        args=args,
    )
    return train_on_responses_only(trainer)


def _answer(folder: Path) -> dict[str, str]:
    """Load the merged model afresh and let it answer, without sampling."""
    from pantheraml import FastLanguageModel

    model: Any
    tokenizer: Any
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, load_in_4bit=False)
    FastLanguageModel.for_inference(model)
    answers = {}
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        ids = model.generate(
            **inputs, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )
        answers[question] = tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()
    return answers


def _report(console: Console, before: dict[str, float], after: dict[str, float]) -> None:
    table = Table("", "before", "after", title="Fine-tuning, per label token")
    for title, rows in (("trained rows", "train"), ("new rows", "new")):
        loss, accuracy = f"eval_{rows}_loss", f"eval_{rows}_mean_token_accuracy"
        table.add_row(f"loss, {title}", f"{before[loss]:.3f}", f"{after[loss]:.3f}")
        table.add_row(f"accuracy, {title}", f"{before[accuracy]:.1%}", f"{after[accuracy]:.1%}")
    console.print(table)
