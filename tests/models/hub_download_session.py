"""Loads models from the hub that HF_ENDPOINT names and prints what came of it; run by test_hub_download.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from pantheraml import FastLanguageModel
from pantheraml.errors import PantheraMLError
from pantheraml.models import hub_patience
from pantheraml.models.source import resolve_config


def attempt(name: str, **flags: Any) -> dict[str, Any]:
    """Name of the model and the sum of its logits, or the error."""
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            name, max_seq_length=64, load_in_4bit=False, device_map="cpu", **flags
        )
    except PantheraMLError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    with torch.no_grad():
        logits = model.eval()(torch.arange(5, 25)[None]).logits
    return {
        "name": model.config._name_or_path,
        "logits": logits.double().sum().item(),
        "tokens": len(tokenizer),
        "template": tokenizer.chat_template,
        "adapter": hasattr(model, "peft_config"),
    }


if __name__ == "__main__":
    hub_patience.LIMIT = 0.5  # a hub that stays broken is given up soon
    loads = json.loads(sys.argv[1])
    found = {key: attempt(**flags) for key, flags in loads.items()}
    token = loads["main"]["token"]
    found["configs"] = {name: str(resolve_config(name, token=token)) for name in ("org/sizes", "org/adapter")}
    print("RESULT " + json.dumps(found))
