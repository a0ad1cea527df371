"""DeepSpeed's ZeRO: ranks share out what one copy of is enough, by stage.

    0   nothing: every rank has all of it, gradients are averaged
    1   the optimizer's state
    2   gradients, too
    3   weights, too, which are gathered module by module

transformers and accelerate make the engine; here it is said with what settings. Those of ``accelerate launch`` and of
``args.deepspeed`` count where they are given. Of our own, trained weights stay in float32, and products are computed in
bf16 by autocast, as with any other strategy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from pantheraml.config.combinations import REFUSED, refusal
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.devices.zero import Zero
from pantheraml.distributed.process_group import group_size, is_first_of_group
from pantheraml.distributed.strategies.base import Strategy
from pantheraml.distributed.strategies.held_engine import (
    CutEngine,
    EngineReduction,
    HeldEngine,
    UnshardedEngine,
)
from pantheraml.distributed.strategies.held_reduction import Reduction
from pantheraml.distributed.strategies.released_engine import forget_module, release_engine
from pantheraml.distributed.strategies.zero_passes import ZeroReduction, zero_passes_of
from pantheraml.distributed.strategies.zero_settings import cuts_plainly, holds_gradients, sizes_for, zero_of
from pantheraml.errors import CheckpointError, ConfigError, HardwareError
from pantheraml.log import say_once
from pantheraml.models.fused import FusedDecoderLayer
from pantheraml.models.state import get_state
from pantheraml.models.zero3 import check_storage, whole_on_first

# Read by accelerate and transformers whenever they make a state; accelerate leaves it set.
_USED = "ACCELERATE_USE_DEEPSPEED"


class DeepSpeed(Strategy):
    """DeepSpeed's engine takes the backward, the clipping and the optimizer's step."""

    name = "deepspeed"
    takes_steps_itself = True

    def __init__(self, config: MultiGPUConfig) -> None:
        super().__init__(config)
        self._zero: dict[str, Any] = {"stage": config.zero_stage}
        self._was_used: str | None = None
        self._settings: dict[str, Any] = {}
        self._is_ours = self._holds = self._cuts = False
        self._has_trained = False

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return self._zero.get("stage", 0)

    @property
    def talks_in_passes(self) -> bool:
        """Where gradients are cut, or weights gathered, in every pass of all ranks."""
        return self.stage >= 2 and not self._holds

    @property
    def why_not_merged(self) -> str | None:
        """Where ranks wait for one another, each pass has to be one of all of them."""
        told = "ranks wait for one another in every pass, and would have different numbers of them"
        return told if self.talks_in_passes else None

    def check_begin(self) -> None:
        """Refuse a second training.

        Raises:
            ConfigError: an engine of this trainer has trained already.
        """
        if self._has_trained:
            raise ConfigError(
                got="train() was called again on a trainer of DeepSpeed.",
                need="Its engine is made for one training, and let go of after that.",
                fix="Make a new trainer for the same model, and call its train().",
            )

    def prepare(self, args: TrainingArguments) -> None:
        """Put DeepSpeed's settings into ``args``, and accelerate's state on it.

        Raises:
            HardwareError: DeepSpeed is not installed.
            ConfigError: settings that contradict those that DeepSpeed was started with, or that it cannot fulfil.
        """
        if find_spec("deepspeed") is None:
            raise HardwareError(
                got='strategy="deepspeed" was asked for, and DeepSpeed is not installed.',
                need="It is a package of its own.",
                fix='Run pip install "pantheraml[deepspeed]".',
            )
        if getattr(args, "on_non_finite", None) == "restore":
            got = 'on_non_finite="restore" and strategy="deepspeed" were given.'
            raise refusal("deepspeed", "on_non_finite=restore", got)
        self._was_used = os.environ.get(_USED)
        self._is_ours = not says_deepspeed(args)
        if self._is_ours:
            _give_settings(args, self.config)
        plugin: Any = args.deepspeed_plugin
        self._settings = plugin.hf_ds_config.config
        self._zero = self._settings["zero_optimization"]
        self._agree()
        if self.stage == 0 and args.fp16:
            raise refusal("deepspeed, zero_stage=0", "fp16", "fp16=True and zero_stage=0 were given.")
        if self.stage == 3:
            # Without these, transformers saves adapters without weights, and float32 adapters on bf16 weights fail.
            self._zero["stage3_gather_16bit_weights_on_model_save"] = True
            self._zero.setdefault("stage3_param_persistence_threshold", 0)
        _join_state(args)

    def _agree(self) -> None:
        """Refuse what ``MultiGPUConfig`` says otherwise than the settings that DeepSpeed was started with."""
        ours, theirs = self.config.zero_stage, self.stage
        if self.config.strategy == "deepspeed" and ours != theirs:
            raise ConfigError(
                got=f"MultiGPUConfig(zero_stage={ours}) was given to ranks that DeepSpeed was started on with stage "
                f"{theirs}.",
                need="A run has one stage.",
                fix=f"Write zero_stage={theirs}, or leave strategy out to take what the launcher says.",
            )
        if self.config.cpu_offload and not self._offloaded():
            raise ConfigError(
                got=f"MultiGPUConfig(cpu_offload={self.config.cpu_offload!r}) was given, and DeepSpeed was started "
                "without offloading.",
                need="What is offloaded is said in one place.",
                fix="Write offload_optimizer_device: cpu in the file of accelerate launch, or leave cpu_offload out.",
            )

    def _offloaded(self) -> list[str]:
        """What is kept in host memory."""
        parts = {"offload_optimizer": "optimizer", "offload_param": "weights"}
        return [
            word
            for name, word in parts.items()
            if (self._zero.get(name) or {}).get("device") in ("cpu", "nvme")
        ]

    def configure(self, accelerator: Any, args: TrainingArguments, model: nn.Module) -> None:
        """Look at what is to be sharded, and size what DeepSpeed allocates by it where nobody has said how.

        Raises:
            ConfigError: weights that ZeRO-3 cannot shard.
        """
        del accelerator, args
        if self._was_used is None:
            os.environ.pop(_USED, None)  # else every later trainer of this process would be DeepSpeed's, too
        if self._is_ours:
            self._zero.update(sizes_for(model))
        self._holds = holds_gradients(self._settings, model)
        self._cuts = not self._holds and cuts_plainly(self._settings)
        if not (self._holds or self._cuts):
            why = REFUSED["deepspeed, settings of its own", "out-of-memory repeats"].reason
            say_once(f"a step that runs out of memory ends the run: {why}")
        state = get_state(model)
        if self.stage < 3 or state is None:
            return
        check_storage(state.precision.storage, self.stage)
        is_fused = any(
            type(module).__module__.startswith("pantheraml.models.fused") for module in model.modules()
        )
        if is_fused:
            raise refusal(
                "deepspeed, zero_stage=3",
                "fused kernels",
                "ZeRO-3 was asked for a model that has fused layers.",
            )

    def wrap(self, accelerator: Any, model: nn.Module) -> nn.Module:
        """The engine sends weights around as bytes, for which each must lie in memory of its own."""
        del accelerator
        for module in model.modules():
            if isinstance(module, FusedDecoderLayer):
                module.reader.release()
        return model

    def zero(self, model: nn.Module) -> Zero | None:
        """By its settings."""
        return zero_of(self._settings, model, group_size())

    def prepared(self, accelerator: Any) -> None:
        """Let gradients wait for the end of a step, where they may."""
        wrapped = accelerator.deepspeed_engine_wrapped
        if wrapped is None:
            return
        if not hasattr(wrapped.engine.optimizer, "overflow"):  # a plain one of torch
            accelerator.deepspeed_engine_wrapped = UnshardedEngine(wrapped.engine)
        elif self._holds:
            accelerator.deepspeed_engine_wrapped = HeldEngine(wrapped.engine)
        elif self._cuts:
            accelerator.deepspeed_engine_wrapped = CutEngine(wrapped.engine)

    def reduction(self, accelerator: Any, model: nn.Module) -> Reduction | None:
        """When all passes are done, where gradients wait for that; else within each."""
        del model
        wrapped = accelerator.deepspeed_engine_wrapped
        if self._holds:
            return EngineReduction(wrapped)
        passes = zero_passes_of(wrapped.engine) if self._cuts else None
        return None if passes is None else ZeroReduction(wrapped, passes)

    def loss_scale(self, accelerator: Any) -> torch.Tensor | None:
        """Of DeepSpeed's own scaler, in fp16."""
        engine = accelerator.deepspeed_engine_wrapped.engine
        return torch.tensor(float(engine.optimizer.loss_scale)) if engine.fp16_enabled() else None

    @contextmanager
    def evaluating(self, trainer: Any) -> Iterator[None]:
        """Before training there is no engine: below stage 3 none is needed, at 3 one is made, and goes again."""
        if trainer.deepspeed is not None:
            yield
            return
        trainer.is_deepspeed_enabled = self.stage == 3
        with super().evaluating(trainer):
            try:
                yield
            finally:
                trainer.is_deepspeed_enabled = True
                if trainer.deepspeed is not None:
                    trainer.deepspeed.destroy()
                    forget_module(trainer.model)
                    trainer.deepspeed, trainer.model_wrapped = None, trainer.model

    def finished(self, trainer: Any) -> None:
        """Nothing but the trainer holds the engine any more."""
        wrapped = trainer.accelerator.deepspeed_engine_wrapped
        if wrapped is not None:
            self._has_trained = True
            release_engine(wrapped.engine, trainer)

    @contextmanager
    def saving(self, trainer: Any) -> Iterator[None]:
        """The model is saved as without DeepSpeed; transformers would save nothing of sharded adapters."""
        with whole_on_first(trainer.model, is_first=is_first_of_group()):
            trainer.is_deepspeed_enabled = False
            try:
                yield
            finally:
                trainer.is_deepspeed_enabled = True

    def check_checkpoint(self, folder: Path) -> None:
        """Refuse a checkpoint of another kind, or of another number of ranks.

        Raises:
            CheckpointError: DeepSpeed could not load it.
        """
        parts = saved_parts(folder)
        reason, instead = REFUSED["deepspeed", "another number of ranks"]
        if not parts:
            raise CheckpointError(
                got=f"{folder} was not saved by DeepSpeed.",
                need="Its engine loads only what it has saved itself.",
                fix="Go on with the strategy that it was saved with, or start a new run from its weights.",
            )
        if self.stage and parts != group_size():
            raise CheckpointError(
                got=f"{folder} was saved by DeepSpeed on {parts} ranks, and this run has {group_size()}.",
                need=reason,
                fix=instead,
            )

    def describe(self) -> str:
        """As the banner says it."""
        shared = ("nothing", "the optimizer", "optimizer and gradients", "optimizer, gradients and weights")[
            self.stage
        ]
        offloaded = self._offloaded()
        beside = f", {' and '.join(offloaded)} in host memory" if offloaded else ""
        return f"DeepSpeed ZeRO-{self.stage}: {shared} shared out{beside}, each has rows of its own"


