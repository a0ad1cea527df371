"""A whole training run from its settings: load, attach the adapter, train, evaluate, save."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.cli.rows import call_loader, find_loader, read_rows
from pantheraml.config.devices import device_names
from pantheraml.config.load import dump_config
from pantheraml.config.run import ResponseMarks, RunConfig
from pantheraml.errors import ConfigError, HardwareError, SaveError, did_you_mean
from pantheraml.log import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pantheraml.cli.rows import Rows
    from pantheraml.training.arguments import PantheraMLTrainingArguments
    from pantheraml.training.distributed import PantheraMLDistributedTrainer


def run_training(config: RunConfig) -> dict[str, Any]:
    """Train as ``config`` says, save what it names, and print where everything is.

    What can fail early does: settings, device, folders and rows are checked before the model is loaded.

    With several GPUs, each rank runs this, and rank 0 writes and prints. A process that nobody started as a rank may
    start them where the model would be loaded, and does not come back from there.

    Returns:
        ``{"metrics": {...}, "paths": {...}}``: what the trainer measured, and the folder of each saved format, of the
        checkpoints (``output_dir``), of the resolved run file (``run_file``), of the metrics (``results``) and of the
        log that is written while it trains (``log``).

    Raises:
        PantheraMLError: when a part of the run cannot be done.
    """
    from pantheraml.distributed.process_group import group_size, is_first_of_group, setup_multi_gpu
    from pantheraml.launch.environment import LaunchEnvironment

    is_rank = LaunchEnvironment.detect().is_rank
    if is_rank:  # before the arguments, which would be those of one process
        setup_multi_gpu(config.multi_gpu.to_config() if config.multi_gpu else None)
    check_devices(config, group_size())
    # Arguments take hold of a GPU, which a process that starts ranks must not.
    may_start_ranks = not is_rank and config.multi_gpu is not None and config.multi_gpu.may_start_ranks
    arguments = None if may_start_ranks else build_arguments(config)
    loader = find_loader(config.data.loader) if config.data.loader else None
    rows = read_rows(config) if loader is None else None
    loaded = load_model(config) if may_start_ranks else None
    arguments = arguments or build_arguments(config)
    paths = _prepare_folders(config, Path(str(arguments.output_dir)))
    model, tokenizer = loaded or load_model(config)
    train_rows, eval_rows = rows or call_loader(loader, config, tokenizer)

    trainer = _build_trainer(config, model, tokenizer, arguments, train_rows, eval_rows)
    metrics = _train(trainer, config, evaluates=eval_rows is not None)
    _save(config, model, tokenizer, paths)
    if is_first_of_group():
        print("\n".join(["Training has ended.", *_summary(metrics, paths)]))
    return {"metrics": metrics, "paths": {name: str(path) for name, path in paths.items()}}


def check_devices(config: RunConfig, ranks: int) -> None:
    """Refuse devices that are not there, before anything is loaded.

    Args:
        config: the run.
        ranks: of the process group; 1 without one.

    Raises:
        ConfigError: one GPU is named, and there are several ranks.
        HardwareError: one of them is not there; the error names those that are, or says how to train without.
    """
    from pantheraml.devices.inventory import gpu_device, num_gpus

    gpus = [name for name in device_names(config.devices) if name != "cpu"]
    if gpus and num_gpus() == 0:
        ranks_too = f" multi_gpu.num_processes={len(gpus)}" if len(gpus) > 1 else ""
        raise HardwareError(
            f"devices names {', '.join(gpus)}, and this process sees no GPU.",
            "To be seen, a GPU needs its driver, a torch built for it, and a place in CUDA_VISIBLE_DEVICES.",
            f"To train on the CPU{', with as many ranks' if ranks_too else ''}, add devices=cpu{ranks_too} to the "
            "command.",
        )
    if ranks > 1:
        if config.device not in (None, "cpu"):
            raise ConfigError(
                f"devices names {config.device} alone, and this is one of {ranks} ranks.",
                "Each rank has a GPU of its own.",
                "Leave devices out; CUDA_VISIBLE_DEVICES says which GPUs are used.",
            )
        return  # a rank may see its own alone
    for name in gpus:
        gpu_device(int(name.partition(":")[2]))


def build_arguments(config: RunConfig) -> PantheraMLTrainingArguments:
    """The trainer's arguments; a field that the run does not set keeps the library's default.

    Raises:
        ConfigError: when ``trainer.extra`` has an unknown name, or the library refuses a value.
    """
    from pantheraml.training.arguments import PantheraMLTrainingArguments

    trainer = config.trainer
    known = [field.name for field in dataclasses.fields(PantheraMLTrainingArguments) if field.init]
    unknown = [name for name in trainer.extra if name not in known]
    if unknown:
        raise ConfigError(
            f"trainer.extra has {', '.join(unknown)}, which the installed TRL does not know.",
            "It takes fields of SFTConfig.",
            " ".join(filter(None, (did_you_mean(name, known) for name in unknown))),
        )
    values = {"dataset_text_field": config.data.text_field, **trainer.given(), **trainer.extra}
    values.pop("resume_from_checkpoint", None)  # given to train(), which also takes True
    if config.device == "cpu":
        values["use_cpu"] = True
    try:
        arguments = PantheraMLTrainingArguments(**values)
    except ConfigError:  # says more than we could add
        raise
    except ValueError as error:
        raise ConfigError(f"The trainer section was refused: {error}") from error
    return arguments


def load_model(config: RunConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model and tokenizer, put on the chat template, attach the adapter if it has none.

    A process with the ``multi_gpu`` section that nobody started as a rank starts the ranks here.

    Returns:
        The model ready for a trainer, and its tokenizer.
    """
    from pantheraml.fast_model import FastLanguageModel

    # Not model_dump(), which leaves out the token.
    settings = dict(config.model)
    template = settings.pop("chat_template")
    if config.device is not None:
        settings["device_map"] = config.device
    if config.multi_gpu is not None:
        settings["use_multi_gpu"] = config.multi_gpu.to_config()
    model, tokenizer = FastLanguageModel.from_pretrained(**settings)
    # A process that starts ranks has ended here, and needs none of these.
    from peft import PeftModel

    from pantheraml.data.chat_templates import get_chat_template

    if template is not None:
        tokenizer = get_chat_template(tokenizer, chat_template=template)
    if isinstance(model, PeftModel):
        say(f"{config.model.model_name} is an adapter and is trained further; the lora section is not used.")
    elif config.lora is not None:
        model = FastLanguageModel.get_peft_model(model, **dict(config.lora))
    return model, tokenizer


