"""What ``enable_multi_gpu`` was asked for. It loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from pantheraml.config.multi_gpu import Backend, MultiGPUConfig, is_several
from pantheraml.errors import ConfigError, did_you_mean

# Fields of MultiGPUConfig that enable_multi_gpu has under a name of its own.
_RENAMED = {
    "num_processes": "num_gpus",
    "backend": "ddp_backend",
    "use_gradient_checkpointing": "enable_gradient_checkpointing",
}


@dataclass(frozen=True)
class HookSettings:
    """The arguments of ``enable_multi_gpu``, which says what they mean.

    Attributes:
        more: fields of ``MultiGPUConfig`` that have no name of their own here.

    Raises:
        ConfigError: an unknown argument, a value that cannot be, or two that contradict each other.
    """

    num_gpus: int | None = None
    batch_size_per_gpu: int | None = None
    ddp_backend: Backend = "nccl"
    enable_memory_optimization: bool = True
    enable_gradient_checkpointing: bool | Literal["auto"] | None = None
    find_unused_parameters: bool = False
    debug: bool = False
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        _check_names(self.more)
        for name in ("num_gpus", "batch_size_per_gpu"):
            value = cast("object", getattr(self, name))
            is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if value is not None and not is_count:
                raise _wrong(name, value, "a whole number of 1 or more")
        for name in ("enable_memory_optimization", "find_unused_parameters", "debug"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        recompute = self.enable_gradient_checkpointing
        if not (recompute is None or isinstance(recompute, bool) or recompute == "auto"):
            raise _wrong("enable_gradient_checkpointing", recompute, "True, False or 'auto'")
        _ = self.multi_gpu  # says what is wrong with the others

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> HookSettings:
        """From the arguments as they are written."""
        own = {name: value for name, value in arguments.items() if name in OWN}
        return cls(**own, more={name: value for name, value in arguments.items() if name not in OWN})

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``enable_multi_gpu(**arguments)`` asks for the same with."""
        return {**{name: getattr(self, name) for name in OWN}, **self.more}

    @property
    def recomputes(self) -> bool | None:
        """Whether a model that is not ours recomputes its activations; None: as the script says."""
        recompute = self.enable_gradient_checkpointing
        return None if recompute is None else bool(recompute)

    @property
    def multi_gpu(self) -> MultiGPUConfig:
        """The settings of the run."""
        recompute = self.enable_gradient_checkpointing
        return MultiGPUConfig(
            backend=self.ddp_backend,
            num_processes=self._ranks(),
            use_gradient_checkpointing="auto" if recompute is None else recompute,
            find_unused_parameters=self.find_unused_parameters,
            **self.more,
        )

    def _ranks(self) -> int | None:
        """Ranks of this machine; a rank that is a pipeline has several GPUs."""
        degree = self.more.get("pipeline_parallel", False)
        if self.num_gpus is None or not is_several(degree):
            return self.num_gpus
        each = self.num_gpus if degree is True else degree
        if self.num_gpus % each:
            raise ConfigError(
                got=f"enable_multi_gpu(num_gpus={self.num_gpus}, pipeline_parallel={degree}) was called.",
                need="Each rank is a pipeline over GPUs of its own, so the degree divides the GPUs.",
                fix=f"Write num_gpus={max(1, self.num_gpus // each) * each}, or another degree.",
            )
        return self.num_gpus // each


# Arguments with a name of their own, in the order they are shown.
OWN = tuple(one.name for one in fields(HookSettings) if one.name != "more")
_PASSED_ON = tuple(
    one.name for one in fields(MultiGPUConfig) if one.name not in _RENAMED and one.name not in OWN
)


def _check_names(more: Mapping[str, Any]) -> None:
    for name in more:
        if name in _RENAMED:
            raise ConfigError(
                got=f"enable_multi_gpu({name}=...) was called.",
                need=f"It is called {_RENAMED[name]} here.",
                fix=f"Write {_RENAMED[name]}=....",
            )
        if name not in _PASSED_ON:
            raise ConfigError(
                got=f"enable_multi_gpu({name}=...) was called.",
                need=f"It takes {', '.join(OWN)}; of MultiGPUConfig: {', '.join(_PASSED_ON)}.",
                fix=did_you_mean(name, (*OWN, *_PASSED_ON)) or "Remove it.",
            )


def _wrong(name: str, value: object, what: str) -> ConfigError:
    return ConfigError(
        got=f"enable_multi_gpu({name}={value!r}) was called.",
        need=f"It is {what}.",
        fix="Leave it out for the default.",
    )
