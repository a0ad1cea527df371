"""Llama 1 to 3, and everything that ships as ``model_type: llama``."""

from __future__ import annotations

from pantheraml.models.families.family import ModelFamily, NormKind

LLAMA = ModelFamily(name="llama", model_types=("llama",), norm=NormKind(("LlamaRMSNorm",)))
