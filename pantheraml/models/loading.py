"""Load weights straight to their device and dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pantheraml.errors import ConfigError, ModelLoadError, PantheraMLError, did_you_mean, first_line
from pantheraml.models.precision import Precision
from pantheraml.models.source import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from pantheraml.models.quantised_shares import Cut
    from pantheraml.models.tensor_group import TensorGroup
    from pantheraml.models.tensor_plan import Sharding


# The new layer of transformers' sequence classifiers.
_HEADS = ("score.weight", "classifier.weight")


@dataclass(frozen=True)
class LoadOptions:
    """Everything about a load besides where the files are.

    Attributes:
        device_map: where the weights go, as transformers takes it.
        precision: how they are held.
        attn_implementation: transformers' name of the attention, or None for its choice.
        num_labels: build a sequence classifier with that many labels instead of a language model.
        trust_remote_code: run the folder's own Python code.
        max_memory: bytes of each GPU, where transformers is to place the layers by itself.
        tensor_group: ranks that compute each layer together, if this one is one of them.
        cut: what this rank keeps of weights that are quantised here, if ranks share them out.
    """

    device_map: str | dict[str, Any]
    precision: Precision
    attn_implementation: str | None = None
    num_labels: int | None = None
    trust_remote_code: bool = False
    max_memory: Mapping[int, int] | None = None
    tensor_group: TensorGroup | None = None
    cut: Cut | None = None


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ModelLoadError: an architecture this transformers does not know, or a damaged file.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise _explain_config(folder, error) from error


def _explain_config(folder: Path, error: Exception) -> ModelLoadError:
    import transformers
    from transformers import CONFIG_MAPPING

    kind = read_json(folder / "config.json").get("model_type")
    if not kind:
        return ModelLoadError(
            got=f"'{folder / 'config.json'}' has no model_type.",
            need="It says which architecture the weights belong to.",
            fix="Copy config.json of the original model.",
        )
    if kind not in CONFIG_MAPPING:
        return ModelLoadError(
            got=f"'{folder}' holds a model of the type {kind!r}.",
            need=f"transformers {transformers.__version__} knows no such architecture. "
            f"{did_you_mean(str(kind), CONFIG_MAPPING.keys())}",
            fix="Update transformers for a newer model, or pass trust_remote_code=True if the folder brings code "
            "that you trust.",
        )
    return ModelLoadError(
        got=f"'{folder / 'config.json'}' cannot be used: {first_line(error.__cause__ or error)}.",
        need=f"transformers {transformers.__version__} must understand the settings of a {kind} model.",
        fix="Copy config.json of the original model, or update transformers.",
    )


def choose_num_labels(wanted: int | None, config: PretrainedConfig, adapter: Path | None) -> int | None:
    """How many labels the classifier to build has, or None for a language model.

    Args:
        wanted: what the user asked for, or None for what was saved.
        config: the base model's configuration.
        adapter: folder of a saved adapter; the head of a classifier comes with it, the base model has none.

    Raises:
        ConfigError: a classifier with another number of labels was saved.
    """
    stored = _stored_num_labels(config, adapter)
    if wanted is not None and stored not in (None, wanted):
        raise ConfigError(
            got=f"num_labels={wanted} was given for a classifier that was saved with {stored}.",
            need="Its trained head has one row for each label.",
            fix="Leave num_labels out to load it as it is, or give the model it was trained from.",
        )
    return stored if wanted is None else wanted


def _stored_num_labels(config: PretrainedConfig, adapter: Path | None) -> int | None:
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return config.num_labels
    if adapter is None:
        return None
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        heads = [key for key in tensors.keys() if key.endswith(_HEADS)]  # noqa: SIM118 - not a dictionary
        return tensors.get_slice(heads[0]).get_shape()[0] if heads else None


def load_model(folder: Path, config: PretrainedConfig, options: LoadOptions) -> PreTrainedModel:
    """The model of ``folder`` on its device.

    transformers reads each tensor from the mapped file, casts or quantises it, and puts it in its place; no
    second copy of the weights is held.

    Raises:
        ModelLoadError: the architecture has no model of the kind asked for, or weights do not fit it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kwargs: dict[str, Any] = {
        "config": config,
        "dtype": options.precision.dtype,
        "device_map": options.device_map,
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,  # refused below, by name
        "trust_remote_code": options.trust_remote_code,
    }
    if isinstance(options.device_map, str):
        kwargs["max_memory"] = dict(options.max_memory or {}) or None
    if options.attn_implementation is not None:
        kwargs["attn_implementation"] = options.attn_implementation
    stored: dict[str, Any] | None = getattr(config, "quantization_config", None)
    quantisation = options.precision.quantization_config() if stored is None else None
    if stored is None:
        kwargs["quantization_config"] = _quantising(quantisation, options.cut)
    elif options.precision.storage == "4bit":  # the format is the checkpoint's, the computation ours
        compute = str(options.precision.dtype).removeprefix("torch.")
        config.quantization_config = {**stored, "bnb_4bit_compute_dtype": compute}
    kind = AutoModelForCausalLM
    if options.num_labels is not None:
        kind = AutoModelForSequenceClassification
        # Beside a config, an argument of that name would reach the model's own class.
        config.num_labels = options.num_labels
    sharding = _sharding(kind, config, options)
    if sharding is not None:
        kind = sharding.loading_class(_device_type(options.device_map))
    try:
        loaded: Any = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
        model, report = loaded
    except (ValueError, RuntimeError, OSError, KeyError, ImportError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # pragma: no cover - needs a GPU
            raise
        raise _explain_load(folder, config, options, error) from error
    new_head = options.num_labels is not None and _stored_num_labels(config, None) is None
    _check_report(folder, report, _odd_layers(model), new_head=new_head)
    if sharding is not None:
        sharding.settle(model)
    if options.cut is not None and quantisation is not None:
        from pantheraml.models.quantised_shares import settle

        settle(model, quantisation)
    if stored is not None:
        _cast_plain(model, options.precision.dtype)
    if options.precision.storage == "4bit":
        _keep_trainable(model)
    if options.precision.storage == "fp8":
        _settle_fp8(model)
    return model


def _quantising(config: Any, cut: Cut | None) -> Any:
    """How transformers is to quantise, of which the rank keeps its share where there are ranks."""
    if config is None or cut is None:
        return config
    from pantheraml.models.quantised_shares import cutting

    return cutting(config, cut)


def _sharding(kind: Any, config: PretrainedConfig, options: LoadOptions) -> Sharding | None:
    """How the model is cut between ranks, if it is."""
    from pantheraml.models.tensor_plan import plan_sharding

    if options.tensor_group is None:
        return None
    trust = options.trust_remote_code
    return plan_sharding(kind, config, options.precision, options.tensor_group, trust_remote_code=trust)


def _device_type(device_map: str | dict[str, Any]) -> str:
    """``"cuda"`` or ``"cpu"``, of a map to one device."""
    place = device_map if isinstance(device_map, str) else next(iter(device_map.values()))
    return str(place).partition(":")[0]


def _settle_fp8(model: PreTrainedModel) -> None:
    """Decide about turned weights; a model without a layer that FP8 takes is refused."""
    from pantheraml.models.fp8 import choose_turned

    if not choose_turned(model):
        raise ConfigError(
            got=f"load_in_fp8=True was given for a {type(model).__name__} without a linear layer to quantise.",
            need="Its linear layers must have sizes that are multiples of 16; fused experts stay in 16 bits.",
            fix="Use load_in_16bit=True or load_in_4bit=True.",
        )


def _keep_trainable(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs that have AVX512-BF16.

    It does so at the first forward in evaluation mode, for good, into a form whose product has no gradient: the
    layers below would then train on wrong gradients, silently.
    """
    for layer in cast("Iterable[Any]", model.modules()):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _cast_plain(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is not quantised of a stored quantised model; transformers leaves it as it was stored."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, weight in model.named_parameters():
        is_packed = getattr(weight, "quant_state", None) is not None or not weight.is_floating_point()
        if not is_packed and weight.dtype != dtype and kept.isdisjoint(name.split(".")):
            weight.data = weight.data.to(dtype)


def _explain_load(
    folder: Path, config: PretrainedConfig, options: LoadOptions, error: Exception
) -> PantheraMLError:
    if "Unrecognized configuration class" in str(error):
        kind = "language model" if options.num_labels is None else "sequence classifier"
        return ModelLoadError(
            got=f"'{folder}' holds a {config.model_type} model, which is no {kind} in transformers.",
            need="What is trained here are models that transformers loads by AutoModelForCausalLM, or with num_labels "
            "by AutoModelForSequenceClassification.",
            fix="Give the folder of a language model.",
        )
    attention = options.attn_implementation
    if attention is not None and re.search(
        "attn_implementation|attention implementation|flash", str(error), re.I
    ):
        return ConfigError(
            got=f"attn_implementation={attention!r} cannot be used here: {first_line(error).split('. ')[0]}.",
            need="'eager' and 'sdpa' need nothing; flash attention needs its package and a GPU.",
            fix="Leave attn_implementation out to let the model choose.",
        )
    return ModelLoadError(
        got=f"The weights in '{folder}' could not be loaded as {config.model_type}: {first_line(error)}.",
        need="Weights and config.json must belong together and fit this version of transformers.",
        fix="Check that the folder was not mixed from two models; update transformers for a newer architecture.",
    )


def _odd_layers(model: PreTrainedModel) -> list[str]:
    """Weights of linear layers with another shape than their layer's; transformers compares unquantised ones only."""
    from torch import nn

    from pantheraml.models.shares import whole_shape

    return [
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and tuple(getattr(getattr(layer.weight, "quant_state", None), "shape", whole_shape(layer.weight)))
        != (layer.out_features, layer.in_features)
    ]


def _check_report(folder: Path, report: dict[str, Any], odd: list[str], *, new_head: bool) -> None:
    """Refuse weights that were silently made up: names the checkpoint lacks, or shapes that differ."""
    missing = sorted(report["missing_keys"])
    if new_head:  # a language model's checkpoint has no classification head; it starts random
        missing = [key for key in missing if not key.startswith(("score.", "classifier."))]
    mismatched = sorted(
        {
            *odd,
            *(
                str(entry[0] if isinstance(entry, tuple | list) else entry)
                for entry in report["mismatched_keys"]
            ),
        }
    )
    asked = "config.json asks for"
    found = [f"'{folder}' lacks {_listed(missing)} that {asked}."] if missing else []
    found += [f"'{folder}' holds {_listed(mismatched)} of another shape than {asked}."] if mismatched else []
    if found:
        raise ModelLoadError(
            got=" ".join(found),
            need="They would start random, and a model with made-up weights must not be trained by mistake.",
            fix="Check that config.json and the safetensors belong together, or copy the model again.",
        )


def _listed(names: list[str]) -> str:
    """How many weights, and the names of the first."""
    count = "1 weight" if len(names) == 1 else f"{len(names)} weights"
    return f"{count} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
