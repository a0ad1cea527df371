"""A script of TRL's that knows nothing of several GPUs, but for its first two lines; what it finds goes to a file.

GRPO is then trained by ours; with ``more`` by TRL's trainer before that, and SFT by TRL's after multi-GPU was disabled.
"""

import pantheraml

began = pantheraml.enable_multi_gpu(
    num_gpus=2,
    batch_size_per_gpu=2,
    ddp_backend="gloo",
    find_unused_parameters=True,
    debug=True,
    hang_seconds=0,
)

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch.distributed as dist  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from tests.hooks.work import ROWS, SETTINGS, grpo, logged  # noqa: E402

folder, output, *more = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
args = SFTConfig(output, per_device_train_batch_size=7, **SETTINGS)  # other rows than enable_multi_gpu says
trainer = SFTTrainer(model, args, train_dataset=ROWS)  # the tokenizer is the model's
trainer.train()
found = {
    "began": began,
    "ended": pantheraml.get_multi_gpu_status(),
    "logs": logged(trainer),
    "finds_unused": trainer.model_wrapped.find_unused_parameters,
    "names_unused": dist.get_debug_level() == dist.DebugLevel.INFO,
    "callbacks": [type(one).__name__ for one in trainer.callback_handler.callbacks],
    "given": args.per_device_train_batch_size,
}

settings = {**SETTINGS, "max_steps": 1, "gradient_accumulation_steps": 1, "use_cpu": True}
if "more" in more:
    rewards = GRPOTrainer(
        model,
        lambda completions, **_: [float(len(text)) for text in completions],
        GRPOConfig(
            output, num_generations=2, max_completion_length=4, per_device_train_batch_size=2, **settings
        ),
        ROWS.rename_column("text", "prompt"),
    )
    rewards.train()
    found["grpo"] = {
        "kind": type(rewards).__name__,
        "ranks": rewards.accelerator.num_processes,
        "logs": logged(rewards),
    }

supported = pantheraml.enable_grpo_support()
rewards = grpo(folder, output, 2)
found["supported"] = {
    "changed": supported["changed"],
    "trainers": pantheraml.get_grpo_status()["trainers"],
    "kind": type(rewards).__name__,
    "strategy": rewards._strategy.name,
    "logs": logged(rewards),
    "completions": list(rewards._logs["completion"]),
}
pantheraml.disable_grpo_support()

pantheraml.disable_multi_gpu()
found["after"] = pantheraml.get_multi_gpu_status()
found["restored"] = not any(hasattr(kind.__init__, "__wrapped__") for kind in (SFTTrainer, Trainer))
if "more" in more:
    own = SFTTrainer(model, SFTConfig(output, per_device_train_batch_size=2, **settings), train_dataset=ROWS)
    own.train()
    found["own"] = {"kind": type(own).__name__, "ranks": own.accelerator.num_processes, "logs": logged(own)}
Path(output, f"{began['rank']}.json").write_text(json.dumps(found))
