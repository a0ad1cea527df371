"""Where in a model a dropout is called: a number that is the same in the forward, and when a layer is computed again.

torch asks a ``TorchFunctionMode`` before each of its functions, so that none is patched. Hooks on modules enter it with
the outermost call and keep a stack of those that compute, one in each thread: every GPU has a thread of autograd's that
computes layers again.

    number = f(path of the module, which call of it within its parent, which dropout within that call)

Parents are not part of the number: of a layer that is computed again they are not there.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from pantheraml.errors import ConfigError
from pantheraml.models.dropout_calls import ANSWERS, Place
from pantheraml.models.own_dropout import inside, is_dropout, own_shares
from pantheraml.models.patching import PatchSet
from pantheraml.models.sharded_linear import tensor_group_of
from pantheraml.models.token_keys import TokenKeys, current_keys, mixed

# Numbers of adapters are below.
_FIRST = 2**63
# Where transformers puts what layers are to recompute by; of a layer it computes the forward again, without hooks.
_CHECKPOINT = "_gradient_checkpointing_func"


@dataclass
class Site:
    """A module that drops, or has parts that do.

    Attributes:
        path: from the model.
        number: 64 bits that follow from the path.
        part: which part of the heads this rank has, where ranks compute each layer together.
        is_repeated: whether its parent has ever called it more than once.
    """

    path: str
    number: int
    part: int
    is_repeated: bool = False


@dataclass
class _Frame:
    """A call of a module on its way: which one of its parent's calls it is, and what it has called so far."""

    site: Site
    index: int
    drops: int = 0
    called: Counter[str] = field(default_factory=Counter[str])

    def next_place(self) -> Place:
        """Of the dropout that it calls now."""
        self.drops += 1
        return Place(_FIRST | mixed(self.site.number, self.index, self.drops) >> 1, self.site.part)

    def copied(self) -> _Frame:
        return replace(self, called=self.called.copy())


class _Stack(threading.local):
    """Of this thread, for the pass whose keys are these; calls are caught while it is not empty."""

    def __init__(self) -> None:
        self.keys: TokenKeys | None = None
        self.frames = list[_Frame]()

    def put(self, frames: list[_Frame]) -> None:
        """Have these, and catch calls or let them be."""
        if bool(frames) != bool(self.frames):
            _catching.__enter__() if frames else _catching.__exit__(None, None, None)
        self.frames = frames


_stack = _Stack()


def _frames() -> list[_Frame] | None:
    """What computes now, the innermost last; None where dropout inside the model does not follow samples."""
    if torch.compiler.is_compiling():
        return None
    keys = current_keys()
    if keys is None or not keys.inside:
        return None
    if _stack.keys is not keys:  # whatever an interrupt left of another pass goes with it
        leave_all()
        _stack.keys = keys
    return _stack.frames


class _Catching(TorchFunctionMode):
    """What torch asks before every one of its functions, in the thread that has entered it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The answer to ``func``, or what torch says."""
        kwargs = kwargs or {}
        answer = ANSWERS.get(func)
        frames = _frames() if answer is not None else None
        found = answer(frames[-1].next_place, *args, **kwargs) if answer is not None and frames else None
        return func(*args, **kwargs) if found is None else found


_catching = _Catching()


def _enter(site: Site, module: nn.Module, args: Any) -> None:
    """Before a module computes."""
    frames = _frames()
    if frames is None:
        return
    index = 0
    if frames:
        called = frames[-1].called
        index = called[site.path]
        called[site.path] += 1
        site.is_repeated = site.is_repeated or index > 0
    elif site.is_repeated and _is_backward():
        raise _not_told_apart(f"{site.path} is called several times in a forward, and computed again")
    _stack.put([*frames, _Frame(site, index)])
    given = vars(module).get(_CHECKPOINT)
    if (
        given is not None
        and given is not checkpointed
        and getattr(given, "func", None) is not _checkpointed_by
    ):
        setattr(module, _CHECKPOINT, partial(_checkpointed_by, given))


def _leave(site: Site, module: nn.Module, args: Any, output: Any) -> None:
    """After it has, or after an error in it, which may have come before ``_enter``."""
    frames = _frames()
    mine = [index for index, frame in enumerate(frames or ()) if frame.site is site]
    if frames and mine:
        _stack.put(frames[: mine[-1]])


def leave_all() -> None:
    """Let calls be, in this thread: the pass is over, or was interrupted."""
    _stack.put([])
    _stack.keys = None


@contextmanager
def called(module: nn.Module) -> Iterator[None]:
    """What computes in the place of a call of ``module``."""
    site = _site_of(module)
    if site is None:
        yield
        return
    _enter(site, module, ())
    try:
        yield
    finally:
        _leave(site, module, (), None)


def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch's checkpoint, non-reentrant; what is computed again drops where it did in the forward."""
    return checkpoint(_repeatable(function), *args, use_reentrant=False, **kwargs)


def _checkpointed_by(
    checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Likewise, by the ``checkpoint`` that a layer was given."""
    return checkpoint(_repeatable(function), *args, **kwargs)


def _repeatable(function: Callable[..., Any]) -> Callable[..., Any]:
    frames = _frames()
    return function if frames is None else _Repeatable(function, [frame.copied() for frame in frames])


class _Repeatable:
    """A function that is computed within the same calls every time.

    Args:
        function: called for the first time where this is made.
        frames: of that place.
    """

    def __init__(self, function: Callable[..., Any], frames: list[_Frame]) -> None:
        self._function, self._there, self._is_known = function, frames, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_known:
            self._is_known = True
            return self._function(*args, **kwargs)
        before = _frames()
        if before is None:
            return self._function(*args, **kwargs)
        _stack.put([frame.copied() for frame in self._there])
        try:
            return self._function(*args, **kwargs)
        finally:
            _stack.put(before)


def number_sites(model: nn.Module, patches: PatchSet) -> None:
    """Let dropout inside ``model`` have numbers; a second call changes nothing.

    Args:
        model: as it is trained, before it is wrapped for several ranks.
        patches: the ledger.
    """
    is_layer = {id(layer) for one in model.modules() if isinstance(one, nn.ModuleList) for layer in one}
    for path, module in inside(model):
        drops = is_dropout(module) or any(own_shares(module))
        is_place = (
            drops or module is model or id(module) in is_layer or hasattr(module, "gradient_checkpointing")
        )
        if not is_place or _site_of(module) is not None:
            continue
        number = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest())
        group = tensor_group_of(module)
        site = Site(path or type(module).__name__, number, 0 if group is None else group.index)
        before, after = partial(_enter, site), partial(_leave, site)
        patches.hook(module, path, before, after, "masks of dropout follow from the sample")


def _site_of(module: nn.Module) -> Site | None:
    hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, partial))
    return next((hook.args[0] for hook in hooks if hook.func is _enter), None)


def _is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _not_told_apart(what: str) -> ConfigError:
    return ConfigError(
        got=f"Dropout cannot be repeated: {what}.",
        need="What is computed again in the backward drops what it dropped in the forward.",
        fix="Write use_gradient_checkpointing=False (gradient_checkpointing=False in the arguments), or set this "
        "model's dropout to 0.",
    )
