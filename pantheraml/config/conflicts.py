"""Settings that are right one by one and wrong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pantheraml.config.devices import device_names, num_ranks, visible_devices
from pantheraml.config.multi_gpu import find_contradiction
from pantheraml.config.names import KNOWN_ELSEWHERE

if TYPE_CHECKING:
    from pantheraml.config.run import RunConfig

_EMBEDDINGS = {"embed_tokens", "lm_head"}


@dataclass(frozen=True)
class Conflict:
    """Settings that do not fit together.

    Args:
        paths: the settings, as dotted names.
        text: what is wrong and what to write, as sentences.
    """

    paths: tuple[str, ...]
    text: str


class Conflicts(ValueError):
    """All conflicts of one run; pydantic carries it to whoever reports the problems."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        self.conflicts = conflicts
        super().__init__(" ".join(conflict.text for conflict in conflicts))


def find_conflicts(config: RunConfig) -> list[Conflict]:
    """Every set of settings of ``config`` that does not fit together."""
    of_training = (_precision, _adapter, _lengths, _rows, _evaluation, _loss_marks, _extra, _saving)
    of_places = (_devices, _several_devices, _device_map, _ranks, _both_sections)
    checks = (*of_training, *of_places)
    return [conflict for check in checks for conflict in check(config)]


def _precision(config: RunConfig) -> Iterator[Conflict]:
    model = config.model
    names = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "load_in_fp8")
    loads = [f"model.{name}" for name in names if getattr(model, name)]
    if len(loads) > 1:
        yield Conflict(
            tuple(loads), f"{_and(loads)} are true together; weights have one precision. Keep one."
        )
    quantised = [path for path in loads if path != "model.load_in_16bit"]
    if model.full_finetuning and quantised:
        yield Conflict(
            ("model.full_finetuning", *quantised),
            f"model.full_finetuning trains the weights themselves, which {_and(quantised)} would quantise. "
            "Keep one of them.",
        )
    if model.load_in_16bit and model.dtype == "float32":
        yield Conflict(
            ("model.load_in_16bit", "model.dtype"),
            "model.load_in_16bit is true and model.dtype is float32. Write load_in_4bit: false for float32 "
            "weights, or another dtype.",
        )
    other = [path for path in loads if path != "model.load_in_4bit"]
    other += ["model.full_finetuning"] if model.full_finetuning else []
    other += ["model.kernels"] if model.kernels == "off" else []
    other += ["model.load_in_4bit"] if model.load_in_4bit is False else []
    if model.keep_dequantized and other:
        yield Conflict(
            ("model.keep_dequantized", *other),
            f"model.keep_dequantized keeps what fused layers make of 4-bit weights, and {_and(other)} leaves none. "
            "Drop one of them.",
        )
    if config.trainer.fp16 and config.trainer.bf16:
        yield Conflict(
            ("trainer.fp16", "trainer.bf16"),
            "trainer.fp16 and trainer.bf16 are both true; mixed precision has one dtype. "
            "Keep one, or none: the hardware then decides.",
        )


def _adapter(config: RunConfig) -> Iterator[Conflict]:
    lora, full = config.lora, config.model.full_finetuning
    if full and lora is not None:
        yield Conflict(
            ("model.full_finetuning", "lora"),
            "model.full_finetuning trains all weights, and lora asks for an adapter. "
            "Remove the lora section (lora: null), or full_finetuning.",
        )
    if not full and lora is None and "lora" in config.model_fields_set:
        yield Conflict(
            ("lora", "model.full_finetuning"),
            "lora is null and model.full_finetuning is off, so nothing would be trained. "
            "Write lora: {} for the default adapter, or model.full_finetuning: true.",
        )
    if config.trainer.embedding_learning_rate is not None and not full and not _trains_embeddings(config):
        yield Conflict(
            ("trainer.embedding_learning_rate", "lora.modules_to_save", "lora.target_modules"),
            "trainer.embedding_learning_rate is given, but neither embed_tokens nor lm_head is trained. "
            "Add lora.modules_to_save: [embed_tokens, lm_head], or remove the rate.",
        )


def _trains_embeddings(config: RunConfig) -> bool:
    if config.lora is None:
        return False
    named = [*(config.lora.modules_to_save or ())]
    if isinstance(config.lora.target_modules, list):
        named += config.lora.target_modules
    return any(name.rsplit(".", 1)[-1] in _EMBEDDINGS for name in named)


