"""The model families that fused parts know; every other architecture trains without them."""

from __future__ import annotations

from typing import ClassVar, Protocol

from pantheraml.models.families.family import Experts, ModelFamily, NormKind
from pantheraml.models.families.gemma2 import GEMMA2
from pantheraml.models.families.gemma3 import GEMMA3, GEMMA3_TEXT
from pantheraml.models.families.gpt_oss import GPT_OSS
from pantheraml.models.families.llama import LLAMA
from pantheraml.models.families.mistral import MISTRAL
from pantheraml.models.families.mixtral import MIXTRAL
from pantheraml.models.families.phi3 import PHI3
from pantheraml.models.families.qwen2 import QWEN2
from pantheraml.models.families.qwen3 import QWEN3
from pantheraml.models.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "Experts", "ModelFamily", "NormKind", "find_family"]

FAMILIES: tuple[ModelFamily, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3_TEXT,
    GEMMA3,
    PHI3,
    MIXTRAL,
    QWEN3_MOE,
    GPT_OSS,
)
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


class HasModelType(Protocol):
    """A config of transformers, as far as it matters here."""

    model_type: ClassVar[str]


def find_family(config: HasModelType) -> ModelFamily | None:
    """The family of a model by its config's ``model_type``; None when it is not a known one."""
    return _BY_TYPE.get(config.model_type)
