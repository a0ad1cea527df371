"""The ``trainer`` section: the fields of TRL's ``SFTConfig`` that runs commonly set.

A field that is not given (or is null) is not passed on, so that the default is the one of the installed
TRL. Every other ``SFTConfig`` field can be given under ``extra``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pantheraml.config.section import (
    Count,
    CountOrZero,
    NumberOrZero,
    PositiveNumber,
    Section,
    Share,
    Whole,
    unset,
)

# Settings of ours that SFTConfig does not have.
OUR_FIELDS = frozenset(
    {"embedding_learning_rate", "global_batch_size", "async_save", "deterministic", "on_non_finite", "extra"}
)


class TrainerSettings(Section):
    """How long, how fast and with which optimizer to train; what to log, evaluate and keep."""

    output_dir: str | None = unset("Folder for checkpoints and results.")
    run_name: str | None = unset("Name of the run for trackers.")

    # Batches and length of the run
    per_device_train_batch_size: Count | None = unset("Rows per device in a training micro-batch.")
    per_device_eval_batch_size: Count | None = unset("Rows per device in an evaluation batch.")
    gradient_accumulation_steps: Count | None = unset("Micro-batches per optimizer step.")
    global_batch_size: Count | None = unset(
        "Rows of an optimizer step on all ranks; gradient_accumulation_steps follows from it."
    )
    num_train_epochs: PositiveNumber | None = unset("Passes over the training rows.")
    max_steps: Whole | None = unset("Optimizer steps; overrides num_train_epochs when positive.")
    auto_find_batch_size: bool | None = unset("Halve the batch size when memory runs out.")

    # Optimizer and schedule
    learning_rate: PositiveNumber | None = unset("Peak learning rate.")
    embedding_learning_rate: PositiveNumber | None = unset(
        "Learning rate of trained embedding and head weights."
    )
    optim: str | None = unset("Optimizer, such as adamw_torch_fused, adamw_8bit or paged_adamw_8bit.")
    optim_args: str | None = unset("Arguments of the optimizer, as key=value,key=value.")
    weight_decay: NumberOrZero | None = unset("Decoupled weight decay.")
    adam_beta1: Share | None = unset("Decay of Adam's first moment.")
    adam_beta2: Share | None = unset("Decay of Adam's second moment.")
    adam_epsilon: PositiveNumber | None = unset("Adam's epsilon.")
    max_grad_norm: NumberOrZero | None = unset("Clip gradients to this norm; 0 turns clipping off.")
    lr_scheduler_type: str | None = unset("Schedule, such as linear, cosine or constant_with_warmup.")
    lr_scheduler_kwargs: dict[str, Any] | None = unset("Arguments of the schedule.")
    warmup_steps: NumberOrZero | None = unset("Warm-up steps; below 1 it is a share of all steps.")
    on_non_finite: Literal["stop", "skip", "restore"] | None = unset(
        "What becomes of the run when a loss or gradient is not finite."
    )
    label_smoothing_factor: Share | None = unset("Label smoothing.")
    neftune_noise_alpha: NumberOrZero | None = unset("Strength of NEFTune noise on the embeddings.")

    # Rows and tokens
    max_length: Count | None = unset("Longest row in tokens; model.max_seq_length when not given.")
    packing: bool | None = unset("Put several rows into one sequence of max_length tokens.")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] | None = unset("How rows are packed.")
    eval_packing: bool | None = unset("Pack evaluation rows too.")
    padding_free: bool | None = unset("Flatten a batch into one sequence without pad tokens.")
    pad_to_multiple_of: Count | None = unset("Pad batches to a multiple of this many tokens.")
    assistant_only_loss: bool | None = unset("Loss on assistant turns, by the chat template's own marks.")
    completion_only_loss: bool | None = unset("Loss on the completion of prompt-completion rows.")
    loss_type: str | None = unset("Loss of the trainer, such as nll or dft.")
    dataset_num_proc: Count | None = unset("Processes that tokenise the rows.")
    shuffle_dataset: bool | None = unset("Shuffle the rows once before tokenising.")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length", "batch_rebalance"] | None = (
        unset("Order in which rows are drawn.")
    )
    dataloader_num_workers: CountOrZero | None = unset("Processes that build batches.")
    dataloader_pin_memory: bool | None = unset("Pin host memory of batches.")
    dataloader_drop_last: bool | None = unset("Drop the last incomplete batch.")
    dataloader_persistent_workers: bool | None = unset("Keep the batch processes between epochs.")
    dataloader_prefetch_factor: Count | None = unset("Batches each process prepares ahead.")

    # Precision and device
    bf16: bool | None = unset("Mixed precision in bfloat16; chosen by the hardware when not given.")
    fp16: bool | None = unset("Mixed precision in float16.")
    bf16_full_eval: bool | None = unset("Evaluate with weights in bfloat16.")
    tf32: bool | None = unset("Allow TF32 matrix products.")
    use_cpu: bool | None = unset("Train on the CPU.")
    torch_compile: bool | None = unset("Compile the model with torch.compile.")
    torch_empty_cache_steps: Count | None = unset("Release cached GPU memory every so many steps.")
    deterministic: bool | None = unset("Two runs of the same layout are equal bit by bit; slower.")
    full_determinism: bool | None = unset("transformers' way, for the whole process; deterministic is ours.")
    seed: CountOrZero | None = unset("Seed of the trainer; the run's seed when not given.")
    data_seed: CountOrZero | None = unset("Seed of the row order; the trainer's seed when not given.")

    # Logging
    logging_strategy: Literal["no", "steps", "epoch"] | None = unset("When to log.")
    logging_steps: PositiveNumber | None = unset("Log every so many steps; below 1 it is a share.")
    logging_first_step: bool | None = unset("Log the first step too.")
    report_to: str | list[str] | None = unset("Trackers: none, tensorboard, wandb, ...")
    disable_tqdm: bool | None = unset("No progress bar.")
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] | None = unset(
        "Level of the transformers logger."
    )

    # Evaluation
    eval_strategy: Literal["no", "steps", "epoch"] | None = unset("When to evaluate during training.")
    eval_steps: PositiveNumber | None = unset("Evaluate every so many steps; below 1 it is a share.")
    eval_delay: NumberOrZero | None = unset("Steps or epochs before the first evaluation.")
    eval_on_start: bool | None = unset("Evaluate before the first step.")
    eval_accumulation_steps: Count | None = unset("Evaluation batches kept on the device at a time.")
    prediction_loss_only: bool | None = unset("Evaluation returns the loss alone.")
    load_best_model_at_end: bool | None = unset("Return to the best checkpoint at the end.")
    metric_for_best_model: str | None = unset("Metric that decides which checkpoint is best.")
    greater_is_better: bool | None = unset("Whether a larger metric is better.")

    # Checkpoints
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = unset("When to write a checkpoint.")
    save_steps: PositiveNumber | None = unset("Write one every so many steps; below 1 it is a share.")
    save_total_limit: Count | None = unset("Checkpoints to keep.")
    async_save: bool | None = unset("Write checkpoints beside the training, from a copy in host memory.")
    save_only_model: bool | None = unset("Leave out optimizer state; such a checkpoint cannot be resumed.")
    resume_from_checkpoint: bool | str | None = unset(
        "A checkpoint folder, true for the last one, or auto: the last one, if there is one."
    )

    # Hub
    push_to_hub: bool | None = unset("Push checkpoints to the Hub.")
    hub_model_id: str | None = unset("Repository on the Hub, as owner/name.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] | None = unset("When.")
    hub_private_repo: bool | None = unset("Make the repository private.")

    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other SFTConfig field; names are checked when training starts.",
    )

    def given(self) -> dict[str, Any]:
        """The declared fields that have a value, without ``extra``."""
        return {name: value for name, value in self if name != "extra" and value is not None}
