"""What tests of fused layers share."""

from __future__ import annotations

import pytest

from pantheraml.models.fused.functions import AttentionInput


@pytest.fixture
def calls(monkeypatch):
    """How often the fused path ran."""
    count = []
    original = AttentionInput.apply
    monkeypatch.setattr(AttentionInput, "apply", lambda *a: count.append(1) or original(*a))
    return count