def says_deepspeed(args: TrainingArguments | None) -> bool:
    """Whether ``args.deepspeed`` or ``accelerate launch`` say that DeepSpeed trains."""
    return getattr(args, "deepspeed_plugin", None) is not None


def saved_parts(folder: Path) -> int:
    """Of how many ranks DeepSpeed saved the optimizer's state in a checkpoint; 0: it did not save it."""
    parts = len(list(folder.glob("global_step*/*_optim_states.pt")))
    return parts or len(list(folder.glob("global_step*/mp_rank_00_model_states.pt")))


def settings_of(config: MultiGPUConfig, *, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's settings for ``config``; "auto" is what transformers fills in.

    Args:
        config: its ``zero_stage`` and ``cpu_offload`` count.
        bf16: compute products in bf16.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.cpu_offload is True and config.zero_stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    found: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        # torch's AdamW runs on the host as well, and has not to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": "auto"},
    }
    if bf16:
        # No modules whose gradients would be sent in bf16.
        found["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return found


def _give_settings(args: Any, config: MultiGPUConfig) -> None:
    """Do what transformers does with ``args.deepspeed`` when arguments are made."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    args.deepspeed = settings_of(config, bf16=bool(args.bf16))
    args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.deepspeed)
    args.hf_deepspeed_config.trainer_config_process(args)
    # Beside autocast, it would round trained weights, too; accelerate asks for it unless it is refused here.
    args.hf_deepspeed_config.config["bf16"] = {"enabled": False}
    args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)


def _join_state(args: Any) -> None:
    """Let accelerate's state of this process be DeepSpeed's; it was made before, of arguments without it."""
    from accelerate.state import AcceleratorState, PartialState

    os.environ[_USED] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    if args.device.type == "cpu":  # with cpu=True, accelerate takes ranks on CPUs for DDP's
        args.distributed_state = PartialState(cpu=False, backend="gloo")
        return
    args.__dict__.pop("_setup_devices", None)
    if not args.deepspeed:
        _ = args.device
        return
    os.environ.pop(_USED)  # transformers sets it for as long as it makes the state
    _ = args.device
    os.environ[_USED] = "true"
