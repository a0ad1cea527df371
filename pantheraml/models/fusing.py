"""Put the fused parts into a model, and say what was left as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.log import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pantheraml.models.families import ModelFamily
    from pantheraml.models.patching import PatchSet


def apply_fused_parts(model: PreTrainedModel, family: ModelFamily | None, patches: PatchSet) -> None:
    """Swap in every fused part that knows ``family`` and runs on the model's device.

    Args:
        model: the base model, on its device.
        family: its architecture, or None: nothing is swapped, and the log says so.
        patches: the model's ledger.
    """
    if family is None:
        reason = f"no family describes {model.config.model_type!r}"
        patches.skip("", reason)
        say(f"fused parts are skipped: {reason}; the model trains as transformers computes it.")
        return
