"""Attach LoRA through PEFT: names checked first, random numbers from the given seed only."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pantheraml.errors import AdapterError, ConfigError, HardwareError, did_you_mean, first_line
from pantheraml.log import say, warn

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from pantheraml.models.families import ModelFamily

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WHOLE_MODULES = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Targets:
    """What an adapter trains.

    Attributes:
        modules: names for PEFT's ``target_modules`` (a list, or a regular expression as text).
        parameters: names for PEFT's ``target_parameters`` (fused expert weights).
        whole: modules trained in full (``modules_to_save``).
    """

    modules: list[str] | str
    parameters: list[str]
    whole: list[str]


def resolve_targets(
    model: PreTrainedModel,
    family: ModelFamily | None,
    target_modules: str | Sequence[str] | None,
    layers: Sequence[int] | None = None,
) -> Targets:
    """Turn the names a user writes into the names this architecture has.

    The seven well-known projection names work for every family: where a model merges projections (phi3) or
    fuses experts (mixtral, qwen3_moe, gpt_oss) they are mapped, and the log says so.

    Args:
        model: the base model.
        family: its architecture, or None.
        target_modules: names, a regular expression, ``"all-linear"``, or None for the seven projections.
        layers: layers to adapt, or None for all.

    Raises:
        AdapterError: a name that matches nothing.
    """
    if isinstance(target_modules, str) and target_modules != "all-linear":
        matches = _matches(model, target_modules)
        # For experts PEFT reduces an expression to last names, and would adapt layers that it does not match.
        return Targets(matches if family and family.experts else target_modules, [], [])
    names = _linear_names(model, family)
    if target_modules == "all-linear" or (target_modules is None and family is None):
        if family is None:
            return Targets("all-linear", [], [])
        linear = sorted(names - family.expert_projections.keys())
        return Targets(linear, _per_layer(list(family.target_parameters), layers), [])

    wanted = list(dict.fromkeys(target_modules if target_modules is not None else DEFAULT_TARGETS))
    merged = dict(family.merged_projections) if family else {}
    experts = dict(family.expert_projections) if family else {}
    modules: list[str] = []
    parameters: list[str] = []
    for name in wanted:
        if name in _WHOLE_MODULES:
            continue
        if name in experts:
            parameters.append(experts[name])
        elif name in names or any(module.endswith(f".{name}") for module, _ in model.named_modules()):
            modules.append(name)
        elif name in merged:
            modules.append(merged[name])
        else:
            known = sorted({*names, *merged, *experts, *_WHOLE_MODULES})
            raise AdapterError(
                got=f"target_modules has {name!r}, which this {model.config.model_type} model does not have.",
                need=f"Its layers have {_quoted(known)}. {did_you_mean(name, known)}",
                fix='Write one of these, or target_modules="all-linear".',
            )
    mapped = sorted({f"{name} -> {merged[name]}" for name in wanted if name in merged and name not in names})
    mapped += sorted({f"{name} -> {experts[name]}" for name in wanted if name in experts})
    if mapped:
        say(f"{model.config.model_type} names its projections differently: {', '.join(mapped)}.")
    dense = [name for name in wanted if name in experts and name in names]
    if dense:
        warn(
            f"some layers of this {model.config.model_type} model have no experts; their {', '.join(dense)} are not "
            "adapted, because PEFT takes these names for the experts' weights."
        )
    whole = [name for name in wanted if name in _WHOLE_MODULES]
    if whole:
        say(f"{' and '.join(whole)} are trained in full (as modules_to_save), not by LoRA.")
    return Targets(list(dict.fromkeys(modules)), _per_layer(list(dict.fromkeys(parameters)), layers), whole)


def _matches(model: PreTrainedModel, expression: str) -> list[str]:
    """Names of the modules that ``expression`` matches."""
    try:
        found = [name for name, _ in model.named_modules() if re.fullmatch(expression, name)]
        got = f"target_modules={expression!r} matches no module of this {model.config.model_type} model."
    except re.error as error:
        found, got = [], f"target_modules={expression!r} is no regular expression: {first_line(error)}."
    if not found:
        raise AdapterError(
            got=got,
            need="A text is a regular expression over whole module names such as 'model.layers.0.mlp.up_proj'.",
            fix=f"Give a list of names instead: {_quoted(_linear_names(model))}.",
        )
    return found


def _per_layer(parameters: list[str], layers: Sequence[int] | None) -> list[str]:
    """PEFT's ``layers_to_transform`` does not reach ``target_parameters``, so layers are written out."""
    if layers is None:
        return parameters
    return [f"layers.{layer}.{name}" for layer in layers for name in parameters]


