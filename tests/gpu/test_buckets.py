"""NCCL and the memory of DDP's buckets."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pantheraml.distributed.data_parallel import average_buckets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def group():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_buckets_are_laid_out_anew_where_the_first_ones_were():
    """NCCL keeps a bucket until somebody has waited for its work: gradients were there twice in the second step."""
    layers = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8))).cuda()
    model = DistributedDataParallel(layers, device_ids=[0], gradient_as_bucket_view=True, bucket_cap_mb=25)
    average_buckets(model)
    rows = torch.ones(8, 4096, device="cuda")
    model(rows).sum().backward()
    model.zero_grad()
    there, gradients = torch.cuda.memory_allocated(), sum(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    model(rows)
    assert torch.cuda.max_memory_allocated() - there < gradients / 8
