"""Weights that DeepSpeed's ZeRO-3 gathers module by module, such that a pass can begin again where it began.

What is gathered, and how much ahead, follows from a trace of the modules, from where in it a pass is, and from which
weights are whole already. A pass that is gone through again starts from what there was at its beginning, but for the
numbers: weights that were whole are so again, as zeros, and gatherings that the others have seen give zeros.
"""

from __future__ import annotations

import copy
from collections import deque
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn

from pantheraml.devices.out_of_memory import is_out_of_memory
from pantheraml.distributed.strategies.launched_exchanges import LaunchedExchanges


class Gathering:
    """The weights of a model that are shared out, and what gathers them.

    Args:
        model: whose weights they are.
        coordinator: DeepSpeed's, which follows the trace.
        exchanges: of a pass; gatherings go through it from now on.
    """

    def __init__(self, model: nn.Module, coordinator: Any, exchanges: LaunchedExchanges) -> None:
        self._model, self._coordinator = model, coordinator
        self._parameters: list[Any] = list(model.parameters())
        for parameter in self._parameters:
            parameter.all_gather_coalesced = exchanges.counted(parameter.all_gather_coalesced, _Zeros)
            # Of a weight that a module reads of another one, as TRL's loss does of the head; after that it
            # is gathered with that module.
            parameter.all_gather = exchanges.counted(parameter.all_gather, partial(_fill_missing, parameter))
        # The first thing of a forward: the trace is at its beginning, and ranks compare what is new of it.
        reset_step = coordinator.reset_step

        def began() -> None:
            reset_step()
            self._remember()

        coordinator.reset_step = exchanges.counted(began, self._begin_again)
        self._has_begun, self._depth = False, 0
        self._whole: list[Any] = []
        self._state: dict[str, Any] = {}
        # Tables of the weights that modules read of others, and what was in them; weights that modules return.
        self._read: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._returned: list[bool] = []

    def begin(self) -> None:
        """A pass begins, or the one that failed does once more."""
        self._has_begun, self._depth = False, len(_modules_on_their_way())

    def failed(self) -> None:
        """The pass failed on this rank: it can begin again."""
        if self._has_begun:
            self._share_out()

    def forget(self) -> None:
        """Nothing is gathered, and there is no trace: so it is on all ranks then, whatever they have been through."""
        self._share_out()
        if not self._coordinator.is_invalid_trace():
            self._coordinator._invalidate_trace()

    def _remember(self) -> None:
        """Where a pass begins: of the coordinator all that is plain Python, its tables of modules and weights."""
        self._has_begun = True
        self._whole = [one for one in self._parameters if one.ds_status is type(one.ds_status).AVAILABLE]
        tables = [vars(module).get("_external_params", {}) for module in self._model.modules()]
        self._read = [(table, dict(table)) for table in tables]
        self._returned = [one.is_external_param for one in self._parameters]
        plain = (bool, int, Enum, tuple, list, deque, dict)
        self._state = {
            name: copy.copy(value)
            for name, value in vars(self._coordinator).items()
            if isinstance(value, plain)
        }

    def _begin_again(self) -> None:
        _fill(self._whole)
        vars(self._coordinator).update(self._state)
        for table, read in self._read:
            table.clear()
            table.update(read)
        for parameter, is_returned in zip(self._parameters, self._returned, strict=True):
            parameter.is_external_param = is_returned

    def _share_out(self) -> None:
        """Let each rank have its shares alone, whatever a pass has left or was about to gather."""
        on_their_way: Any = vars(self._model)["ds_inflight_param_registry"]
        for handle in dict.fromkeys(on_their_way.values()):
            try:
                handle.wait()
            except RuntimeError as error:  # it has arrived, and there is no room to put it together
                if not is_out_of_memory(error):
                    raise
        on_their_way.clear()
        for parameter in self._parameters:
            status = type(parameter.ds_status)
            parameter.ds_active_sub_modules.clear()
            if parameter.ds_status is not status.NOT_AVAILABLE:
                parameter.ds_status = status.AVAILABLE
                parameter.partition()
        for module in self._model.modules():
            vars(module).get("ds_recompute_parameters", set()).clear()
            read: Any = module._parameters
            if getattr(read, "_in_forward", False):  # a weight that is read would be gathered
                read._in_forward = False
        del _modules_on_their_way()[self._depth :]


class _Zeros:
    """What a gathering gives that the others have seen already.

    Args:
        parameters: that are gathered.
    """

    def __init__(self, parameters: Any, *_: Any, **__: Any) -> None:
        self._parameters: list[Any] = list(parameters)
        for parameter in self._parameters:
            parameter.ds_status = type(parameter.ds_status).INFLIGHT

    def wait(self, **_: Any) -> None:
        """They are whole."""
        _fill([one for one in self._parameters if one.ds_status is type(one.ds_status).INFLIGHT])


def _fill_missing(parameter: Any, parameters: Any = None, *_: Any, **__: Any) -> None:
    found: list[Any] = [parameter] if parameters is None else list(parameters)
    _fill([one for one in found if one.ds_status is type(one.ds_status).NOT_AVAILABLE])


def _fill(parameters: list[Any]) -> None:
    """Let them be whole, with zeros."""
    for parameter in parameters:
        parameter.data = torch.zeros(
            parameter.ds_shape, dtype=parameter.ds_tensor.dtype, device=parameter.device
        )
        parameter.ds_status = type(parameter.ds_status).AVAILABLE


def _modules_on_their_way() -> list[Any]:
    """DeepSpeed's list of modules whose forward has begun, outermost first."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    return FWD_MODULE_STACK
