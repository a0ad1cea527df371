"""The probe of a plan on a GPU: what it measures is near what was estimated."""

from __future__ import annotations

import pytest
import torch

from pantheraml.devices.known_gpus import read_gpus
from pantheraml.devices.plan import PlanRequest, choose_plan
from pantheraml.models.loading import load_config
from pantheraml.models.optimal_config import parts_of
from pantheraml.training.probe import probe
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZES = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8,
    max_position_embeddings=8192,
)  # fmt: skip


@pytest.mark.parametrize("recompute", [True, False])
def test_measured_and_estimated(tmp_path, recompute):
    tiny.save_checkpoint(tmp_path, "llama", **SIZES)
    parts = parts_of(load_config(tmp_path), "lora")
    request = PlanRequest(parts, read_gpus("H200"), 8192, rows=1, recompute=recompute)
    found = probe(str(tmp_path), "lora", 16, request, choose_plan(request).plan)
    assert found.recomputing == (4 if recompute else 0)
    assert found.ratio == pytest.approx(1, abs=0.05)
