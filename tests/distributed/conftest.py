"""What tests of ranks have in common."""

from __future__ import annotations

import pytest

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed import process_group


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    """What a test says of the run ends with it."""
    monkeypatch.setattr(process_group, "_settings", MultiGPUConfig())
