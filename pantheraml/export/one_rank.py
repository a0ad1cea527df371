"""Saving by rank 0 of a model that a script saves on every rank: the others help to gather what ranks share out.

A trainer that saves on each machine says itself which ranks write (``written_here``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from peft import PeftModel
from torch import nn

from pantheraml.distributed.process_group import is_first_of_group
from pantheraml.export.gathered import gathered
from pantheraml.export.gathering import saved_together
from pantheraml.models.sharding import is_sharded
from pantheraml.models.shares import gathered_weights
from pantheraml.models.zero3 import whole_on_first

_OTHER_FORMS = {"variant", "save_original_format"}
Method = TypeVar("Method", bound=Callable[..., Any])


_is_written_here: ContextVar[bool] = ContextVar("_is_written_here", default=False)


@contextmanager
def written_here() -> Iterator[None]:
    """A block that only ranks enter which write: the first one, or that of each machine."""
    before = _is_written_here.set(True)
    try:
        yield
    finally:
        _is_written_here.reset(before)


def by_one_rank(method: Method) -> Method:
    """``method`` on rank 0 alone, or where it is ``written_here``.

    Where ranks share out trained weights it gets them as ``state_dict``. They come as they are written, but where
    transformers is to write them in another form than checkpoints have.
    """

    @functools.wraps(method)
    def save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_first = is_first_of_group() or _is_written_here.get()
        with ExitStack() as opened:
            if is_sharded(model) and not isinstance(model, PeftModel) and "state_dict" not in kwargs:
                if _OTHER_FORMS & kwargs.keys():
                    kwargs["state_dict"] = gathered_weights(model, keep=is_first)
                else:
                    kwargs["state_dict"] = opened.enter_context(gathered(model, keep=is_first))
            opened.enter_context(whole_on_first(model, is_first=is_first))
            return method(model, *args, **kwargs) if is_first else None

    return cast(Method, save)


def merging_by_one_rank(
    gather: Callable[[nn.Module, dict[str, Any]], None],
) -> Callable[[Method], Method]:
    """A decorator: the method, which reads weight by weight what is merged, on rank 0 alone.

    Args:
        gather: what the others do where ranks share out the weights; gets the model and the method's arguments.
    """

    def on_rank_0(method: Method) -> Method:
        @functools.wraps(method)
        def save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            is_first = is_first_of_group()
            with whole_on_first(model, is_first=is_first):
                if is_first or not is_sharded(model):
                    return saved_together(model, lambda: method(model, *args, **kwargs))
                given = inspect.signature(method).bind(model, *args, **kwargs)
                given.apply_defaults()
                gather(model, {**given.arguments, **given.arguments.get("options", {})})
            return None

        return cast(Method, save)

    return on_rank_0
