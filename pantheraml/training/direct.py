"""``MultiGPUTrainer``: any torch module, optimizer and data loader, on every GPU.

A step is one batch of the loader on any number of ranks: its rows are shared out, each rank computes the loss of its
part, and the gradients become one as ``AggregationMethod`` says. The loop is as plain as the one it stands for; models
of language are better off with ``PantheraMLDistributedTrainer``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.distributed.data_parallel import check_gradients, sum_gradients, wrap_module
from pantheraml.distributed.process_group import (
    cleanup_multi_gpu,
    get_rank,
    group_size,
    is_distributed_available,
    rank_device,
    settings_of_run,
    setup_multi_gpu,
)
from pantheraml.distributed.telling import tell
from pantheraml.errors import ConfigError, DataError, did_you_mean
from pantheraml.launch.start import ensure_ranks
from pantheraml.log import say
from pantheraml.models.state import get_state
from pantheraml.training.aggregation import AggregationMethod, Weight, method_of, weight_of
from pantheraml.training.batch_parts import Part, parts_of
from pantheraml.training.module_loss import LossFunction, module_loss


class MultiGPUTrainer:
    """Trains a torch module on every GPU, an epoch at a time; ``with`` sets it up and cleans it up.

    Args:
        model: any module. One of ``FastLanguageModel`` without an adapter gets a LoRA adapter, unless it was loaded for
            full fine-tuning. Every rank begins with the first one's weights.
        num_gpus: ranks on this machine; None is one for each visible GPU. Without GPUs they run on the CPU.
        optimizer_config: ``{"class": torch.optim.AdamW, "kwargs": {"lr": 2e-5}}``; it is given what ``model`` trains.
        aggregation_method: what becomes of the ranks' gradients.
        loss_function: of the module's output and the target (the last of a batch's parts, or its ``labels``); None
            where the module returns its loss.
        weigh_by: with ``AggregationMethod.WEIGHTED``: ``"rows"``, ``"tokens"`` (labels that are not -100), a function
            of a part of a batch, or ``"auto"``: tokens where a row has several labels, else rows.
        multi_gpu_config: backend, timeout, ``find_unused_parameters``, ``reduce_dtype``.

    Attributes:
        model: the module, without wrappers; the same weights on all ranks after each step.
        optimizer: from ``setup`` on.

    Raises:
        ConfigError: arguments that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        num_gpus: int | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        aggregation_method: AggregationMethod | str = AggregationMethod.MEAN,
        *,
        loss_function: LossFunction | None = None,
        weigh_by: Weight = "auto",
        multi_gpu_config: MultiGPUConfig | None = None,
    ) -> None:
        self._make_optimizer, self._optimizer_settings = _read_optimizer(optimizer_config)
        self._method = method_of(aggregation_method)
        if weigh_by != "auto" and self._method is not AggregationMethod.WEIGHTED:
            raise ConfigError(
                got=f"weigh_by={weigh_by!r} was given with {self._method}.",
                need="Only AggregationMethod.WEIGHTED weighs.",
                fix="Write aggregation_method=AggregationMethod.WEIGHTED, or leave weigh_by out.",
            )
        if not callable(weigh_by) and weigh_by not in ("auto", "rows", "tokens"):
            raise ConfigError(
                got=f"weigh_by={weigh_by!r} was given.",
                need='It is "rows", "tokens", "auto", or a function of a part of a batch.',
                fix='Leave it out for "auto".',
            )
        self.model, self.optimizer = model, cast(Optimizer, None)
        self._loss_function = loss_function
        self._weigh_by: Weight = weigh_by
        self._config = _settings(multi_gpu_config, num_gpus)
        self._wrapped: nn.Module | None = None
        self._loader: Iterable[Any] = ()
        self._parts: Iterable[Part] = ()
        self._made_group = False
        self._epoch = 0

    def setup(self) -> Self:
        """Be one of the ranks, with the module on the rank's GPU; a plain script starts its ranks here.

        Raises:
            ConfigError: nothing is trained, the module is on several devices, or what started the ranks contradicts.
        """
        if self._wrapped is not None:
            return self
        ensure_ranks(self._config, leave=self._let_go)
        existed = is_distributed_available()
        setup_multi_gpu(self._config)
        self._made_group = is_distributed_available() and not existed
        state = get_state(self.model)
        if state is not None and not state.full_finetuning:
            from pantheraml.training.default_adapter import ensure_adapter

            self.model = ensure_adapter(self.model, state)
        self._device = _one_device(self.model)
        if any(tensor.device != self._device for tensor in _tensors(self.model)):
            self.model.to(self._device)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        if not self._trained:
            raise ConfigError(
                got=f"The {type(self.model).__name__} has no parameter that is trained.",
                need="The optimizer is given those with requires_grad=True.",
                fix="Unfreeze some, or attach an adapter: FastLanguageModel.get_peft_model(model).",
            )
        self._wrapped = wrap_module(self.model, self._config) if group_size() > 1 else self.model
        self.optimizer = self._make_optimizer(self._trained, **self._optimizer_settings)
        return self

    def cleanup(self) -> None:
        """Let go of the optimizer and of DDP, and of the process group if it was made here; ``model`` stays."""
        self._wrapped, self.optimizer = None, cast(Optimizer, None)
        self._loader = self._parts = ()
        if self._made_group:
            self._made_group = False
            cleanup_multi_gpu()

    def __enter__(self) -> Self:
        return self.setup()

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def train_epoch(self, dataloader: Iterable[Any]) -> dict[str, float]:
        """Train on every row of ``dataloader`` once; all ranks call it.

        Args:
            dataloader: a torch DataLoader, of whose batches each rank loads its own rows alone, in the order that the
                first rank draws; or any batches that are the same on all ranks.

        Returns:
            epoch (from 1), steps, rows of all ranks, loss (mean of the steps' losses, each as its gradient is
            aggregated), seconds, rows_per_second.

        Raises:
            ConfigError: the module's output has no loss.
            DataError: batches that cannot be shared out, or that differ between ranks.
            PantheraMLError: another rank has failed.
        """
        self.setup()
        start, steps, rows = time.monotonic(), 0, 0
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        self.model.train()
        if self._loader is not dataloader:  # its workers may stay for the next epoch
            self._loader, self._parts = dataloader, parts_of(dataloader, _rank(), group_size())
        parts = iter(self._parts)
        while (step := self._next(parts)) is not None:
            part, count, factors = step
            if any(factors):
                total += self._step(part.batch, factors)
                steps += 1
            rows += count
        loss = self._mean(total, steps)
        seconds = time.monotonic() - start
        self._epoch += 1
        say(
            f"epoch {self._epoch}: {steps} steps, {rows} rows, loss {loss:.4g}, {rows / seconds:,.0f} rows/s."
        )
        return {
            "epoch": self._epoch, "steps": steps, "rows": rows, "loss": loss,
            "seconds": seconds, "rows_per_second": rows / seconds,
        }  # fmt: skip

    def _next(self, parts: Iterator[Part]) -> tuple[Part, int, list[float]] | None:
        """This rank's part of the next batch, the batch's rows, and the factors of all ranks' losses; None: no more."""
        part, weight, failure = None, 0, None
        try:
            part = next(parts, None)
            if part is not None and part.rows:
                weighs = self._method is AggregationMethod.WEIGHTED
                weight = weight_of(part.batch, part.rows, self._weigh_by, self.model) if weighs else 1
        except Exception as error:  # whatever it is, the other ranks are waiting
            failure = error
        checksum, rows = (-1, 0) if part is None else (part.checksum, part.rows)
        told = tell(failure, checksum, rows, weight)
        if len({mine for mine, *_ in told}) > 1:
            raise DataError(
                got="The ranks read batches that differ, or not as many of them.",
                need="Every rank reads the whole of such a data loader, in the same order, and keeps its rows.",
                fix="Shuffle with a seed that all ranks have, and let nothing else share rows out between ranks.",
            )
        if part is None:
            return None
        factors = self._method.factors([weight for *_, weight in told])
        return part, int(sum(rows for _, rows, _ in told)), factors

    def _step(self, batch: Any, factors: list[float]) -> Tensor:
        """Take one step of the optimizer; this rank's share of the loss, on the device."""
        factor, everyone = factors[_rank()], all(factors)
        assert self._wrapped is not None
        # DDP's reduction needs a backward of every rank.
        module = self._wrapped if everyone else self.model
        self.optimizer.zero_grad(set_to_none=True)
        loss, failure = None, None
        try:
            check_absence(self.model, everyone=everyone)
            if factor:
                batch = send_to_device(batch, self._device, non_blocking=True)
                with self._precision():
                    loss = module_loss(module, batch, self._loss_function)
        except Exception as error:  # likewise
            failure = error
        tell(failure)
        share = torch.zeros((), device=self._device) if loss is None else loss.detach() * factor
        if loss is not None:
            # DDP divides by the number of ranks.
            (loss * (factor * group_size() if everyone else factor)).backward()
        if not everyone:
            sum_gradients(self._trained)
        elif isinstance(module, DistributedDataParallel):
            check_gradients(module, self._trained)
        self.optimizer.step()
        return share

    def _mean(self, total: Tensor, steps: int) -> float:
        """The mean loss of the steps of an epoch; buffers become the first rank's, as its running statistics."""
        if group_size() > 1:
            dist.all_reduce(total)
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        return total.item() / max(1, steps)

    def _precision(self) -> AbstractContextManager[Any]:
        """In what a model of ``FastLanguageModel`` computes; other modules as they are, or as autocast around says."""
        state = get_state(self.model)
        if state is None or state.precision.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, state.precision.dtype)

    def _let_go(self) -> None:
        """Free the weights of a process whose ranks will have their own; it does not come back to use them."""
        for tensor in _tensors(self.model):
            tensor.data = tensor.new_empty(0)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _rank() -> int:
    """Of the process group; 0 without one, whoever started this process."""
    return get_rank() if is_distributed_available() else 0


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(), module.buffers())


