"""How the work of a run is laid out over GPUs: which ranks have a copy, which a share of what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pantheraml.errors import ConfigError

Spread = Literal["none", "ddp", "fsdp", "deepspeed", "tensor", "pipeline"]
SPREADS: tuple[Spread, ...] = get_args(Spread)


@dataclass(frozen=True)
class Layout:
    """A strategy with its degrees; their product is the number of GPUs.

    Attributes:
        strategy: as ``MultiGPUConfig`` names it.
        data: groups of GPUs with rows of their own.
        tensor: GPUs that share every layer.
        pipeline: GPUs that have layers of their own.
        shard: of ``data``, over how many ranks states are sharded (FSDP2, ZeRO); less than ``data`` is HSDP.
        shard_frozen: whether frozen weights are, too.
        zero_stage: of DeepSpeed: 1 shards optimizer states, 2 gradients, 3 weights.
        offload: whether what is sharded lies in host memory: with FSDP2 weights, gradients and optimizer states, with
            DeepSpeed masters and moments, and from stage 2 on gradients.

    Raises:
        ConfigError: degrees that cannot be.
    """

    strategy: Spread
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    shard: int = 1
    shard_frozen: bool = False
    zero_stage: int = 3
    offload: bool = False

    def __post_init__(self) -> None:
        degrees = {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline, "shard": self.shard}
        wrong = [f"{name}={value}" for name, value in degrees.items() if value < 1]
        if self.data % max(1, self.shard):
            wrong.append(f"shard={self.shard} of data={self.data}")
        if wrong:
            raise ConfigError(
                got=f"A layout has {', '.join(wrong)}.",
                need="Degrees are whole numbers of 1 or more, and shard divides data.",
                fix="Give degrees whose product is the number of GPUs.",
            )

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.data * self.tensor * self.pipeline

    @property
    def is_sharded(self) -> bool:
        """Whether weights are gathered when they are needed: FSDP2 and ZeRO-3."""
        return self.strategy == "fsdp" or (self.strategy == "deepspeed" and self.zero_stage == 3)

    @property
    def groups(self) -> int:
        """Communicators that a GPU belongs to: one for each degree above 1."""
        return sum(degree > 1 for degree in (self.data, self.tensor, self.pipeline)) + (
            1 < self.shard < self.data
        )

    def describe(self) -> str:
        """``fsdp over 8, frozen weights sharded``."""
        words = {
            "none": "one GPU",
            "ddp": f"ddp, a copy on each of {self.data}",
            "fsdp": f"fsdp over {self.shard}",
            "deepspeed": f"deepspeed ZeRO-{self.zero_stage} over {self.shard}",
            "tensor": f"tensor parallel {self.tensor}",
            "pipeline": f"pipeline of {self.pipeline}",
        }[self.strategy]
        if self.strategy == "fsdp" and self.shard < self.data:
            words += f" x {self.data // self.shard} copies"
        if self.strategy in ("tensor", "pipeline") and self.data > 1:
            words += f" x data {self.data}"
        if self.strategy == "pipeline" and self.tensor > 1:
            words += f" x tensor {self.tensor}"
        if self.strategy == "fsdp":
            words += f", frozen weights {'sharded' if self.shard_frozen else 'replicated'}"
        if self.offload:
            words += ", shards in host memory" if self.strategy == "fsdp" else ", optimizer in host memory"
        return words
