"""Every rank has rows of its own and a share of the weights, which are gathered layer by layer: torch's FSDP2.

Beside an adapter, frozen layers are shared out where a GPU does not hold them all, and are gathered only; the adapter
is as under DDP. What is trained in full is shared out with its gradients and moments.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, TrainingArguments

from pantheraml.config.combinations import refusal
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.devices.inventory import is_bfloat16_supported
from pantheraml.distributed.process_group import group_size, rank_device
from pantheraml.distributed.strategies.ddp import DDP
from pantheraml.errors import ConfigError
from pantheraml.models.sharding import Sharding, shard_model
from pantheraml.models.state import get_state


def build_mesh(config: MultiGPUConfig) -> DeviceMesh:
    """The ranks as (copies, ranks that share one), or (ranks,) where there is one copy.

    Raises:
        ConfigError: the ranks are not a whole number of copies.
    """
    ranks, kind = group_size(), rank_device().type
    size = config.shard_size or ranks
    if ranks % size:
        raise ConfigError(
            got=f"MultiGPUConfig(shard_size={size}) was given to {ranks} ranks.",
            need="Each copy of the weights is shared out between as many ranks.",
            fix=f"Write one of {', '.join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)}, or leave it out.",
        )
    if size == ranks:
        return init_device_mesh(kind, (ranks,), mesh_dim_names=("fsdp",))
    return init_device_mesh(kind, (ranks // size, size), mesh_dim_names=("copy", "fsdp"))


def sharding_of(config: MultiGPUConfig, *, trained: bool) -> Sharding:
    """How the ranks of the process group share out a model's weights.

    Args:
        config: of the run.
        trained: whether all weights are trained; they are gathered and computed in bfloat16 where the GPU has it.
    """
    device = rank_device()
    in_bf16 = trained and device.type == "cuda" and is_bfloat16_supported()
    dtype = torch.bfloat16 if in_bf16 else None
    return Sharding(build_mesh(config), device, trained, dtype, offload=bool(config.cpu_offload))


class FSDP(DDP):
    """Weights are shared out between ranks; an adapter is reduced as under DDP."""

    name = "fsdp"
    _sharding: Sharding | None = None

    def configure(self, accelerator: Any, args: TrainingArguments, model: nn.Module) -> None:
        """As DDP, for what is trained beside frozen weights.

        Raises:
            ConfigError: a precision that trained weights are not gathered in.
        """
        super().configure(accelerator, args, model)
        state = get_state(model)
        self._sharding = None if state is None else state.sharding
        trained = [p for p in model.parameters() if p.requires_grad]
        if self._sharding is None and len(trained) == len(list(model.parameters())):
            # All of a model that came from elsewhere.
            self._sharding = sharding_of(self.config, trained=True)
            shard_model(cast(PreTrainedModel, model), self._sharding)
        if self._sharding is not None and self._sharding.trained:
            _check_precision(args, self._sharding)

    def wrap(self, accelerator: Any, model: nn.Module) -> nn.Module:
        """Autocast around the model, and DDP around what is trained beside weights that are shared out."""
        if self._sharding is None or isinstance(model, DistributedDataParallel):
            return model
        prepared = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        if self._sharding.trained:
            prepared._is_accelerate_prepared = True  # accelerate has nothing to wrap
            return prepared
        shared_out = [name for name, one in model.named_parameters() if isinstance(one, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(prepared, shared_out)
        settings, device = accelerator.ddp_handler, self._sharding.device
        place = {"device_ids": [device.index]} if device.type == "cuda" else {}
        wrapped = DistributedDataParallel(prepared, **place, **settings.to_kwargs())
        settings.register_comm_hook(wrapped)
        return wrapped

    @property
    def talks_in_passes(self) -> bool:
        """Layers are gathered in every pass."""
        return self._sharding is not None

    def describe(self) -> str:
        """As the banner says it."""
        if self._sharding is None:
            return "FSDP2: frozen weights fit on each device and are copied there, trained ones are reduced as by DDP"
        what = "weights, gradients and optimizer" if self._sharding.trained else "frozen layers"
        kept = ", kept in host memory" if self._sharding.offload else ""
        copies = self._sharding.mesh.size() // self._sharding.ranks
        times = f", {copies} copies of {self._sharding.ranks} ranks each" if copies > 1 else ""
        return f"FSDP2: {what} are shared out{times}{kept}; each has rows of its own"


def _check_precision(args: TrainingArguments, sharding: Sharding) -> None:
    computes = sharding.compute_dtype or torch.float32
    asked = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    if asked != computes:
        words = [str(one).removeprefix("torch.") for one in (asked, computes)]
        raise refusal(
            "fsdp", "fp16", f"The arguments ask for {words[0]}, and the weights are gathered in {words[1]}."
        )
