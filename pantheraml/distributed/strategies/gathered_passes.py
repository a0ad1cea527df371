"""What ranks that share weights out exchange in a pass, such that one that fails within it can take part until its end.

Others wait for it in every gathering that follows. It therefore goes through the model once more with a few tokens,
which makes FSDP2 ask for the same exchanges in the same order; those that it had taken part in before are left out.
What it computes there is of zeros instead of weights, and nobody uses it: the step is repeated on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pantheraml.distributed.strategies.exchange_count import ExchangeCount
from pantheraml.distributed.strategies.summed_passes import StandIn
from pantheraml.models.shares import Bytes

# One of torch.distributed: fills an output from an input.
Exchange = Callable[..., Any]
# torch 2.13 has a new name for it, and warns of the older one.
_reduce_scatter: Exchange = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class PassExchanges:
    """The exchanges of a pass in the order in which FSDP2 asks for them, counted.

    Args:
        model: with layers that FSDP2 shares out; its gatherings and reductions go through this object from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._modules, self._root = modules, cast(Any, modules[0])
        self._count = ExchangeCount()
        # Of what is shared out several times: the modules whose gradients the copies have added up in this pass.
        self._added: list[FSDPModule] = []
        has_copies = _has_copies(model)
        for module in modules:
            module.set_custom_all_gather(cast(Any, _Counted(self, Bytes())))
            module.set_custom_reduce_scatter(cast(Any, _Counted(self, _reduce_scatter)))
            if has_copies:
                module.set_all_reduce_hook(partial(self._note, module))

    def begin(self, *, reduces: bool) -> None:
        """A pass begins, or the one that failed does once more; ``reduces``: what is trained is reduced within."""
        self._start()
        for module in self._modules:
            module.set_requires_gradient_sync(reduces, recurse=False)
        for module in self._added:  # before it failed
            module.set_requires_all_reduce(False, recurse=False)

    def end(self) -> None:
        """The pass is over: the next one is a new one."""
        self._count.end()
        self._added.clear()

    @contextmanager
    def counted(self, stand_in: StandIn | None) -> Iterator[None]:
        """A block for a pass without gradients; what is gathered does not depend on tokens."""
        del stand_in
        self._start()
        yield
        self.end()

    def failed(self) -> None:
        """The pass failed on this rank: what it has begun is forgotten, and what it has exchanged is remembered."""
        self._count.failed()
        for (
            parameter
        ) in self._root.parameters():  # also those that are whole now, which an optimizer never sees
            parameter.grad = None
        _start_anew(self._root)

    def _start(self) -> None:
        _start_anew(self._root)
        self._count.begin()

    def _note(self, module: FSDPModule, gradients: Tensor) -> None:
        del gradients
        self._added.append(module)

    def pass_on(self, exchange: Exchange, output: Tensor, given: Tensor, **settings: Any) -> Any:
        """Exchange, unless the others have seen it already: then the answer is zeros."""
        is_new = self._count.is_new
        work = exchange(output, given, **settings) if is_new else None
        self._count.add()
        if not is_new:
            output.zero_()
        return work


class _Counted:
    """One kind of exchange, as FSDP2 calls it.

    Args:
        exchanges: that count it.
        exchange: of torch.distributed.
    """

    def __init__(self, exchanges: PassExchanges, exchange: Exchange) -> None:
        self._exchanges, self._exchange = exchanges, exchange

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is exchanged."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **settings: Any) -> Any:
        """What torch.distributed answers."""
        return self._exchanges.pass_on(self._exchange, output_tensor, input_tensor, **settings)


def _has_copies(model: nn.Module) -> bool:
    """Whether trained weights are shared out several times."""
    return any(isinstance(one, DTensor) and one.device_mesh.ndim > 1 for one in model.parameters())


def _start_anew(root: Any) -> None:
    """Let FSDP2 forget the pass that it is in, and forwards that no backward followed.

    After such forwards embedding and head would stay gathered, and the next backward would gather a layer in vain: a
    pass asks for the same exchanges only if it starts from the same.

    Args:
        root: the outermost of its modules.
    """
    state = root._get_fsdp_state()
    if state._is_root is None:  # no forward has reached it yet
        return
    if hasattr(root, "reset_iter_state"):  # torch 2.13
        root.reset_iter_state()
        return
    shared, exchanges = state._state_ctx, state._comm_ctx
    for one in shared.all_states:
        one._training_state = type(one._training_state).IDLE
        group = one._fsdp_param_group
        if group is not None:
            group._training_state = one._training_state
            group.reshard()
            group.finalize_backward()  # waits for what is on its way
            group._partial_reduce_output = None
    shared.iter_forward_root = exchanges.all_gather_state = None
    shared.post_backward_final_callback_queued = False
    exchanges.post_forward_order.clear()