def _lengths(config: RunConfig) -> Iterator[Conflict]:
    length, longest = config.trainer.max_length, config.model.max_seq_length
    if length is not None and length > longest:
        yield Conflict(
            ("trainer.max_length", "model.max_seq_length"),
            f"trainer.max_length is {length}, longer than model.max_seq_length, which is {longest}. "
            "Raise model.max_seq_length; trainer.max_length can be left out.",
        )


def _rows(config: RunConfig) -> Iterator[Conflict]:
    data = config.data
    sources = {"path": data.path, "use_debug_dataset": data.use_debug_dataset, "loader": data.loader}
    given = [f"data.{name}" for name, value in sources.items() if value]
    if not given:
        yield Conflict(
            tuple(f"data.{name}" for name in sources),
            "No training rows are named. Give one of data.path (a Hub id, a folder or a file), "
            "data.use_debug_dataset: true and data.loader (package.module:function).",
        )
    if len(given) > 1:
        yield Conflict(
            tuple(given), f"{_and(given)} each name the training rows, which have one source. Keep one."
        )
    if data.name is not None and data.path is None:
        yield Conflict(
            ("data.name", "data.path"),
            "data.name is a configuration of the data set in data.path, which is not given. Remove it.",
        )


def _evaluation(config: RunConfig) -> Iterator[Conflict]:
    data, trainer = config.data, config.trainer
    held_out = [f"data.{name}" for name in ("eval_path", "eval_split") if getattr(data, name) is not None]
    if data.validation_fraction is not None and held_out:
        yield Conflict(
            ("data.validation_fraction", *held_out),
            f"data.validation_fraction holds out training rows, and {_and(held_out)} names other evaluation "
            "rows. Keep one of them.",
        )
    may_have_rows = data.has_eval or data.use_debug_dataset or data.loader is not None
    if trainer.eval_strategy in ("steps", "epoch") and not may_have_rows:
        yield Conflict(
            ("trainer.eval_strategy", "data.eval_path", "data.eval_split", "data.validation_fraction"),
            f"trainer.eval_strategy is {trainer.eval_strategy}, but there are no evaluation rows. "
            "Give data.eval_path, data.eval_split or data.validation_fraction.",
        )
    if trainer.eval_steps is not None and trainer.eval_strategy != "steps":
        yield Conflict(
            ("trainer.eval_steps", "trainer.eval_strategy"),
            "trainer.eval_steps needs trainer.eval_strategy: steps. Add it or remove eval_steps.",
        )


def _loss_marks(config: RunConfig) -> Iterator[Conflict]:
    if not config.train_on_responses:
        return
    for name in ("assistant_only_loss", "completion_only_loss"):
        if getattr(config.trainer, name):
            yield Conflict(
                ("train_on_responses", f"trainer.{name}"),
                f"train_on_responses and trainer.{name} both decide which tokens the loss counts. "
                "Keep one of them.",
            )


def _devices(config: RunConfig) -> Iterator[Conflict]:
    names = device_names(config.devices)
    if config.devices == []:
        yield Conflict(("devices",), "devices is empty. Give one device, such as 0 or cpu, or leave it out.")
    if names and (config.model.device_map is not None or config.model.auto_device_map):
        path = "model.auto_device_map" if config.model.device_map is None else "model.device_map"
        yield Conflict(("devices", path), f"devices and {path} both place the model. Keep one of them.")
    if names and names[0] != "cpu" and config.trainer.use_cpu:
        yield Conflict(
            ("devices", "trainer.use_cpu"),
            f"devices names {names[0]}, and trainer.use_cpu asks for the CPU. Keep one of them.",
        )
    if len(names) == 1 and config.multi_gpu is not None and config.multi_gpu.may_start_ranks:
        if names[0] != "cpu":
            yield Conflict(
                ("devices", "multi_gpu"),
                f"devices names {names[0]} alone, and multi_gpu trains on several GPUs. Keep one of them.",
            )
        elif config.multi_gpu.num_processes is None:
            yield Conflict(
                ("devices", "multi_gpu"),
                "devices is cpu, and multi_gpu starts a rank for each GPU. "
                "Write multi_gpu.num_processes for ranks on the CPU, or leave devices out.",
            )


