"""One decoding step of a model, recorded once as a CUDA graph and replayed for every further token.

A graph reads and writes fixed addresses and runs no Python. So the step's inputs are copied into the tensors it was
recorded with; the cache has to stay where it is; and whatever else the step depends on (weights, adapters, hooks) is
compared at the start of every ``generate``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pantheraml.log import say, say_once
from pantheraml.models.patching import is_foreign

# Steps that run as they are before one is recorded: kernels are loaded, and short answers never pay for a recording.
EAGER_STEPS = 2

Step = Callable[[], Any]


def record_cuda_graph(step: Step) -> Step:
    """Record what ``step`` launches; the result replays it and returns what ``step`` returned, refilled."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = step()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # a recording that fails leaves its own stream in place
        raise

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def watch(step: Step, device: torch.device) -> tuple[Any, str | None]:
    """Run ``step``; what it returned, and why it cannot be recorded: a graph cannot wait for the device.

    Found out beforehand, because a recording that fails on the way leaves torch's random state unusable.
    """
    if device.type != "cuda":
        return step(), None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output = step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [str(entry.message) for entry in caught if "synchronizing CUDA operation" in str(entry.message)]
    return output, waits[0].splitlines()[0] if waits else None


class Inputs(NamedTuple):
    """The keyword arguments of one step, sorted by what a recording does with them.

    Attributes:
        tensors: copied before a replay, by name (``"attention_mask.full_attention"`` inside a dictionary).
        constants: have to be equal.
        addresses: of the cache's tensors; have to be equal.
    """

    tensors: dict[str, Tensor]
    constants: tuple[tuple[str, object], ...]
    addresses: tuple[int, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for steps that one recording serves."""
        shapes = tuple((name, t.shape, t.dtype, t.device) for name, t in self.tensors.items())
        return shapes, self.constants, self.addresses


def sort_inputs(arguments: dict[str, Any]) -> Inputs | None:
    """``arguments`` sorted, or None when there is one that a recording cannot take."""
    tensors: dict[str, Tensor] = {}
    constants: list[tuple[str, object]] = []
    addresses: list[int] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for inner, tensor in value.items():
                if not isinstance(tensor, Tensor):
                    return None
                tensors[f"{name}.{inner}"] = tensor
        elif isinstance(value, Cache):
            layers: Any = value.layers
            addresses += [t.data_ptr() for layer in layers for t in (layer.keys, layer.values)]
        elif value is None or isinstance(value, bool | int | float | str):
            constants.append((name, value))
        else:
            return None
    return Inputs(tensors, tuple(constants), tuple(addresses))


def _with_tensors(arguments: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """``arguments`` with their tensors replaced by those of the same names."""
    replaced: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            replaced[name] = {inner: tensors[f"{name}.{inner}"] for inner in value}
        else:
            replaced[name] = tensors.get(name, value)
    return replaced


def fingerprint(model: PreTrainedModel) -> tuple[object, ...] | None:
    """What a recording depends on besides its inputs; None when Python has to run in every step.

    The numbers in the weights are not part of it: they are read anew by every replay.
    """
    found: list[object] = [model.training, getattr(model.config, "_attn_implementation", None)]
    for module in model.modules():
        if any(map(is_foreign, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
            return None
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            scales = tuple(getattr(layer, "scaling", {}).items())
            found.append((layer.disable_adapters, *layer.active_adapters, *layer.merged_adapters, scales))
    found += [t.data_ptr() for tensors in (model.parameters(), model.buffers()) for t in tensors]
    return tuple(found)


class RecordedStep:
    """Calls a model for one token, by replaying a recording where that gives the same.

    Args:
        record: makes a replayable step of one; a test gives one that records nothing.
    """

    def __init__(self, record: Callable[[Step], Step] = record_cuda_graph) -> None:
        self._record = record
        self._state: tuple[object, ...] | None = None
        self._gave_up = self._is_checked = False
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model records for itself.
        return type(self), (self._record,)

    def forget(self) -> None:
        """Drop the recording and the memory it holds."""
        self._key: tuple[object, ...] | None = None
        self._replay: Step | None = None
        self._inputs: dict[str, Tensor] = {}
        self._eager = 0
        self.replays = 0

    def begin(self) -> None:
        """Start a ``generate``: at its first step, a recording that no longer tells the model's state is dropped."""
        self._is_checked = False

    def __call__(self, model: PreTrainedModel, **arguments: Any) -> Any:
        """``model(**arguments)``."""
        if not self._is_checked:  # the prompt has been read: it may move weights
            self._check(model)
        inputs = sort_inputs(arguments)
        if (
            inputs is None
            or self._state is None
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(str(model.device.type))
            or arguments.get("output_hidden_states")
            or arguments.get("output_attentions")
        ):
            return model(**arguments)
        if inputs.key != self._key:
            self.forget()
            self._key = inputs.key
        if self._replay is None:
            self._eager += 1
            if self._eager < EAGER_STEPS:
                return model(**arguments)
            if self._eager == EAGER_STEPS:
                output, reason = watch(lambda: model(**arguments), model.device)
                if reason is not None:
                    self._give_up(reason)
                return output
            self._start(model, arguments, inputs)
        if self._replay is None:
            return model(**arguments)
        for name, tensor in inputs.tensors.items():
            self._inputs[name].copy_(tensor)
        self.replays += 1
        return self._replay()

    def _check(self, model: PreTrainedModel) -> None:
        state = None if self._gave_up else fingerprint(model)
        if state != self._state or state is None:
            self.forget()
        self._state, self._is_checked = state, True

    def _start(self, model: PreTrainedModel, arguments: dict[str, Any], inputs: Inputs) -> None:
        """Record the step; where that fails, steps run as they are."""
        began = time.perf_counter()
        with torch.inference_mode(False):  # a later call may write to them outside of that mode
            self._inputs = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
        step = _with_tensors(arguments, self._inputs)
        try:
            self._replay = self._record(lambda: model(**step))
        except RuntimeError as error:
            self._give_up(str(error).splitlines()[0] if str(error) else type(error).__name__)
            return
        say(f"a decoding step was recorded as a CUDA graph in {time.perf_counter() - began:.2f} s.")

    def _give_up(self, reason: str) -> None:
        """Run steps as they are from here on, also in later calls."""
        self._gave_up, self._state = True, None
        say_once(f"Generation launches its kernels one by one: a step cannot be recorded ({reason[:200]}).")
