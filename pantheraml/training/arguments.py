"""Training arguments: TRL's SFTConfig plus what it lacks, with a precision the hardware has."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast, get_args

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from pantheraml.config.multi_gpu import MultiGPUConfig, Strategy
from pantheraml.devices.inventory import is_bfloat16_supported, num_gpus
from pantheraml.distributed.process_group import join_early
from pantheraml.errors import ConfigError, did_you_mean
from pantheraml.launch.accelerate import launched_precision
from pantheraml.training.non_finite import POLICIES, RESTORE


@dataclass
class PantheraMLTrainingArguments(SFTConfig):
    """SFTConfig with these differences.

    Attributes:
        embedding_learning_rate: learning rate of trained embeddings and heads (``embed_tokens``, ``lm_head``);
            None gives them the common one.
        max_length: longest row in tokens; None means the model's ``max_seq_length`` (SFTConfig: 1024).
        gradient_checkpointing: None means that the model's ``use_gradient_checkpointing`` decides (SFTConfig: True);
            True or False written here wins over it.
        global_batch_size: rows of an optimizer step on all ranks together; ``gradient_accumulation_steps`` follows from
            it and the number of ranks. None: per device x accumulation x ranks.
        merge_micro_batches: put the micro-batches of a step through the model together, as documents of one row without
            padding; the loss is the same. None does so on a GPU where memory allows and attention keeps documents
            apart, and not where recompute is asked for.
        async_save: write checkpoints beside the training: the state is copied to host memory, which takes as much of it
            as the trained weights and the optimizer's state, and a thread writes it. What a disk did not take is told
            at the next save; the last checkpoint's failure is raised at the end.
        deterministic: take only what adds numbers up in a fixed order, so that two runs with the same arguments on as
            many of the same GPUs are equal bit by bit; slower. On GPUs, CUBLAS_WORKSPACE_CONFIG=:4096:8 has to be set
            when Python starts.
        on_non_finite: what becomes of a run when a loss or gradient is not finite: "stop" ends it with an error that
            names step and rows, "skip" leaves the step out, "restore" goes back to the last checkpoint's weights and on
            with the next rows. Weights and optimizer are never touched by such a step.
        logging_nan_inf_filter: off: a loss that is not finite is logged as such, and no step waits for the device to
            find out (transformers: replaced by the mean of the others).
        use_cpu: on where there is no CUDA GPU.
        dataloader_pin_memory: off where there is no GPU to copy to.
        multi_gpu_strategy: as ``MultiGPUConfig.strategy``, for scripts that say it here; ``"auto"`` leaves it to that.
        bf16: None (with ``fp16`` unset) is what ``accelerate launch --mixed_precision`` says, or else what the hardware
            has: bf16 where the GPU has it, else fp16 on a GPU, float32 on a CPU (SFTConfig: bf16 everywhere).
    """

    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of trained embeddings and heads."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest row in tokens; None means the model's max_seq_length."}
    )
    gradient_checkpointing: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Recompute activations; None leaves it to the model."}
    )

    global_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of a step on all ranks; the accumulation follows."}
    )
    merge_micro_batches: bool | None = field(
        default=None, metadata={"help": "Micro-batches of a step in one pass; None decides by memory."}
    )
    async_save: bool = field(
        default=False, metadata={"help": "Write checkpoints beside the training, from a copy in host memory."}
    )
    deterministic: bool = field(
        default=False, metadata={"help": "Two runs of the same layout are equal bit by bit; slower."}
    )
    on_non_finite: str = field(
        default="stop", metadata={"help": "A loss or gradient that is not finite: stop, skip or restore."}
    )
    multi_gpu_strategy: str = field(
        default="auto", metadata={"help": "How the work is spread over GPUs, as in MultiGPUConfig."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log losses that are not finite as what they are."}
    )

    def __post_init__(self) -> None:
        join_early()
        # transformers turns None into False; what the user wrote is kept apart. Its newer name for it wins.
        newer = getattr(self, "activation_checkpointing", None)
        self._written_recompute = self.gradient_checkpointing if newer is None else newer
        # Models are put on CUDA GPUs or on the CPU; said here, transformers allows bf16 there too.
        self.use_cpu = self.use_cpu or num_gpus() == 0
        on_gpu = not self.use_cpu
        self.dataloader_pin_memory = self.dataloader_pin_memory and on_gpu
        if self.bf16 is None and not self.fp16:
            of_hardware = ("bf16" if is_bfloat16_supported() else "fp16") if on_gpu else None
            precision = launched_precision() or of_hardware
            self.bf16, self.fp16 = precision == "bf16", precision == "fp16"
        rate = self.embedding_learning_rate
        if rate is not None and rate <= 0:
            raise ConfigError(
                got=f"embedding_learning_rate={rate} was given.",
                need="A learning rate is more than 0.",
                fix="Leave it out to use learning_rate for embeddings too.",
            )
        super().__post_init__()
        if self.multi_gpu_strategy not in get_args(Strategy):
            raise ConfigError(
                got=f"multi_gpu_strategy={self.multi_gpu_strategy!r} was given.",
                need=f"It is one of {', '.join(map(repr, get_args(Strategy)))}.",
                fix=did_you_mean(self.multi_gpu_strategy, get_args(Strategy)) or "Leave it out.",
            )
        self._check_non_finite()

    def _check_non_finite(self) -> None:
        if self.on_non_finite not in POLICIES:
            raise ConfigError(
                got=f"on_non_finite={self.on_non_finite!r} was given.",
                need='It is "stop", "skip" or "restore".',
                fix="Leave it out to end a run whose loss is not finite.",
            )
        if self.on_non_finite == RESTORE and (self.save_strategy == "no" or self.save_only_model):
            given = "save_only_model=True" if self.save_only_model else 'save_strategy="no"'
            raise ConfigError(
                got=f'on_non_finite="restore" and {given} were given.',
                need="A run goes back to a checkpoint that it has saved, with its optimizer.",
                fix=f'Leave {given} out, or pass on_non_finite="skip" to leave such steps out.',
            )


UnslothTrainingArguments = PantheraMLTrainingArguments


def to_sft_config(args: TrainingArguments | None, **overrides: object) -> SFTConfig:
    """A private SFTConfig from any kind of training arguments; the caller's object is never changed.

    Args:
        args: SFTConfig, PantheraMLTrainingArguments, TrainingArguments, or None for our defaults.
        overrides: fields to set (``dataset_text_field`` and the like, as older scripts pass to the trainer).

    Raises:
        ConfigError: something that is not training arguments.
    """
    if args is None:
        config = PantheraMLTrainingArguments()
    elif isinstance(args, SFTConfig):
        config = copy.copy(args)
    elif isinstance(args, TrainingArguments):
        known = {entry.name for entry in fields(SFTConfig)}
        values = {key: value for key, value in args.to_dict().items() if key in known}
        values["hub_token"] = args.hub_token  # to_dict hides it
        config = SFTConfig(**values)
    else:
        raise ConfigError(
            got=f"args is a {type(args).__name__}.",
            need="The trainer takes SFTConfig, TrainingArguments or PantheraMLTrainingArguments.",
            fix="Write args=PantheraMLTrainingArguments(output_dir='outputs', ...).",
        )
    for name, value in overrides.items():
        if value is not None:
            setattr(config, name, value)
    return config


def written_recompute(args: TrainingArguments | None) -> bool | None:
    """What the user wrote about activation recompute, or None where only a library's default speaks.

    SFTConfig turns it on by default and TrainingArguments leaves it off, so only the other value is the user's.
    """
    if isinstance(args, PantheraMLTrainingArguments):
        return args._written_recompute
    value = bool(
        getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
    )
    if args is None or value == isinstance(args, SFTConfig):
        return None
    return value


def with_strategy(settings: MultiGPUConfig, args: TrainingArguments) -> MultiGPUConfig:
    """``settings`` with the strategy that ``args.multi_gpu_strategy`` says.

    Raises:
        ConfigError: another one is in ``settings``, or there is no such strategy.
    """
    wanted = getattr(args, "multi_gpu_strategy", "auto")
    if wanted in ("auto", settings.way):
        return settings
    if settings.way != "auto":
        raise ConfigError(
            got=f"multi_gpu_strategy={wanted!r} and MultiGPUConfig(strategy={settings.way!r}) were given.",
            need="A run has one strategy.",
            fix="Keep one of them.",
        )
    return replace(settings, strategy=wanted)


def set_recompute_argument(config: TrainingArguments, on: bool) -> None:
    """Set recompute under both of its names: TRL reads the older one, transformers after 5.17 the newer one."""
    config.gradient_checkpointing = on
    if hasattr(config, "activation_checkpointing"):
        config.activation_checkpointing = on


def pin_device(config: TrainingArguments, device: torch.device) -> None:
    """Train on the device the model is on.

    transformers puts a single process on GPU 0 and, where several GPUs are visible, on all of them at once
    (nn.DataParallel); a model that was loaded elsewhere stays where it is instead.

    Args:
        config: changed in place, unless it belongs to one of several processes.
        device: where the model is.

    Raises:
        ConfigError: the model is on the CPU and the arguments train on a GPU.
    """
    if device.type == "cpu" and config.device.type != "cpu":  # pragma: no cover - needs a GPU
        raise ConfigError(
            got=f"The model is on the CPU and the training arguments use {config.device}.",
            need="A run has one device.",
            fix="Pass use_cpu=True in the arguments, or load the model with device_map=None to use the GPU.",
        )
    if device.type == "cuda" and config.world_size == 1:  # pragma: no cover - needs a GPU
        config.__dict__["_setup_devices"] = device
        config._n_gpu = 1
        torch.cuda.set_device(device)


def join_ranks(config: TrainingArguments, ranks: int) -> None:
    """Let arguments that were made for one process be those of a rank.

    Args:
        config: changed in place.
        ranks: of the process group; 1 without one.

    Raises:
        ConfigError: they are those of one process still, so that each rank would train a model of its own.
    """
    if ranks > 1 and config.world_size == 1:
        # Without use_cpu=True, accelerate takes each of several ranks on CPUs for a run of its own.
        config.use_cpu = config.use_cpu or num_gpus() == 0
        config.__dict__.pop("_setup_devices", None)
    if ranks > 1 and config.device is not None and config.world_size == 1:
        raise ConfigError(
            got=f"The training arguments are those of one process, and this is one of {ranks} ranks.",
            need="Arguments that are made before the ranks know of one another train each rank alone.",
            fix="Call FastLanguageModel.from_pretrained or setup_multi_gpu before making the arguments.",
        )
    if ranks > 1 and config.device.type == "cpu":
        # accelerate numbers CPUs, and older torch loads an optimizer to no such device: no run could be gone on with.
        config.__dict__["_setup_devices"] = torch.device("cpu")


def copy_batches_beside(config: SFTConfig) -> None:
    """Let batches go to the GPU while it computes; the host would wait for all it has launched so far (in place)."""
    if config.dataloader_pin_memory and config.device.type == "cuda":  # pragma: no cover - needs a GPU
        config.accelerator_config = replace(cast(Any, config.accelerator_config), non_blocking=True)


def resolve_max_length(config: SFTConfig, model_length: int | None) -> int | None:
    """Longest row in tokens.

    SFTConfig's default of 1024 cannot be told from a 1024 that was written; when the model was loaded with
    another ``max_seq_length``, that is what its user asked for, and it wins over the default.
    """
    if model_length is None:
        return config.max_length
    default = 1024 if not isinstance(config, PantheraMLTrainingArguments) else None
    return model_length if config.max_length in (None, default) else config.max_length
