"""Load weights straight to their device and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.errors import ConfigError, ModelLoadError, did_you_mean
from pantheraml.log import warn
from pantheraml.models.precision import Precision

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# The new layer of transformers' sequence classifiers.
_HEADS = ("score.weight", "classifier.weight")


@dataclass(frozen=True)
class LoadOptions:
    """Everything about a load besides where the files are.

    Attributes:
        device: where the weights go.
        precision: how they are held.
        attn_implementation: transformers' name of the attention, or None for its choice.
        num_labels: build a sequence classifier with that many labels instead of a language model.
        trust_remote_code: run the folder's own Python code.
    """

    device: torch.device
    precision: Precision
    attn_implementation: str | None = None
    num_labels: int | None = None
    trust_remote_code: bool = False


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ModelLoadError: an architecture this transformers does not know, or a damaged file.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        import transformers

        raise ModelLoadError(
            got=f"The configuration in '{folder}' cannot be used: {str(error).splitlines()[0]}",
            need=f"transformers {transformers.__version__} must know the architecture.",
            fix="Update transformers, or pass trust_remote_code=True if the folder brings code that you trust.",
        ) from error


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


def extend_positions(
    config: PretrainedConfig, max_seq_length: int, rope_scaling: dict[str, Any] | None
) -> None:
    """Apply ``rope_scaling`` to ``config`` and check that the model knows ``max_seq_length`` positions.

    Args:
        config: changed in place.
        max_seq_length: longest row to be trained, in tokens.
        rope_scaling: for example ``{"rope_type": "linear", "factor": 2.0}`` (``"type"`` is understood too).

    Raises:
        ConfigError: an unknown kind of scaling, or a model without rotary positions that is asked for more of them.
    """
    text = config.get_text_config()
    trained = getattr(text, "max_position_embeddings", None)
    current = getattr(text, "rope_parameters", None)
    if rope_scaling is not None:
        trained = _scale_rope(text, current, trained, dict(rope_scaling))
    if trained is None or max_seq_length <= trained:
        return
    if not current:
        raise ConfigError(
            got=f"max_seq_length={max_seq_length} was asked of a model with {trained} learned positions.",
            need="Learned position embeddings have no row beyond their last one.",
            fix=f"Use max_seq_length={trained} or less.",
        )
    factor = -(-max_seq_length // trained)
    warn(
        f"max_seq_length={max_seq_length} is more than the {trained} positions this model was made for; positions "
        "beyond them are used as they are. To stretch the trained ones instead, pass "
        f'rope_scaling={{"rope_type": "linear", "factor": {float(factor)}}} (or "yarn").'
    )


def _scale_rope(text: Any, current: Any, trained: int | None, scaling: dict[str, Any]) -> int | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "linear")
    known = ["default", *ROPE_INIT_FUNCTIONS]
    if kind not in known:
        raise ConfigError(
            got=f"rope_scaling has rope_type={kind!r}.",
            need=f"transformers knows {', '.join(known)}. {did_you_mean(str(kind), known)}",
            fix='Write for example rope_scaling={"rope_type": "linear", "factor": 2.0}.',
        )
    if not isinstance(current, dict) or any(isinstance(value, dict) for value in current.values()):
        raise ConfigError(
            got=f"rope_scaling was given for a {text.model_type} model.",
            need="Only models with one set of rotary positions can be stretched this way.",
            fix="Leave rope_scaling out.",
        )
    factor = scaling.get("factor", 1.0)
    if not isinstance(factor, int | float) or factor < 1:
        raise ConfigError(
            got=f"rope_scaling has factor={factor!r}.",
            need="The factor says how many times longer rows become, at least 1.",
            fix='Write for example rope_scaling={"rope_type": "linear", "factor": 2.0}.',
        )
    text.rope_parameters = {
        "original_max_position_embeddings": trained,
        **current,
        **scaling,
        "factor": float(factor),
    }
    if trained is not None:
        text.max_position_embeddings = int(trained * factor)
        return text.max_position_embeddings
    return None


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
        "device_map": {"": str(options.device)},
        "use_safetensors": True,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.attn_implementation is not None:
        kwargs["attn_implementation"] = options.attn_implementation
    quantization = None if hasattr(config, "quantization_config") else options.precision.quantization_config()
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    kind = AutoModelForCausalLM
    if options.num_labels is not None:
        kind = AutoModelForSequenceClassification
        # Beside a config, an argument of that name would reach the model's own class.
        config.num_labels = options.num_labels
    try:
        loaded: Any = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
        model, report = loaded
    except (ValueError, RuntimeError, OSError, KeyError, ImportError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ModelLoadError(
            got=f"The weights in '{folder}' could not be loaded as {config.model_type}: {str(error).splitlines()[0]}",
            need="Weights and config.json must belong together and fit this version of transformers.",
            fix="Check that the folder was not mixed from two models; update transformers for a newer architecture.",
        ) from error
    new_head = options.num_labels is not None and _stored_num_labels(config, None) is None
    _check_report(folder, report, new_head=new_head)
    return model


def _check_report(folder: Path, report: dict[str, Any], *, new_head: bool) -> None:
    """Refuse weights that were silently made up: names the checkpoint lacks, or shapes that differ."""
    missing = sorted(report.get("missing_keys", ()))
    if new_head:  # a language model's checkpoint has no classification head; it starts random
        missing = [key for key in missing if not key.startswith(("score.", "classifier."))]
    mismatched = [
        str(entry[0] if isinstance(entry, tuple | list) else entry)
        for entry in report.get("mismatched_keys", ())
    ]
    bad = [*missing, *mismatched]
    if bad:
        raise ModelLoadError(
            got=f"'{folder}' lacks {len(missing)} weights of its model and {len(mismatched)} have another shape"
            f" ({', '.join(bad[:4])}{', …' if len(bad) > 4 else ''}).",
            need="A model with made-up weights must not be trained by mistake.",
            fix="Check that config.json and the safetensors belong together, or copy the model again.",
        )
