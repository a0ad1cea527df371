"""One buffer for a stream, lent again and again."""

from __future__ import annotations

import torch

from pantheraml.kernels import workspace
from pantheraml.kernels.utils import clear_gpu_cache
from pantheraml.kernels.workspace import borrow

CPU = torch.device("cpu")


def test_one_buffer_grows_and_can_be_given_back():
    clear_gpu_cache()
    small = borrow((8, 64), torch.float32, CPU)
    assert small.is_contiguous() and small.data_ptr() == borrow((4, 2), torch.bfloat16, CPU).data_ptr()
    assert borrow((16, 64), torch.float32, CPU).shape == (16, 64)
    (buffer,) = workspace._buffers.values()
    assert buffer.numel() == 16 * 64 * 4
    assert borrow((8, 64), torch.float32, CPU).data_ptr() == buffer.data_ptr()
    clear_gpu_cache()
    assert not workspace._buffers