def _one_device(module: nn.Module) -> torch.device:
    """Where ``module`` is trained: the GPU of this rank, or the one that it is on where there are no other ranks.

    Raises:
        ConfigError: its weights are on several devices, or shared out between ranks.
    """
    state, places = get_state(module), {tensor.device for tensor in _tensors(module)}
    if len(places) > 1 or (state is not None and (state.split or state.sharding) is not None):
        raise ConfigError(
            got=f"The {type(module).__name__} is on several devices, or shared out between ranks.",
            need="MultiGPUTrainer has a whole copy of the module on each GPU.",
            fix="Load it without device_map; PantheraMLDistributedTrainer trains models that are larger than a GPU.",
        )
    here = next(iter(places), rank_device())
    return here if group_size() == 1 and here.type == "cuda" else rank_device()


def check_absence(module: nn.Module, *, everyone: bool) -> None:
    """Refuse a batch of which some rank has no row, where ranks talk to one another in a forward."""
    if not everyone and any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        raise DataError(
            got="A batch has no row for some ranks, and the module has SyncBatchNorm.",
            need="All ranks take part in its forward.",
            fix="Write drop_last=True, or a batch size whose rest is not less than the number of ranks.",
        )


def _read_optimizer(config: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and what it is made with.

    Raises:
        ConfigError: there is no class, or an unknown key.
    """
    known, example = ("class", "kwargs"), '{"class": torch.optim.AdamW, "kwargs": {"lr": 2e-5}}'
    found = dict(config) if isinstance(config, Mapping) else {}
    unknown = [str(name) for name in found if name not in known]
    if unknown:
        raise ConfigError(
            got=f"optimizer_config has {', '.join(map(repr, unknown))}.",
            need=f"Its keys are {' and '.join(map(repr, known))}. {did_you_mean(unknown[0], known)}",
            fix=f"Write optimizer_config={example}.",
        )
    if not callable(found.get("class")):
        raise ConfigError(
            got=f"optimizer_config={config!r} was given.",
            need="It says which class of optimizer is made.",
            fix=f"Write optimizer_config={example}.",
        )
    return found["class"], dict(found.get("kwargs") or {})


def _settings(given: MultiGPUConfig | None, num_gpus: int | None) -> MultiGPUConfig:
    """The settings of the run, with ``num_gpus`` ranks.

    Raises:
        ConfigError: they say another number, or another strategy than a copy on each GPU.
    """
    config = settings_of_run() if given is None else given
    if config.way not in ("auto", "ddp", "none"):
        raise ConfigError(
            got=f"MultiGPUTrainer was given to a run with strategy={config.way!r}.",
            need="It has a whole copy of the module on each GPU.",
            fix='Write strategy="ddp", or use PantheraMLDistributedTrainer.',
        )
    if num_gpus is None:
        return config
    if config.num_processes not in (None, num_gpus):
        raise ConfigError(
            got=f"num_gpus={num_gpus} and num_processes={config.num_processes} were given.",
            need="They are two names of the number of ranks.",
            fix="Keep one of them.",
        )
    return replace(config, num_processes=num_gpus)