def _linear_names(model: nn.Module, family: ModelFamily | None = None) -> set[str]:
    """Last name parts of all modules that multiply by a matrix; not of heads, embeddings and what is not text."""
    heads = [model.get_output_embeddings(), getattr(model, "score", None)]  # pyright: ignore[reportCallIssue]
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if _is_linear(module) and not any(module is head for head in heads) and not _is_beside(name, family)
    }


def _is_beside(name: str, family: ModelFamily | None) -> bool:
    """Whether the module belongs to a part beside the language model, such as a vision tower."""
    return family is not None and any(f"{name}.".startswith(f"{part}.") for part in family.not_text)


def _is_linear(module: nn.Module) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)  # bitsandbytes layers are subclasses of nn.Linear


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def check_layers(model: PreTrainedModel, layers: int | Sequence[int] | None) -> list[int] | None:
    """``layers_to_transform`` as a list of existing layer numbers.

    Raises:
        AdapterError: a layer the model does not have.
    """
    if layers is None:
        return None
    chosen = [layers] if isinstance(layers, int) else list(layers)
    count = model.config.get_text_config().num_hidden_layers
    bad = [layer for layer in chosen if not 0 <= layer < count]
    if bad or not chosen:
        raise AdapterError(
            got=f"layers_to_transform={layers!r} was given to a model of {count} layers.",
            need=f"Layers are numbered from 0 to {count - 1}.",
            fix="Leave layers_to_transform out to adapt all of them.",
        )
    return chosen


def build_lora_config(model: PreTrainedModel, family: ModelFamily | None, **settings: Any) -> LoraConfig:
    """A checked PEFT configuration from the arguments of ``get_peft_model``.

    Args:
        model: the base model.
        family: its architecture, or None.
        settings: the arguments; names PEFT's LoraConfig does not know are refused.

    Raises:
        AdapterError: targets or layers that the model does not have, or that PEFT refuses.
        ConfigError: a setting that is unknown or out of range.
    """
    from peft import LoraConfig, TaskType

    from pantheraml.models import sharding, tensor_plan

    known = {field.name for field in fields(LoraConfig)}
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(
                got=f"get_peft_model got {name}={value!r}.",
                need=f"It is no argument of get_peft_model nor of peft.LoraConfig. {did_you_mean(name, known)}",
                fix="Remove it or correct the name.",
            )
    _check_numbers(settings)
    layers = check_layers(model, settings.pop("layers_to_transform", None))
    targets = resolve_targets(model, family, settings.pop("target_modules", None), layers)
    if targets.parameters:
        _check_experts(settings)
    _settle_loftq(model, settings)
    _check_fp8(model, settings)
    tensor_plan.check_adapter_settings(model, settings)
    experts = settings.get("target_parameters") or targets.parameters
    sharding.check_adapter_settings(model, {**settings, "target_parameters": experts})
    whole = [*(settings.pop("modules_to_save", None) or []), *targets.whole]
    beside = {name.rpartition(".")[2] for name, _ in model.named_modules() if _is_beside(name, family)}
    if family is not None and isinstance(targets.modules, list) and beside & {*targets.modules}:
        settings.setdefault("exclude_modules", rf"({'|'.join(map(re.escape, family.not_text))})\..*")
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    parameters = [*(settings.pop("target_parameters", None) or []), *targets.parameters]
    if not (targets.modules or parameters):
        raise AdapterError(
            got="target_modules names nothing that LoRA can adapt.",
            need="embed_tokens, lm_head and modules_to_save are trained in full, beside an adapter.",
            fix="Add projections to target_modules, or load with full_finetuning=True to train all weights.",
        )
    try:
        return LoraConfig(
            task_type=TaskType.SEQ_CLS if is_classifier else TaskType.CAUSAL_LM,
            target_modules=targets.modules,
            target_parameters=parameters or None,
            modules_to_save=list(dict.fromkeys(whole)) or None,
            layers_to_transform=layers,
            **settings,
        )
    except (ValueError, TypeError) as error:
        raise _refused(error, settings) from error


def _check_experts(settings: dict[str, Any]) -> None:
    """Refuse what PEFT cannot do for the fused weights of experts."""
    for name, default in (("lora_dropout", 0), ("use_dora", False), ("lora_bias", False)):
        if settings.get(name):
            raise AdapterError(
                got=f"{name}={settings[name]} was given for a mixture of experts.",
                need="PEFT cannot apply it to fused expert weights, so it would act on a part of the model.",
                fix=f"Write {name}={default}, or leave gate_proj, up_proj and down_proj out of target_modules.",
            )