def _several_devices(config: RunConfig) -> Iterator[Conflict]:
    names, ranks, section = device_names(config.devices), num_ranks(config.devices), config.multi_gpu
    if len(names) > 1 and ranks is None:
        visible = visible_devices(names)
        fix = "Write [0, 1] for the first two, or cpu with multi_gpu.num_processes for ranks on the CPU."
        if visible is not None:
            fix = f"Type CUDA_VISIBLE_DEVICES={visible} pantheraml train ... with multi_gpu: true and without devices."
        yield Conflict(
            ("devices",),
            f"devices names {', '.join(names)}. Several devices are GPUs, counted from 0 on. {fix}",
        )
    if ranks is None or section is None:
        return
    if section.strategy == "none":
        yield Conflict(
            ("devices", "multi_gpu.strategy"),
            f"devices names {ranks} GPUs, and multi_gpu.strategy is none, which is one process. Keep one of them.",
        )
    if section.num_processes not in (None, ranks):
        yield Conflict(
            ("devices", "multi_gpu.num_processes"),
            f"devices names {ranks} GPUs, and multi_gpu.num_processes is {section.num_processes}. "
            "Keep one of them.",
        )
    if section.auto_device_map and "auto_device_map" in section.model_fields_set:
        yield Conflict(
            ("devices", "multi_gpu.auto_device_map"),
            "devices gives each of its GPUs the whole model, and multi_gpu.auto_device_map may split it between "
            "all visible GPUs. Keep one of them.",
        )


def _device_map(config: RunConfig) -> Iterator[Conflict]:
    device_map, section = config.model.device_map, config.multi_gpu
    if config.model.auto_device_map and device_map not in (None, "auto"):
        yield Conflict(
            ("model.auto_device_map", "model.device_map"),
            "model.auto_device_map and model.device_map both place the model. Keep one of them.",
        )
    if device_map is None or section is None or not section.may_start_ranks:
        return
    written = list(device_map.values()) if isinstance(device_map, dict) else device_map
    places = sorted(set(device_names(written)))
    if len(places) == 1 and places[0].startswith("cuda:"):
        yield Conflict(
            ("model.device_map", "multi_gpu"),
            f"model.device_map places the model on {places[0]}, and multi_gpu gives each rank a GPU of its own. "
            "Keep one of them.",
        )
    splits = len(places) > 1 or device_map in ("balanced", "sequential")
    if splits and section.num_processes is not None:
        yield Conflict(
            ("model.device_map", "multi_gpu.num_processes"),
            f"model.device_map splits the model in one process, and multi_gpu.num_processes asks for "
            f"{section.num_processes}. Keep one of them.",
        )


def _ranks(config: RunConfig) -> Iterator[Conflict]:
    found = None if config.multi_gpu is None else find_contradiction(config.multi_gpu)
    if found is not None:
        yield Conflict(tuple(f"multi_gpu.{name}" for name in found.fields), " ".join(found[1:]))


def _both_sections(config: RunConfig) -> Iterator[Conflict]:
    """Settings that the sections model and multi_gpu both have."""
    for name, unset in (("max_memory", None), ("use_gradient_checkpointing", "auto")):
        here, there = getattr(config.model, name), getattr(config.multi_gpu, name, unset)
        if unset not in (here, there) and here != there:
            yield Conflict(
                (f"model.{name}", f"multi_gpu.{name}"),
                f"model.{name} and multi_gpu.{name} differ. Keep one of them.",
            )


def _extra(config: RunConfig) -> Iterator[Conflict]:
    declared = type(config.trainer).model_fields
    for name in config.trainer.extra:
        place = f"trainer.{name}" if name in declared else KNOWN_ELSEWHERE.get(name)
        if place is not None:
            yield Conflict(("trainer.extra",), f"trainer.extra has {name}. In its place, write {place}.")


def _saving(config: RunConfig) -> Iterator[Conflict]:
    formats = config.save.formats or []
    full = config.model.full_finetuning
    if full and "adapter" in formats:
        yield Conflict(
            ("save.formats", "model.full_finetuning"),
            "save.formats has adapter, but full fine-tuning makes none. Write model in its place.",
        )
    if not full and "model" in formats:
        yield Conflict(
            ("save.formats", "model.full_finetuning"),
            "save.formats has model, which is for full fine-tuning. Write adapter for the LoRA weights, or "
            "merged_16bit for the whole model with them merged in.",
        )


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
