"""A notebook that has used a GPU still starts ranks, whose tensors come back without it."""

from __future__ import annotations

import pytest
import torch

from pantheraml import notebook_launch

pytestmark = pytest.mark.gpu


def make():
    device = torch.device("cuda", torch.cuda.current_device())
    return torch.ones(3, device=device), str(device)


def test_after_cuda_was_used_here():
    torch.ones(1, device="cuda").item()
    ones, device = notebook_launch(make, num_processes=1)
    assert device == "cuda:0"
    assert ones.device.type == "cpu" and ones.sum() == 3
