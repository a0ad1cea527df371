"""How many positions a model knows, and stretching rotary ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pantheraml.errors import ConfigError, did_you_mean
from pantheraml.log import warn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# transformers' kinds of scaling that make rows longer, and what each needs.
_KINDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "short_factor", "long_factor"),
}
# What belongs to the positions themselves and not to a kind of scaling.
_KEPT = ("rope_theta", "partial_rotary_factor")
_EXAMPLE = 'Write for example rope_scaling={"rope_type": "linear", "factor": 2.0}.'


def extend_positions(
    config: PretrainedConfig, max_seq_length: int, rope_scaling: dict[str, Any] | None
) -> None:
    """Apply ``rope_scaling`` to ``config`` and check that the model knows ``max_seq_length`` positions.

    Args:
        config: changed in place.
        max_seq_length: longest row to be trained, in tokens.
        rope_scaling: for example ``{"rope_type": "linear", "factor": 2.0}`` (``"type"`` is understood too). The
            factor counts from the positions that the model was first trained with; a scaling that the
            checkpoint already has is replaced.

    Raises:
        ConfigError: an unknown kind of scaling, or a model without rotary positions that is asked for more of them.
    """
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    rotary = getattr(text, "rope_parameters", None)
    if rope_scaling is not None:
        known = _scale(text, rotary, dict(rope_scaling))
        rotary = text.rope_parameters
    if known is None or max_seq_length <= known:
        return
    if not rotary:
        raise ConfigError(
            got=f"max_seq_length={max_seq_length} was asked of a model with {known} learned positions.",
            need="Learned position embeddings have no row beyond their last one.",
            fix=f"Use max_seq_length={known} or less.",
        )
    factor = -(-max_seq_length // _first_positions(text, rotary))
    warn(
        f"max_seq_length={max_seq_length} is more than the {known} positions this model was made for; positions "
        "beyond them are used as they are. To stretch the trained ones instead, pass "
        f'rope_scaling={{"rope_type": "linear", "factor": {float(factor)}}} (or "yarn").'
    )


def _scale(text: Any, rotary: Any, scaling: dict[str, Any]) -> int:
    """Write ``scaling`` into ``text``, the configuration of the language model; how many positions it then knows."""
    written = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", written or "linear")
    if kind not in _KINDS:
        raise ConfigError(
            got=f"rope_scaling has rope_type={kind!r}.",
            need=f"It is one of {', '.join(map(repr, _KINDS))}. {did_you_mean(str(kind), _KINDS)}",
            fix=_EXAMPLE,
        )
    if not isinstance(rotary, dict) or any(isinstance(value, dict) for value in rotary.values()):
        kinds = "several sets of rotary positions" if rotary else "no rotary positions"
        raise ConfigError(
            got=f"rope_scaling was given for a {text.model_type} model, which has {kinds}.",
            need="One set of rotary positions is stretched.",
            fix="Leave rope_scaling out.",
        )
    base = dict(rotary) if rotary.get("rope_type") == kind else {k: rotary[k] for k in _KEPT if k in rotary}
    missing = [name for name in _KINDS[kind] if name not in scaling and name not in base]
    if missing:
        raise ConfigError(
            got=f"rope_scaling of the kind {kind!r} lacks {' and '.join(missing)}.",
            need=f"This kind needs {', '.join(_KINDS[kind])}.",
            fix=_EXAMPLE,
        )
    factor = {**base, **scaling}["factor"]
    if not isinstance(factor, int | float) or factor < 1:
        raise ConfigError(
            got=f"rope_scaling has factor={factor!r}.",
            need="The factor says how many times longer rows become, at least 1.",
            fix=_EXAMPLE,
        )
    first = _first_positions(text, rotary)
    if kind not in ("linear", "dynamic"):
        base["original_max_position_embeddings"] = first
    text.rope_parameters = {**base, **scaling, "factor": float(factor)}
    stretched = int(first * factor)
    # The dynamic kind begins to stretch beyond max_position_embeddings, which it takes for the first ones.
    text.max_position_embeddings = first if kind == "dynamic" else stretched
    return stretched


def _first_positions(text: Any, rotary: dict[str, Any]) -> int:
    """Positions before any stretching that the checkpoint came with."""
    original = rotary.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    if original is not None:
        return int(original)
    factor = rotary.get("factor", 1.0) if rotary.get("rope_type") == "linear" else 1.0
    return int(text.max_position_embeddings / factor)
