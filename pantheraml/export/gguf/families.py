"""What llama.cpp computes for each family, and so what a configuration must say to be written.

llama.cpp has one graph for each architecture, in which much of what transformers has as settings is fixed. A model
that it would load and compute otherwise is refused before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pantheraml.errors import NotYetError
from pantheraml.log import warn


@dataclass(frozen=True)
class GgufFamily:
    """One family as llama.cpp has it.

    Attributes:
        architecture: ``general.architecture`` of the file.
        pairs_neighbours: RoPE turns values 2i and 2i + 1 of a head, not i and i + head_dim / 2.
        norm_offset: what the file adds to the weights of norms.
        activation: of the MLP, in transformers' words.
        full_every: one layer of so many sees all tokens, the last of them, and the others a window; 0: all layers
            see all tokens.
        wide_layers: number of layers of the one size whose scores are scaled by hidden_size / heads.
        alternates_experts: gate and up of experts alternate, and their weights are (in, out).
    """

    architecture: str
    pairs_neighbours: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    full_every: int = 0
    wide_layers: int = 0
    alternates_experts: bool = False


_GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": GgufFamily("llama", pairs_neighbours=True),
    "mistral": GgufFamily("llama", pairs_neighbours=True),
    "mixtral": GgufFamily("llama", pairs_neighbours=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "qwen3_moe": GgufFamily("qwen3moe"),
    "gemma2": GgufFamily("gemma2", norm_offset=1.0, activation=_GELU, full_every=2, wide_layers=46),
    "gemma3_text": GgufFamily("gemma3", norm_offset=1.0, activation=_GELU, full_every=6, wide_layers=62),
    "phi3": GgufFamily("phi3"),
    "gpt_oss": GgufFamily("gpt-oss", full_every=2, alternates_experts=True),
}


def find_gguf_family(config: Any) -> GgufFamily:
    """The family of a configuration that llama.cpp computes as transformers does.

    Args:
        config: transformers' configuration of the model.

    Raises:
        NotYetError: another architecture, or a setting that llama.cpp's graph does not have.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NotYetError(
            got=f"The model's architecture is {config.model_type}.",
            need=f"GGUF files are written of {', '.join(FAMILIES)}.",
            fix="Use save_pretrained_merged(FOLDER, tokenizer) and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py.",
        )
    for problem in (
        _activation(config, family),
        _windows(config, family),
        _score_scale(config, family),
        _experts(config),
    ):
        if problem:
            raise NotYetError(
                got=f"The model's configuration has {problem}.",
                need=f"llama.cpp's {family.architecture} models have no such thing, and would compute something else.",
                fix="Use save_pretrained_merged, which transformers and vLLM load.",
            )
    if family.full_every == 0 and _window(config) is not None:
        warn(
            f"The model sees the last {_window(config)} tokens only; llama.cpp's {family.architecture} models have no "
            "window and see longer texts whole."
        )
    return family


def _activation(config: Any, family: GgufFamily) -> str | None:
    found = getattr(config, "hidden_activation", None) or config.hidden_act
    return None if found == family.activation else f"the activation {found}"


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    return window if window and window < config.max_position_embeddings else None


def _windows(config: Any, family: GgufFamily) -> str | None:
    if not family.full_every:
        return None
    expected = [
        "sliding_attention" if (layer + 1) % family.full_every else "full_attention"
        for layer in range(config.num_hidden_layers)
    ]
    return None if list(config.layer_types) == expected else f"the layer_types {config.layer_types}"


def _score_scale(config: Any, family: GgufFamily) -> str | None:
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is None:
        return None
    if config.num_hidden_layers == family.wide_layers:
        expected = config.hidden_size // config.num_attention_heads
    else:
        expected = config.head_dim
    return None if scale == expected else f"query_pre_attn_scalar={scale} instead of {expected}"


def _experts(config: Any) -> str | None:
    if config.model_type != "qwen3_moe":
        return None
    if not config.norm_topk_prob:
        return "norm_topk_prob=False"
    dense = bool(config.mlp_only_layers) or config.decoder_sparse_step != 1
    return "layers without experts" if dense else None
