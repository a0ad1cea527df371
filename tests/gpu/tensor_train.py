"""A training run by GPUs that compute each layer together: python tensor_train.py MODEL OUTPUT DEGREE DTYPE"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model_folder: str, output: Path, degree: int, dtype: str) -> None:
    from pantheraml import MultiGPUConfig, setup_multi_gpu

    config = MultiGPUConfig(tensor_parallel=degree > 1 and degree, num_processes=degree)
    setup_multi_gpu(config)  # ranks start here, before what follows imports pytest
    import torch

    from pantheraml import (
        FastLanguageModel,
        PantheraMLDistributedTrainer,
        PantheraMLTrainingArguments,
        is_main_process,
    )
    from tests.distributed.test_parity import rows

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_folder, max_seq_length=64, load_in_4bit=False, dtype=dtype, use_multi_gpu=config
    )
    model = FastLanguageModel.get_peft_model(model, r=8, lora_dropout=0.1)
    held = sum(p.nbytes for name, p in model.named_parameters() if ".layers." in name and "lora_" not in name)
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=4, global_batch_size=8, max_steps=6, learning_rate=1e-3,
        logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no",
        bf16=dtype != "float32",
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer
    )
    trainer.train()
    figures = trainer.evaluate()
    FastLanguageModel.for_inference(model)
    ids = torch.arange(5, 15, device="cuda").view(1, 10)
    tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist()
    model.save_pretrained_merged(str(output / "merged"), tokenizer)
    if is_main_process():
        logs = [(one["loss"], one["grad_norm"]) for one in trainer.state.log_history if "grad_norm" in one]
        found = {"logs": logs, "eval_loss": figures["eval_loss"], "tokens": tokens, "held": held}
        (output / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