def _build_trainer(
    config: RunConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    arguments: PantheraMLTrainingArguments,
    train_rows: Rows,
    eval_rows: Rows | None,
) -> PantheraMLDistributedTrainer:
    """The trainer of the run, on one process or on all ranks."""
    from pantheraml.data.masking import train_on_responses_only
    from pantheraml.training.distributed import PantheraMLDistributedTrainer
    from pantheraml.training.last_step import LastStepLogged

    trainer = PantheraMLDistributedTrainer(
        model,
        arguments,
        tokenizer=tokenizer,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        callbacks=[LastStepLogged()],
        multi_gpu_config=None if config.multi_gpu is None else config.multi_gpu.to_config(),
    )
    if config.train_on_responses:
        marks = config.train_on_responses
        parts = dict(marks) if isinstance(marks, ResponseMarks) else {}
        trainer = train_on_responses_only(trainer, **parts)
    return trainer


def _train(trainer: PantheraMLDistributedTrainer, config: RunConfig, *, evaluates: bool) -> dict[str, float]:
    """Train, evaluate if there are rows for it, and keep what was measured in the run's folder, on rank 0."""
    metrics = trainer.train(resume_from_checkpoint=config.trainer.resume_from_checkpoint).metrics
    if trainer.steps_done:  # else what was measured before stays
        trainer.save_metrics("train", metrics)
    found: dict[str, float] = trainer.evaluate() if evaluates else {}
    if evaluates:
        trainer.save_metrics("eval", found)
    return {**metrics, **found}


def _prepare_folders(config: RunConfig, output_dir: Path) -> dict[str, Path]:
    """Make the run's folders and write its resolved settings, on rank 0; a full or read-only disk shows here.

    No rank goes on before the folders are there.
    """
    from pantheraml.distributed.process_group import barrier, is_first_of_group

    folder = Path(config.save.folder) if config.save.folder else output_dir
    paths = {name: folder / name for name in config.save.formats or ()}
    files = {"run_file": "run.yaml", "results": "all_results.json", "log": "telemetry.jsonl"}
    paths |= {"output_dir": output_dir, **{name: output_dir / file for name, file in files.items()}}
    try:
        if is_first_of_group():
            folder.mkdir(parents=True, exist_ok=True)
            output_dir.mkdir(parents=True, exist_ok=True)
            paths["run_file"].write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise SaveError(
            f"The run's folders cannot be written: {error}.",
            "Checkpoints and the trained model go there.",
            "Set trainer.output_dir and save.folder to folders that can be written.",
        ) from error
    barrier()
    return paths


def _save(config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerBase, paths: dict[str, Path]) -> None:
    for name in config.save.formats or ():
        if name in ("adapter", "model"):
            model.save_pretrained(str(paths[name]), tokenizer)
        else:
            model.save_pretrained_merged(str(paths[name]), tokenizer, save_method=name)


def _summary(metrics: dict[str, float], paths: dict[str, Path]) -> list[str]:
    """What came out, and where everything is: a line for each."""
    names = ("train_loss", "eval_loss", "eval_perplexity", "eval_mean_token_accuracy")
    figures = [f"  {name}: {metrics[name]:.4g}" for name in names if name in metrics]
    return [*figures, *(f"  {name}: {path}" for name, path in paths.items())]
