"""The script of the README in small, started in every way by the tests."""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    get_rank,
    is_main_process,
)

model_folder, output, ranks = sys.argv[1:4]
rows = Dataset.from_dict({"text": [f"The capital number {i} is {i * 7}." for i in range(21)]})
steps = int(os.environ.get("MAX_STEPS", "4"))
settings = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=8 // 2 // max(1, int(ranks)), max_steps=steps,
    logging_steps=1, output_dir=output, report_to="none", bf16=False, save_strategy="no", learning_rate=1e-3,
)  # fmt: skip
args = SFTConfig(**settings) if "early" in sys.argv else None

model, tokenizer = FastLanguageModel.from_pretrained(
    model_folder,
    max_seq_length=64,
    load_in_4bit=False,
    dtype="float32",
    use_multi_gpu=None if "RANK" in os.environ else MultiGPUConfig(num_processes=int(ranks)),
)
trainer = PantheraMLDistributedTrainer(
    model=model, tokenizer=tokenizer, train_dataset=rows, args=args or SFTConfig(**settings)
)
trainer.train(resume_from_checkpoint="auto")
trainer.model.save_pretrained(Path(output, "adapter"))  # by every rank, as a script for one does
if is_main_process():  # alone
    trainer.print_memory_stats()
    memory = trainer.get_model_memory_usage()
    logs = [{k: v for k, v in log.items() if k in ("loss", "grad_norm")} for log in trainer.state.log_history]
    Path(output, "result.json").write_text(
        json.dumps({"logs": [log for log in logs if log], "memory": memory})
    )
os.write(1, f"rank {get_rank()} is done\n".encode())
