"""One training run on one or two GPUs, perhaps from a checkpoint; rank 0 writes what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

LOADS = {
    "float32": dict(load_in_4bit=False, dtype="float32"),
    "bf16": dict(load_in_16bit=True, dtype="bfloat16"),
    "nf4": dict(load_in_4bit=True),
    "fp8": dict(load_in_fp8=True),
    "full": dict(full_finetuning=True),
}


def read_before(module):
    """What a fused layer has computed with; None of other modules, and where transformers' own forward computes."""
    from pantheraml.models.fused import FusedDecoderLayer

    return module.reader._known if isinstance(module, FusedDecoderLayer) else None


def main(model_name: str, folder: str, ranks: int, kind: str, config: dict, resume: str | None) -> None:
    from pantheraml import MultiGPUConfig, setup_multi_gpu

    setup_multi_gpu(MultiGPUConfig(num_processes=ranks, **config))
    import torch
    from transformers import TrainerCallback

    from pantheraml import (
        FastLanguageModel,
        PantheraMLDistributedTrainer,
        PantheraMLTrainingArguments,
        is_main_process,
    )
    from pantheraml.models.shares import local
    from tests.distributed.test_parity import rows

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name,
        max_seq_length=64,
        use_multi_gpu=MultiGPUConfig(num_processes=ranks, **config),
        **LOADS[kind],
    )
    if kind != "full":
        model = FastLanguageModel.get_peft_model(model, r=8, lora_dropout=0.1)
    fused: list[str] = []

    class Seen(TrainerCallback):
        """What is known after a step; saving lets go of it."""

        def on_step_end(self, args, state, control, **kwargs):
            fused[:] = [str(known.dtype) for known in map(read_before, model.modules()) if known is not None]

    trainer = PantheraMLDistributedTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows(),
        args=PantheraMLTrainingArguments(
            output_dir=folder, per_device_train_batch_size=8 // ranks, learning_rate=1e-3, max_steps=6, logging_steps=1,
            save_strategy="steps" if kind == "full" else "no", save_steps=3, report_to="none", disable_tqdm=True,
            bf16=None if kind != "float32" else False,
        ),
        callbacks=[Seen()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    logs = [[e["loss"], e["grad_norm"]] for e in trainer.state.log_history if "grad_norm" in e]
    layers = [
        p for name, p in model.named_parameters() if ".layers." in name and "lora_" not in name and p.ndim > 1
    ]
    found = {
        "figures": logs,
        "layers": sum(local(p).nbytes for p in layers),
        "said": trainer._strategy.describe(),
        "fused": fused,
        "peak": torch.cuda.max_memory_allocated(),
    }
    if is_main_process():
        Path(folder, "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]), (sys.argv[6:] or [None])[0])
