"""What tests of fused layers share."""

from __future__ import annotations

import pytest

from pantheraml.kernels import keyed_dropout, launch
from pantheraml.models.fused.functions import AttentionInput


@pytest.fixture
def calls(monkeypatch):
    """How often the fused path ran."""
    count = []
    original = AttentionInput.apply
    monkeypatch.setattr(AttentionInput, "apply", lambda *a: count.append(1) or original(*a))
    return count


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """An interpreted program costs the same for one row as for many, and masks do not depend on it."""
    if launch._INTERPRETED:
        monkeypatch.setitem(keyed_dropout._BLOCKS, "BLOCK_M", 64)
