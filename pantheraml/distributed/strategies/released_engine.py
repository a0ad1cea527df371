"""What DeepSpeed's engine leaves on a model and in the process, taken away when training is over.

The engine and its optimizer hang on the model by hooks, and on the process by what DeepSpeed never clears: moments,
buffers and the model itself would stay as long as the process does. Seen in DeepSpeed 0.19.8:

    hooks of gradients     hold the optimizer, and Python's collector cannot see that nothing else does
    hooks of the forward   hold the engine, as long as there is the model
    ``_z3_optimizer``      an attribute of every weight at stage 3
    ``FWD_MODULE_STACK``   a list of every model that was ever at stage 3
    a cache                of which weights each module lets go of at stage 3, by module
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

# A method of ``PartitionedParameterCoordinator``, which remembers what it was asked: coordinators and modules.
_REMEMBERS = "_PartitionedParameterCoordinator__params_to_release"


def release_engine(engine: Any, owner: object) -> None:
    """Let ``engine`` go with ``owner``; until then it evaluates and saves, but trains no more.

    Args:
        engine: DeepSpeed's, whose training is over.
        owner: the trainer, whose evaluations still go through the engine.
    """
    forward = [engine.module_forward_pre_hook, engine.module_forward_post_hook]
    if engine.zero_optimization_stage() < 3:
        engine.destroy()
        _remove(forward)
        return
    # Weights are gathered by hooks of the engine's other part, which stay: ``destroy`` would take them, too.
    _remove([*engine.optimizer._grad_acc_hooks, *engine.optimizer._leaf_module_hooks])
    for parameter in engine.module.parameters():
        vars(parameter).pop("_z3_optimizer", None)
    forget_module(engine.module)
    # The others find weights that a module reads of another one, until nobody evaluates here.
    weakref.finalize(owner, _remove, forward)
    weakref.finalize(owner, _clear_cache)


def forget_module(module: Any) -> None:
    """Take ``module``, at stage 3, from what DeepSpeed lists; it comes back there for as long as it is computed."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK[:] = [one for one in FWD_MODULE_STACK if one is not module]
    _clear_cache()


def _clear_cache() -> None:
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    method = getattr(PartitionedParameterCoordinator, _REMEMBERS, None)
    cached = {} if method is None else inspect.getclosurevars(method).nonlocals
    for one in cached.values():
        if hasattr(one, "cache_clear"):
            one.cache_clear()


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
