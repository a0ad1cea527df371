"""Other names under which settings are known, and where they stand today."""

from __future__ import annotations

# The names that older run files use for the sections.
SECTION_ALIASES = {
    "pretrained_model_config": "model",
    "peft_config": "lora",
    "dataset_config": "data",
    "trainer_config": "trainer",
}

# Names used by other tools and by older versions of TRL and transformers.
KNOWN_ELSEWHERE = {
    "lr": "trainer.learning_rate",
    "epochs": "trainer.num_train_epochs",
    "num_epochs": "trainer.num_train_epochs",
    "batch_size": "trainer.per_device_train_batch_size",
    "micro_batch_size": "trainer.per_device_train_batch_size",
    "train_batch_size": "trainer.per_device_train_batch_size",
    "eval_batch_size": "trainer.per_device_eval_batch_size",
    "test_batch_size": "trainer.per_device_eval_batch_size",
    "optimizer": "trainer.optim",
    "scheduler": "trainer.lr_scheduler_type",
    "lr_scheduler": "trainer.lr_scheduler_type",
    "warmup_ratio": "trainer.warmup_steps, where a number below 1 is a share of all steps",
    "evaluation_strategy": "trainer.eval_strategy",
    "group_by_length": "trainer.train_sampling_strategy: group_by_length",
    "num_workers": "trainer.dataloader_num_workers",
    "mixed_precision": "trainer.bf16: true or trainer.fp16: true",
    "gradient_checkpointing": "model.use_gradient_checkpointing",
    "activation_checkpointing": "model.use_gradient_checkpointing",
    "model_name_or_path": "model.model_name",
    "base_model": "model.model_name",
    "torch_dtype": "model.dtype",
    "max_seq_len": "model.max_seq_length",
    "sequence_length": "model.max_seq_length",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "dataset_text_field": "data.text_field",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "num_gpus": "multi_gpu.num_processes",
    "nproc_per_node": "multi_gpu.num_processes",
    "use_multi_gpu": "multi_gpu.num_processes, or multi_gpu: true for all visible GPUs",
    "save_method": "save.formats",
}
