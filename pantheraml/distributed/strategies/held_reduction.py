"""How gradients of a step are reduced where a rank may fail in the middle of it, and the step is to be repeated.

    Reduction         one process: there is none
    HeldReduction     the passes of a step go by without one, which is asked for when every rank has done its own
    LaunchedBuckets   DDP reduces buckets during the last pass; a rank that fails answers those it owes with zeros
    GatheredWeights   ranks gather layers in every pass: one that fails goes through each as the others do, see
                      ``gathered_passes``
    SummedLayers      ranks compute layers together in every pass: likewise, see ``summed_passes``

Gradients of an adapter are one bucket, which DDP reduces at the end of the last backward anyway: held back until the
hosts have agreed, it costs no GPU anything. What is trained in full hides its reductions behind the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pantheraml.distributed.data_parallel import Averages, average_buckets, check_gradients
from pantheraml.distributed.process_group import group_size
from pantheraml.distributed.strategies.gathered_passes import PassExchanges
from pantheraml.distributed.strategies.summed_passes import PassSums, StandIn
from pantheraml.models.recompute import prepare_recompute
from pantheraml.models.sharded_linear import tensor_group_of
from pantheraml.models.sharding import is_sharded
from pantheraml.models.state import get_state
from pantheraml.models.tensor_group import TensorGroup


class Reduction:
    """Of one process: there is nobody to reduce with.

    Attributes:
        talks_in_passes: whether ranks wait for one another in every pass: each has as many, also where it has failed.
        adds_up: whether gradients of weights that are shared out wait, whole, for the last pass; all ranks agree.
    """

    talks_in_passes: ClassVar[bool] = False
    adds_up = False

    def around(self, *, is_last: bool, stand_in: StandIn | None = None) -> AbstractContextManager[Any]:
        """A context for one pass of a step.

        Args:
            is_last: no other one follows.
            stand_in: what this rank goes through in its place, since it has failed; only where ranks talk in passes.
        """
        del is_last, stand_in
        return nullcontext()

    def pass_failed(self) -> None:
        """The pass at hand has failed on this rank; where they talk in passes it goes through it again."""

    def give_up(self) -> None:
        """This rank has failed in this step: let no other one wait for it."""

    def undo(self) -> None:
        """The step is repeated on all ranks."""

    def finish(self) -> None:
        """The step is done on all ranks: from here on gradients are the means over them."""


class _Reached(torch.autograd.Function):
    """Something that depends on parameters, and has no gradient to give to them."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        """A scalar."""
        ctx.count = len(parameters)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """None for each parameter: what has been accumulated stays, and DDP's hooks see that it is complete."""
        return (None,) * ctx.count


class HeldReduction(Reduction):
    """DDP reduces once every rank has done all its passes.

    Args:
        model: as DDP has wrapped it.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model

    def around(self, *, is_last: bool, stand_in: StandIn | None = None) -> AbstractContextManager[Any]:
        """Gradients are accumulated."""
        del is_last, stand_in
        return self._model.no_sync()

    def undo(self) -> None:
        """Buffers, if they are sent around at all, were so at the beginning of this step."""
        self._model.require_forward_param_sync = False

    def finish(self) -> None:
        """A backward of nothing: it reaches every parameter, and DDP reduces what is there."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        check_gradients(self._model, trained)
        reached: Tensor = _Reached.apply(*trained)
        self._model.reducer.prepare_for_backward([reached])
        # DDP lays its buckets out in the order in which gradients are complete in its first backward. A thread of the
        # GPU would take them as they come, in another order in every run, and where a gradient lies in a bucket says
        # in which order its parts of three ranks or more are added up.
        with torch.autograd.set_multithreading_enabled(False):
            reached.backward()
        self._model.require_forward_param_sync = True


_launched: WeakKeyDictionary[nn.Module, Averages] = WeakKeyDictionary()


def count_launches(model: DistributedDataParallel, dtype: torch.dtype | None) -> None:
    """Let DDP reduce each bucket while a backward goes on, such that a failed rank knows what it owes.

    Args:
        model: as DDP has wrapped it.
        dtype: what gradients are sent and added up in; None for their own.
    """
    _launched[model] = average_buckets(model, dtype)


