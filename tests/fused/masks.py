"""The masks of fused layers, and stock layers of PEFT that apply the very same ones."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from pantheraml.kernels.keyed_dropout import kept_values
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer


class Masked(nn.Module):
    """Stands for PEFT's dropout: (B, S, K) times the mask of one seed."""

    def __init__(self, p: float, seed: int) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        kept = kept_values(torch.arange(flat.shape[0], device=x.device), flat.shape[1], self.p, self.seed)
        return x * kept.view(x.shape) / (1 - self.p)


class Recorder:
    """Sees what fused layers compute with; the latest share and seed of each adapter stay, by its base layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers = 0
        self.seeds: dict[int, tuple[float, int]] = {}
        original = FusedDecoderLayer._parts

        def read(layer, *args, **kwargs):
            parts = original(layer, *args, **kwargs)
            if parts is not None:
                self.layers += 1
                mlp = [] if parts.mlp is None else [parts.mlp.gate_up, parts.mlp.down]
                for stack in [parts.input.qkv, parts.middle.o, *mlp]:
                    for index, seed in stack.inputs.seeds.items():
                        projection = stack.projections[index]
                        self.seeds[id(projection.linear)] = projection.dropout, seed
            return parts

        monkeypatch.setattr(FusedDecoderLayer, "_parts", read)

    def masks(self, model: nn.Module) -> dict[str, tuple[float, int]]:
        """Share and seed of each adapted layer of ``model``, by its name."""
        adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        return {
            name: self.seeds[id(m.get_base_layer())]
            for name, m in adapted.items()
            if id(m.get_base_layer()) in self.seeds
        }


def apply_masks(model: nn.Module, masks: dict[str, tuple[float, int]]) -> nn.Module:
    """``model`` with the dropout of every adapter replaced; all of them are to be named."""
    dropping = {n for n, m in model.named_modules() if isinstance(m, LoraLayer) and len(m.lora_dropout)}
    assert dropping == masks.keys() and masks
    for name, (p, seed) in masks.items():
        model.get_submodule(name).lora_dropout["default"] = Masked(p, seed)
    return model
