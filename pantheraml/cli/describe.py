"""What a run would do, from its settings alone."""

from __future__ import annotations

from pantheraml.config.load import dump_config
from pantheraml.config.run import RunConfig

_LIBRARY = "TRL's default"


def describe_run(config: RunConfig) -> str:
    """The resolved settings as YAML, and a table of what they mean as comments below them.

    The whole text is a valid run file.
    """
    rows = _rows(config)
    width = max(len(name) for name, _ in rows)
    table = [f"#   {name:<{width}}  {text}" for name, text in rows]
    return "\n".join([dump_config(config).rstrip(), "", "# What would happen:", *table])


def _rows(config: RunConfig) -> list[tuple[str, str]]:
    model, data, trainer = config.model, config.data, config.trainer
    length = trainer.max_length or model.max_seq_length
    rows = [
        (
            "model",
            f"{model.model_name}, {_precision(config)}, sequences of up to {model.max_seq_length} tokens",
        ),
        ("trained", _trained(config)),
        ("device", _device(config)),
        ("rows", _training_rows(config)),
        ("evaluation", _evaluation_rows(config)),
        ("batch", _batch(config)),
        ("packing", f"into {length} tokens" if trainer.packing else "off"),
        ("duration", _duration(config)),
        ("learning rate", f"{trainer.learning_rate or _LIBRARY}"),
    ]
    if config.train_on_responses:
        rows.append(("loss on", "the assistant's turns alone"))
    folder = config.save.folder or trainer.output_dir or "trainer.output_dir"
    formats = config.save.formats or []
    rows.append(("saved", ", ".join(f"{folder}/{name}" for name in formats) or "checkpoints only"))
    if data.max_rows is not None:
        rows.append(("row limit", f"the first {data.max_rows} rows"))
    return rows


def _precision(config: RunConfig) -> str:
    model = config.model
    if model.load_in_8bit:
        return "8-bit"
    if model.load_in_fp8:
        return "FP8"
    if model.full_finetuning:
        return model.dtype or "float32"
    if model.load_in_16bit or model.load_in_4bit is False:
        return model.dtype or "16-bit"
    return "4-bit"


def _device(config: RunConfig) -> str:
    model, ranks = config.model, _num_ranks(config)
    if model.device_map is not None or model.auto_device_map:
        return f"by device_map {model.device_map or 'auto'}"
    if ranks == 1:
        return config.device or "the first GPU, or the CPU"
    count = "ranks" if ranks is None else f"{ranks} ranks"
    return f"{count} on the CPU" if config.device == "cpu" else f"{count}, each with a visible GPU of its own"


def _num_ranks(config: RunConfig) -> int | None:
    """Ranks on this machine; None where there is one for each visible GPU."""
    section, device_map = config.multi_gpu, config.model.device_map
    is_split = isinstance(device_map, dict) or device_map in ("balanced", "sequential")
    if section is None or not section.may_start_ranks or is_split:
        return 1
    return section.num_processes


def _trained(config: RunConfig) -> str:
    lora = config.lora
    if lora is None:
        return "all weights"
    modules = lora.target_modules
    where = ", ".join(modules) if isinstance(modules, list) else modules or "the usual layers of its family"
    return f"LoRA of rank {lora.r} on {where}"


def _training_rows(config: RunConfig) -> str:
    data = config.data
    if data.use_debug_dataset:
        return f"the debug data set, split {data.split}"
    return f"from {data.loader}" if data.loader else f"{data.path}, split {data.split}"


def _evaluation_rows(config: RunConfig) -> str:
    data = config.data
    if data.validation_fraction is not None:
        return f"{data.validation_fraction:.0%} of the rows, held out"
    if data.has_eval:
        source = data.eval_path or data.path or data.loader or "the debug data set"
        return f"{source}, split {data.eval_split or 'train'}"
    return "what the loader returns" if data.loader else "none"


def _batch(config: RunConfig) -> str:
    rows = config.trainer.per_device_train_batch_size
    if config.trainer.global_batch_size is not None:
        most = "" if rows is None else f", up to {rows} per device at a time"
        return f"{config.trainer.global_batch_size} per step on all ranks{most}"
    steps = config.trainer.gradient_accumulation_steps
    if rows is None or steps is None:
        return f"rows per device: {rows or _LIBRARY}; accumulated: {steps or _LIBRARY}"
    ranks = _num_ranks(config)
    if ranks is None:
        return f"{rows} per device x {steps} accumulated x a rank for each visible GPU"
    several = f" x {ranks} ranks" if ranks > 1 else ""
    return f"{rows} per device x {steps} accumulated{several} = {rows * steps * ranks} per step"


def _duration(config: RunConfig) -> str:
    trainer = config.trainer
    if trainer.max_steps is not None and trainer.max_steps > 0:
        return f"{trainer.max_steps} steps"
    return f"{trainer.num_train_epochs:g} epochs" if trainer.num_train_epochs else _LIBRARY
