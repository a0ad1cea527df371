"""The rows of ``docs/promises.md``: what holds, in our words, and whether it takes GPUs to show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One promise. Tests name it by ``@pytest.mark.promise("A3")``; ``gpus`` are how many it takes to show it."""

    key: str
    promise: str
    gpus: int = 0


SECTIONS: dict[str, tuple[str, list[Row]]] = {
    "A": ("PantheraML itself", [
        Row("A1", "Every name of the guide comes from `pantheraml`, lazily, and is right with and without ranks"),
        Row("A2", "`from_pretrained`: its flags act on every path, 4-bit, 8-bit, 16-bit, FP8 and full", 1),
        Row("A3", "`use_multi_gpu=True` and `python script.py`: every visible GPU trains; exit code, Ctrl-C and "
            "tracebacks are those of one process; `CUDA_VISIBLE_DEVICES` is read, never written", 2),
        Row("A4", "`torchrun`, `accelerate launch` and two machines: the same script, the same result", 2),
        Row("A5", "`srun`: one task a node starts its GPUs, one task a GPU is a rank; all from SLURM's variables"),
        Row("A6", "`device_map` and `max_memory`: trains, limits are kept, what cannot fit is said, and more GPUs "
            "are faster", 2),
        Row("A7", "`MultiGPUConfig`: a checked dataclass of which every field acts"),
        Row("A8", "`PantheraMLDistributedTrainer`: the quick start as printed, Alpaca columns and no adapter asked "
            "for included"),
        Row("A9", "`for_training` and `for_inference` act and return the model"),
        Row("A10", "fp16 or bf16 by `SFTConfig`, chosen by hardware where neither is set", 1),
        Row("A11", "`print_memory_stats` and `get_model_memory_usage`: every rank's GPU, in GiB", 1),
        Row("A12", "`pantheraml.kernels.utils`: the guide's four helpers; an index out of range is a clear error", 1),
        Row("A13", "`UnslothDistributedTrainer`, `UnslothTrainer`, `UnslothTrainingArguments` are aliases"),
        Row("A14", "`examples/multi_gpu_training.py`, with and without `--advanced`, runs"),
        Row("A15", "the guide's environment variables pass through to every rank"),
    ]),
    "B": ("Strategies and correctness", [
        Row("B1", "`PantheraMLTrainingArguments(multi_gpu_strategy=…, embedding_learning_rate=…)`: the strategy is "
            "obeyed, the rate has a group of its own"),
        Row("B2", "`initialize_distributed` gives an `Accelerator`, once or twice, in any order"),
        Row("B3", "the order of imports changes no number"),
        Row("B4", "every row of an epoch is on exactly one rank, shuffled by epoch, uneven counts and streams too"),
        Row("B5", "accumulation over ranks equals one rank with the same global batch"),
        Row("B6", "DeepSpeed, ZeRO 0 to 3, by `accelerate launch` and by our arguments, with offload", 2),
        Row("B7", "the effective batch is printed at the start, and right"),
        Row("B8", "`--mixed_precision` and `CUDA_VISIBLE_DEVICES` are honoured"),
        Row("B9", "GPUs of different size or speed: the batch is split by what they take and measured speed, if asked"),
    ]),
    "C": ("Existing scripts, direct trainer, GRPO", [
        Row("C1", "`enable_multi_gpu` makes an unchanged TRL script train on every GPU, each argument acts, and "
            "`disable_multi_gpu` leaves nothing of it"),
        Row("C2", "GRPO over our models: groups whole, rewards, advantages and losses those of one rank, under DDP "
            "and FSDP2; vLLM's settings pass through; the guide's recipe", 2),
        Row("C3", "`MultiGPUTrainer`: any module and loader; MEAN, SUM, WEIGHTED"),
        Row("C4", "`DeviceManager`, `ConfigManager`, `MemoryManager`: thin faces of the planner and telemetry"),
        Row("C5", "uneven batches, out of memory, clean-up and recovery are real"),
        Row("C6", "`examples/verify_installation.py` is `pantheraml doctor`"),
        Row("C7", "the full and the quick test run are one command each"),
        Row("C8", "3.5 to 4 times the speed on 4 GPUs, printed by our benchmark", 4),
    ]),
    "D": ("Process isolation, YAML", [
        Row("D1", "one process a GPU, watched; nothing of one on another's GPU; one that dies ends the job with its "
            "traceback", 2),
        Row("D2", "N ranks that load one checkpoint take the host little more than one copy; each GPU what a run on "
            "one takes", 2),
        Row("D3", "a run file by `CONFIG_PATH`, `--config` or `pantheraml train`: one schema, every error at once "
            "with its line; the guide's file as printed"),
        Row("D4", "a debug data set in the package; data of one's own by `loader: module:function`, path or name"),
        Row("D5", "gradients are reduced in the last micro-batch alone; every rank evaluates; figures are real; the "
            "model is saved in the end"),
        Row("D6", "memory is recorded while it trains, in a log that can be followed"),
    ]),
    "E": ("Any PyTorch model", [
        Row("E1", "algorithm distillation by `python`, `accelerate launch` and `torchrun`: it learns within its "
            "context; the guide's keys act"),
        Row("E2", "a banner at the start: processes, kind, precision, accumulation, device"),
        Row("E3", "TensorBoard, bar and checkpoints on the main process alone; unwrapped when saved; resumed"),
        Row("E4", "the SLURM script, against a real slurmctld"),
        Row("E5", "a table of speed-ups on 1, 2 and 4 GPUs by our own benchmark, 8 where there are eight", 2),
        Row("E6", "troubleshooting: memory, speed, unlike runs, hangs, prefixes: said where it happens, and on a page"),
    ]),
    "F": ("The core", [
        Row("F1", "`from_pretrained` and `get_peft_model` take what people know, and each argument acts"),
        Row("F2", "more than one of 4-bit, 8-bit, 16-bit and FP8 is an error"),
        Row("F3", "the ten families train with fused layers to the numbers of the stock ones", 1),
        Row("F4", "any other architecture trains unfused, and the log says what was skipped and why"),
        Row("F5", "chat templates and conversations: `get_chat_template`, `standardize_sharegpt`, `to_sharegpt`"),
        Row("F6", "`train_on_responses_only` trains answers and nothing else"),
        Row("F7", "packing and padding-free batches train documents as if each were alone", 1),
        Row("F8", "`save_pretrained_merged`: every family and precision, in shards, after several ranks; loads in "
            "plain transformers and PEFT with equal logits"),
        Row("F9", "`save_pretrained_gguf`: loads elsewhere with equal logits"),
        Row("F10", "`push_to_hub`, merged too"),
        Row("F11", "continued pretraining with embedding and head, their rate apart"),
        Row("F12", "SFT, DPO, ORPO, KTO, GRPO and reward models through TRL"),
        Row("F13", "importing does nothing and is fast"),
        Row("F14", "a wrong call says what we got, what is needed and what to type"),
    ]),
}  # fmt: skip

ROWS = {row.key: row for _, rows in SECTIONS.values() for row in rows}
