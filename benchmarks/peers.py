"""The model of one case, loaded and adapted the way each framework's own examples do it.

Everyone gets LoRA r=16, alpha 16, on the seven projections, over the same checkpoint. What a peer patches
stays in the process of its case.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from benchmarks.cases import PRECISIONS, Case

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_of(case: Case) -> dict[str, Any]:
    """The adapter's settings."""
    return dict(r=16, lora_alpha=16, lora_dropout=case.lora_dropout, bias="none", target_modules=TARGETS)


class Built(NamedTuple):
    """A model ready to train; the times are wall seconds, imports counted apart from loading."""

    model: Any
    tokenizer: Any
    import_s: float
    load_s: float


def build(case: Case, *, adapter: bool = True) -> Built:
    """The model of ``case``.

    Args:
        case: what is measured.
        adapter: attach LoRA.
    """
    import torch

    began = time.perf_counter()
    if case.who == "unsloth":
        import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]
    elif case.who == "liger":
        import liger_kernel.transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # the driver's start belongs to nobody
        if case.memory_gib is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, case.memory_gib * 2**30 / total))
    imported = time.perf_counter()
    make = {"ours": _ours, "ours-loop": _ours, "unsloth": _unsloth}.get(case.who, _transformers)
    model, tokenizer = make(case, adapter)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Built(model, tokenizer, imported - began, time.perf_counter() - imported)


def _ours(case: Case, adapter: bool) -> tuple[Any, Any]:
    from pantheraml import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        case.model, max_seq_length=case.seq, kernels=case.kernels, **PRECISIONS[case.precision]
    )
    if adapter:
        model = FastLanguageModel.get_peft_model(
            model, **lora_of(case), use_gradient_checkpointing=case.recompute
        )
    return model, tokenizer


def recompute_of(model: Any, case: Case) -> str:
    """What was recomputed: of ours as it was planned, of a peer as it was asked for."""
    if not case.who.startswith("ours"):
        return str(case.recompute)
    from pantheraml.models.state import get_state

    state = get_state(model)
    if state is None or not state.plans:
        return str(case.recompute)
    total = model.config.get_text_config().num_hidden_layers
    layers, stored = (sum(getattr(plan, name) for plan in state.plans) for name in ("layers", "stored"))
    return f"{layers} of {total} layers{f', {stored} to the host' if stored else ''}"


def _unsloth(case: Case, adapter: bool) -> tuple[Any, Any]:
    import torch
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    model, tokenizer = FastLanguageModel.from_pretrained(
        case.model,
        max_seq_length=case.seq + case.new_tokens if case.kind == "decode" else case.seq,
        dtype=torch.bfloat16,
        load_in_4bit=_is_4bit(case),
    )
    if adapter:
        # Its default recomputes and offloads, and that is also its least memory.
        way = "unsloth" if case.recompute is not False else False
        model = FastLanguageModel.get_peft_model(
            model, **lora_of(case), use_gradient_checkpointing=way, random_state=3407
        )
        FastLanguageModel.for_training(model, use_gradient_checkpointing=case.recompute is not False)
    return model, tokenizer


def _transformers(case: Case, adapter: bool) -> tuple[Any, Any]:
    """Plain transformers and PEFT, or the same with Liger's kernels."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pantheraml.models.recompute import set_recompute

    kind: Any = AutoModelForCausalLM
    if case.who == "liger":
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            AutoLigerKernelForCausalLM as kind,
        )
    more: dict[str, Any] = {}
    if _is_4bit(case):
        from transformers import BitsAndBytesConfig

        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    where = 0 if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if case.precision == "float32" else torch.bfloat16
    model = kind.from_pretrained(
        case.model, dtype=dtype, device_map={"": where}, attn_implementation="sdpa", **more
    )
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    if not adapter:
        return model, tokenizer
    recompute = case.recompute is not False  # TRL's default
    if _is_4bit(case):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=recompute,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif recompute:
        set_recompute(model, True)
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(**lora_of(case), task_type="CAUSAL_LM"))
    return model.train(), tokenizer


def _is_4bit(case: Case) -> bool:
    return case.precision == "nf4"
