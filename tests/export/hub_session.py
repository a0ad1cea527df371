"""Everything the hub tests need a fresh, online process for; prints one JSON object.

Run as ``python -m tests.export.hub_session CHECKPOINT FOLDER`` with HF_ENDPOINT pointing to the stand-in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.errors import PantheraMLError
from pantheraml.export.hub import push_adapter, push_folder, push_merged
from pantheraml.export.model_methods import push_to_hub, push_to_hub_gguf, save_pretrained_merged
from tests.export.hub_stand_in import TOKEN
from tests.export.models import adapted, logits


def failure(action) -> str:
    try:
        action()
    except PantheraMLError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def train_and_upload(checkpoint: Path, output: Path) -> None:
    """A run of two steps, each of which is saved and uploaded."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), 64, load_in_4bit=False)
    PantheraMLTrainer(
        FastLanguageModel.get_peft_model(model, r=2),
        PantheraMLTrainingArguments(
            output_dir=str(output), max_steps=2, save_strategy="steps", save_steps=1, async_save=True, push_to_hub=True,
            hub_model_id="someone/run", hub_strategy="all_checkpoints", hub_token=TOKEN, hub_always_push=True,
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": list(range(5, 17))}] * 8),
        tokenizer=tokenizer,
    ).train()  # fmt: skip


def main(checkpoint: Path, folder: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(checkpoint))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.save(logits(model), folder / "logits.pt")
    found: dict[str, object] = {}
    found["adapter"] = push_adapter(model, "someone/adapter", tokenizer, TOKEN, commit_message="an adapter")
    push_merged(model, "someone/merged", tokenizer, token=TOKEN, dtype="float32", max_shard_size="100KB")
    found["merged"] = push_merged(
        model, "someone/merged", tokenizer, token=TOKEN, dtype="float32", private=True
    )
    found["gguf"] = push_to_hub_gguf(model, "someone/gguf", tokenizer, ["f32", "q8_0"], TOKEN)
    found["wrong format"] = failure(
        lambda: push_to_hub_gguf(model, "someone/new", tokenizer, "q4_k_m", TOKEN)
    )
    push_to_hub(model, "short-name", tokenizer, TOKEN, private=True, revision="tried")
    save_pretrained_merged(
        model, folder / "both", tokenizer, "lora", push_to_hub=True, token=TOKEN, repo_id="someone/both"
    )
    found["wrong token"] = failure(lambda: push_merged(model, "someone/new", tokenizer, token="hf_wrong"))
    found["wrong name"] = failure(lambda: push_adapter(model, "a/b/c", tokenizer, TOKEN))
    found["wrong method"] = failure(lambda: push_merged(model, "someone/new", tokenizer, "gguf", TOKEN))
    found["no folder"] = failure(lambda: push_folder(folder / "nowhere", "someone/new", TOKEN))
    found["closed folder"] = failure(lambda: push_folder(folder / "both", "someone/closed", TOKEN))
    found["closed"] = failure(lambda: push_merged(model, "someone/closed", tokenizer, "lora", TOKEN))
    train_and_upload(checkpoint, folder / "run")
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
