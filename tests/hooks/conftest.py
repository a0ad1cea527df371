"""What tests of hooks have in common."""

from __future__ import annotations

import pytest

import pantheraml


@pytest.fixture(autouse=True)
def disabled():
    """What a test enables ends with it."""
    yield
    pantheraml.disable_grpo_support()
    pantheraml.disable_multi_gpu()
