"""``python -m tests.gpu.repeated_run FOLDER``: train each of ``CASES`` twice, and say as JSON what came out.

A process of its own: CUBLAS_WORKSPACE_CONFIG is read at its first product. Ranks of torchrun train ``ON_RANKS``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
    barrier,
    get_world_size,
    is_main_process,
    setup_multi_gpu,
)
from pantheraml.distributed.process_group import gather_objects
from pantheraml.models.shares import local
from tests import tiny
from tests.distributed.test_parity import rows

# Ways to load, ways to train.
CASES = {
    "bf16": (dict(load_in_16bit=True), {}),
    "4bit, dropout, recompute": (
        dict(load_in_4bit=True, use_gradient_checkpointing=True),
        dict(lora_dropout=0.2),
    ),
    "float32": (dict(load_in_4bit=False, dtype="float32"), {}),
    "fp8": (dict(load_in_fp8=True), {}),
    "packed": (dict(load_in_16bit=True), dict(packing=True)),
    "full": (dict(full_finetuning=True), {}),
    "mixtral": (dict(load_in_16bit=True), {}),
}
_SHARED = MultiGPUConfig(strategy="fsdp", shard_frozen=True)
ON_RANKS = {
    "bf16": CASES["bf16"],
    "4bit, dropout, recompute": CASES["4bit, dropout, recompute"],
    "full": CASES["full"],
    "fsdp": (dict(load_in_16bit=True, use_multi_gpu=_SHARED), dict(lora_dropout=0.2)),
    "fsdp, full": (dict(full_finetuning=True, use_multi_gpu=MultiGPUConfig(strategy="fsdp")), {}),
}


def train(folder, output, load, how):
    """Losses, gradient norms, and all trained weights after eight steps."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, **load)
    how = dict(how)
    dropout = how.pop("lora_dropout", 0.0)
    if not load.get("full_finetuning"):
        model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=dropout)
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        max_steps=8, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        **{"deterministic": True, **how},
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows(), tokenizer=tokenizer, multi_gpu_config=load.get("use_multi_gpu")
    )
    trainer.train()
    logs = [
        (entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry
    ]
    weights = [local(weight.detach()).cpu() for weight in model.parameters() if weight.requires_grad]
    return logs, weights


def differences(first, second):
    """Steps whose figures differ, and how many weights do."""
    steps = [
        number for number, (one, other) in enumerate(zip(first[0], second[0], strict=True), 1) if one != other
    ]
    weights = [
        not torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        for one, other in zip(first[1], second[1], strict=True)
    ]
    apart = max(
        float((one.float() - other.float()).abs().max())
        for one, other in zip(first[1], second[1], strict=True)
        if one.numel()
    )
    return {
        "steps": steps, "weights": sum(weights), "of": len(weights), "apart": apart, "last": first[0][-1],
        "figures": [first[0], second[0]] if steps else [],
    }  # fmt: skip


def main(folder: Path) -> None:
    setup_multi_gpu(MultiGPUConfig(num_processes=1) if "RANK" not in os.environ else None)
    found = {}
    for name, (load, how) in (CASES if get_world_size() == 1 else ON_RANKS).items():
        family = name if name in tiny.FAMILIES else "llama"
        base = folder / name.split(",", maxsplit=1)[0]
        if is_main_process():
            # Widths that every precision takes.
            tiny.save_checkpoint(base, family, hidden_size=128, intermediate_size=256)
        barrier()
        first, second = (train(base, folder / "run", load, how) for _ in range(2))
        everywhere = gather_objects(differences(first, second))
        found[name] = everywhere[0] | {"weights": sum(one["weights"] for one in everywhere)}
    if is_main_process():
        print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
