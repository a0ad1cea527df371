"""The kernel that stacks rows under Triton's interpreter; run by ``test_triton_without_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from pantheraml.kernels import stack_rows as module
from tests.kernels.test_stack_rows import CASES, test_rows_arrive_and_nothing_else_changes  # noqa: F401


@pytest.mark.parametrize(("rows", "cols", "beside"), CASES)
def test_even_ones_go_through_the_kernel(rows, cols, beside):
    sources = [torch.zeros(n, cols, dtype=torch.bfloat16) for n in rows]
    wide = torch.zeros(sum(rows), cols + beside, dtype=torch.bfloat16)
    is_even = cols % 8 == 0 and beside % 8 == 0 and len(rows) <= 3
    assert module._is_even(sources, wide[:, :cols]) == is_even
