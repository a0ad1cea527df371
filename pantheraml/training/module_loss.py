"""The loss of any module on a batch: what the module itself returns, or what a loss function makes of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from pantheraml.errors import ConfigError

LossFunction = Callable[[Any, Any], Tensor]
_LABELS = "labels"


def module_loss(module: Callable[..., Any], batch: Any, loss_function: LossFunction | None) -> Tensor:
    """The loss of ``module`` on ``batch``.

    ============  =================  ======================================================
    batch         alone              with a loss function
    ============  =================  ======================================================
    mapping       module(**batch)    loss_function(module(**all but labels), labels)
    (a, ..., z)   module(a, ..., z)  loss_function(module(a, ...), z)
    tensor        module(batch)      loss_function(module(batch), batch)
    ============  =================  ======================================================

    Returns:
        (): without a loss function, the output itself, its ``loss``, or the first of a tuple.

    Raises:
        ConfigError: there is no loss, or it is no scalar.
    """
    if isinstance(batch, Mapping):
        inputs = dict(cast("Mapping[str, Any]", batch))
        if loss_function is None:
            return _of_output(module(**inputs))
        if _LABELS not in inputs:
            raise ConfigError(
                got=f"A loss function was given, and batches with {', '.join(map(repr, inputs))}.",
                need='It compares the output with what is called "labels".',
                fix="Name the targets labels, or give batches that are tuples, the target last.",
            )
        target = inputs.pop(_LABELS)
        return _scalar(loss_function(module(**inputs), target), "loss_function")
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        parts = list(cast("Sequence[Any]", batch))
        if loss_function is None:
            return _of_output(module(*parts))
        return _scalar(loss_function(module(*parts[:-1]), parts[-1]), "loss_function")
    if loss_function is None:
        return _of_output(module(batch))
    return _scalar(loss_function(module(batch), batch), "loss_function")


def _of_output(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = cast("Mapping[str, Any]", output).get("loss")
    if found is None:
        found = output[0] if isinstance(output, tuple) and output else output
    return _scalar(found, "the module")


def _scalar(found: Any, who: str) -> Tensor:
    if isinstance(found, Tensor) and found.numel() == 1:
        return found.reshape(())
    what = (
        f"a tensor of shape {tuple(found.shape)}"
        if isinstance(found, Tensor)
        else f"a {type(found).__name__}"
    )
    raise ConfigError(
        got=f"The loss that {who} returned is {what}.",
        need="It is one number: a scalar, or the loss of what the module returns.",
        fix="Pass loss_function=nn.CrossEntropyLoss(), for example, or return the loss from the module.",
    )