def _check_fp8(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Refuse what PEFT computes from the base weight: of FP8 it would read the values without their scales."""
    from pantheraml.models.fp8 import Fp8Linear

    start = settings.get("init_lora_weights", True)
    own_start = isinstance(start, str) and start not in ("gaussian", "orthogonal")
    given = (
        "use_dora=True" if settings.get("use_dora") else f"init_lora_weights={start!r}" if own_start else None
    )
    if given is not None and any(isinstance(layer, Fp8Linear) for layer in model.modules()):
        raise AdapterError(
            got=f"{given} was given for weights in FP8.",
            need="It is computed from the base weights, which PEFT reads in 16 or 32 bits.",
            fix="Load with load_in_16bit=True, or train plain LoRA.",
        )


def _settle_loftq(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Complete and check the LoftQ settings in place."""
    from importlib.util import find_spec

    from peft import LoftQConfig

    from pantheraml.devices.inventory import num_gpus

    loftq = settings.pop("loftq_config", None)
    start = settings.get("init_lora_weights", True)
    if start != "loftq":
        if loftq:
            raise ConfigError(
                got=f"loftq_config was given with init_lora_weights={start!r}.",
                need="It is read only by the LoftQ initialisation.",
                fix='Add init_lora_weights="loftq", or drop loftq_config.',
            )
        return
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            got='init_lora_weights="loftq" was given for quantised weights.',
            need="LoftQ chooses the quantised weights and the adapter together, so it begins with full ones.",
            fix="Load with load_in_16bit=True, or drop init_lora_weights.",
        )
    if num_gpus() == 0:
        raise HardwareError(
            got='init_lora_weights="loftq" was given, and this process sees no GPU.',
            need="PEFT computes the LoftQ start on a GPU.",
            fix='Use a machine with one, or another start such as init_lora_weights="pissa".',
        )
    if find_spec("scipy") is None:  # pragma: no cover - needs a GPU
        raise ConfigError(
            got='init_lora_weights="loftq" was given and scipy is not installed.',
            need="PEFT computes the LoftQ start with it.",
            fix="Run `pip install scipy`, or drop init_lora_weights.",
        )
    loftq = loftq or {"loftq_bits": 4}  # pragma: no cover - needs a GPU
    if isinstance(loftq, dict):  # pragma: no cover - needs a GPU
        loftq = LoftQConfig(**loftq)
    settings["loftq_config"] = loftq  # pragma: no cover - needs a GPU


def _check_numbers(settings: dict[str, Any]) -> None:
    rank, dropout, bias = (
        settings.get("r", 8),
        settings.get("lora_dropout", 0.0),
        settings.get("bias", "none"),
    )
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(
            got=f"r={rank!r} was given.",
            need="The LoRA rank is a whole number of 1 or more.",
            fix="Use r=16.",
        )
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(
            got=f"lora_dropout={dropout!r} was given.",
            need="It is the share of values that is dropped, a number of 0 or more and less than 1.",
            fix="Use lora_dropout=0.",
        )
    if bias not in ("none", "all", "lora_only"):
        raise ConfigError(
            got=f"bias={bias!r} was given.",
            need="It is 'none', 'all' or 'lora_only'.",
            fix=did_you_mean(str(bias), ("none", "all", "lora_only")) or 'Use bias="none".',
        )


def attach_adapter(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """Wrap ``model`` with a fresh adapter whose random start depends on ``seed`` alone.

    The process's own random state is left as it was.

    Raises:
        AdapterError: PEFT refuses the combination.
    """
    import torch
    from peft import get_peft_model

    from pantheraml.models.sharding import place_adapter
    from pantheraml.models.state import patches_of
    from pantheraml.models.tensor_plan import share_factors

    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 for the older of two names of one property.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, KeyError, ImportError) as error:
        raise _refused(error, vars(config)) from error
    place_adapter(adapted)
    share_factors(adapted, patches_of(model))
    return adapted


def _refused(error: Exception, settings: dict[str, Any]) -> AdapterError:
    """PEFT's own refusal, with the settings it is most often about."""
    names = (
        "r",
        "init_lora_weights",
        "use_dora",
        "use_rslora",
        "bias",
        "layers_to_transform",
        "layers_pattern",
    )
    given = [f"{name}={settings[name]!r}" for name in names if settings.get(name) not in (None, False)]
    return AdapterError(
        got=f"PEFT refuses these settings: {first_line(error)}.",
        need=f"They have to fit together and fit the model; given were {', '.join(given)}.",
        fix="Change the one that PEFT names, or leave it out for plain LoRA.",
    )


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put adapter layers into ``model``, also when ``model`` is the base inside a PEFT model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; packed 4-bit weights count as the values they hold, layers that are cut as whole."""
    from pantheraml.models.sharded_linear import ShardedLinear

    trainable = 0
    total = sum(module.count_elsewhere() for module in model.modules() if isinstance(module, ShardedLinear))
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