class LaunchedBuckets(Reduction):
    """DDP reduces buckets during the last pass.

    Args:
        model: as DDP has wrapped it, with ``count_launches``.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model, self._launched = model, _launched[model]
        self._trained = [p for p in model.parameters() if p.requires_grad]

    def around(self, *, is_last: bool, stand_in: StandIn | None = None) -> AbstractContextManager[Any]:
        """Gradients are accumulated before the last pass."""
        del stand_in
        return nullcontext() if is_last else self._model.no_sync()

    def give_up(self) -> None:
        """Take part, with zeros, in the reductions that the others have begun or will begin."""
        buckets = self._model.reducer._get_zeros_like_grad_buckets()
        for bucket in buckets[self._launched.count :]:
            self._launched.start(bucket)

    def undo(self) -> None:
        """Wait for reductions that are on their way, and let DDP forget the step, on all ranks alike."""
        self._launched.forget()
        self._model.require_forward_param_sync = False
        self._model.reducer._reset_state()

    def finish(self) -> None:
        """DDP has waited for them."""
        check_gradients(self._model, self._trained)
        self._launched.forget()


Exchanges = TypeVar("Exchanges", PassExchanges, PassSums)


class _ExchangesInPasses(Reduction, Generic[Exchanges]):
    """Ranks wait for one another in every pass, and one that has failed takes part until the step is over.

    Attributes:
        exchanges: those of a pass, counted.

    Args:
        exchanges: likewise.
        beside: how gradients of what is whole on every rank are reduced, without a word during a pass.
    """

    talks_in_passes = True

    def __init__(self, exchanges: Exchanges, beside: Reduction) -> None:
        self.exchanges, self._beside = exchanges, beside

    def pass_failed(self) -> None:
        """The next pass is this one once more, as far as others have not seen it."""
        self.exchanges.failed()

    def undo(self) -> None:
        """Every rank has been through all passes: nothing is on its way."""
        self._beside.undo()

    def finish(self) -> None:
        """What is exchanged in passes has its gradients already."""
        self._beside.finish()


class GatheredWeights(_ExchangesInPasses[PassExchanges]):
    """Ranks gather the layers of what they share out, and reduce its gradients if it is trained, in every pass.

    Args:
        model: with layers that FSDP2 shares out.
        beside: how gradients of what is whole on every rank are reduced.
    """

    def __init__(self, model: nn.Module, beside: Reduction) -> None:
        super().__init__(PassExchanges(model), beside)

    @contextmanager
    def around(self, *, is_last: bool, stand_in: StandIn | None = None) -> Iterator[None]:
        """What is exchanged is counted; its size does not depend on tokens."""
        del stand_in
        self.exchanges.begin(reduces=is_last or not self.adds_up)
        with self._beside.around(is_last=is_last):
            yield
        self.exchanges.end()


class SummedLayers(_ExchangesInPasses[PassSums]):
    """Ranks compute layers together, and sum what each has of them in every pass.

    Args:
        model: with layers that are cut between the ranks of ``group``.
        group: those that have the same rows.
        beside: how gradients of the adapter, which is whole on every rank, are reduced.
    """

    def __init__(self, model: nn.Module, group: TensorGroup, beside: Reduction) -> None:
        super().__init__(PassSums(group), beside)
        self._model = model

    @contextmanager
    def around(self, *, is_last: bool, stand_in: StandIn | None = None) -> Iterator[None]:
        """What is summed is counted."""
        state = get_state(self._model)
        if stand_in is not None and state is not None:
            # What is recomputed is summed once more, so the plan is that of the others, and is agreed with them.
            prepare_recompute(self._model, state, stand_in.tokens)
        with self.exchanges.counted(stand_in), self._beside.around(is_last=is_last):
            yield


def exchanges_of(model: nn.Module) -> PassExchanges | PassSums | None:
    """What ranks exchange in a pass of ``model``, counted from now on; None where nobody can tell, or they do not.

    Args:
        model: as the trainer is given it for an evaluation, wrapped or not.
    """
    if is_sharded(model):
        return PassExchanges(model)
    group = tensor_group_of(model)
    return None if group is None else PassSums(group)


def reduction_of(model: nn.Module) -> Reduction | None:
    """How the gradients of ``model`` are reduced; None where a step cannot be repeated.

    Args:
        model: as the trainer is given it for a step: wrapped by DDP on several ranks.
    """
    is_wrapped = isinstance(model, DistributedDataParallel)
    if is_wrapped and model.static_graph:  # it counts the passes of its first step
        return None
    if is_sharded(model):
        return GatheredWeights(model, HeldReduction(model) if is_wrapped else Reduction())
    if not is_wrapped:
        return Reduction() if group_size() == 1 else None
    group = tensor_group_of(model)
    if group is not None:
        return SummedLayers(model.module, group, HeldReduction(model))
    return LaunchedBuckets(model) if model in _launched else HeldReduction(model)
