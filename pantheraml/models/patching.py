"""The ledger of what was swapped in one model.

A ``PatchSet`` changes instances (a model, its parts, its config, a wrapper around it), and can undo it: after
``revert()`` the model computes bitwise what it computed before. ``hooks/`` alone gives it a class of another library.
Each change says where, what and why; what could not be changed says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pantheraml.errors import ConfigError


class Change(NamedTuple):
    """One line of the ledger: the spot, what was done there ("skipped" if nothing), and the reason.

    The spot is a dotted path from the model for modules, a class name for attributes.
    """

    path: str
    what: str
    why: str


class _Absent:
    """Stands for an attribute that the object itself did not have."""


class _Spot:
    """One changed attribute and what it held before."""

    def __init__(self, owner: object, name: str, new: object, change: Change) -> None:
        self.owner, self.name, self.new, self.change = owner, name, new, change
        self.old = getattr(owner, name) if _holds(owner, name) else _Absent

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy of a model that carries its ledger has spots of its own.
        vars(self).update(state)
        _changed[id(self.owner), self.name] = self

    def restore(self) -> None:
        if self.old is _Absent:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.old)

    def is_ours(self) -> bool:
        """Whether the spot still holds what was put there."""
        current = getattr(self.owner, self.name, _Absent)
        return current is self.new or (isinstance(current, str) and current == self.new)


class _Hooks(_Spot):
    """Hooks on a module, of which there may be more."""

    def __init__(self, owner: nn.Module, handles: tuple[RemovableHandle, ...], change: Change) -> None:
        self.owner, self.name, self.change = owner, "hooks", change
        self.handles, self.old, self.new = handles, None, None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def restore(self) -> None:
        for handle in self.handles:
            handle.remove()

    def is_ours(self) -> bool:
        return True


# Where torch keeps the state of a module.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

# Every spot changed by a living PatchSet. A spot keeps its owner alive, so the id in its key stays true.
_changed: WeakValueDictionary[tuple[int, str], _Spot] = WeakValueDictionary()


class PatchSet:
    """Changes to one model that can be listed and undone.

    A deep copy or a pickle of the model keeps the changes, and its own ledger if the model carries it.
    """

    def __init__(self) -> None:
        self._spots: list[_Spot] = []
        self._skipped: list[Change] = []

    def replace(self, model: nn.Module, path: str, new: nn.Module, why: str) -> None:
        """Put ``new`` where the module ``path`` of ``model`` is.

        ``new`` must hold the old module's own Parameters, buffers and those of its children that it uses,
        under the same names. Training flag and hooks are taken over. If it has a method ``before_revert()``, that is
        called before the old module comes back.

        Raises:
            ConfigError: the state differs, the spot is already changed, or another library has put its own
                ``forward`` on the module.
        """
        parent_path, _, name = path.rpartition(".")
        parent, old = model.get_submodule(parent_path), model.get_submodule(path)
        _check_shares_state(path, old, new)
        if "forward" in vars(old):
            raise ConfigError(
                got=f"Another library put a forward of its own on {path} (device offloading, say).",
                need="Replacing the module would lose it.",
                fix="Swap fused parts in first, or leave this module as it is.",
            )
        what = f"{type(old).__name__} -> {type(new).__name__}"
        self._change(parent, name, new, Change(path, what, why))
        _take_over(old, new)

    def bind(self, owner: object, name: str, function: Callable[..., object], why: str) -> None:
        """Give ``owner`` a method: ``owner.name(...)`` calls ``function(owner, ...)``.

        A bound ``functools.partial`` rather than a method, which could not be pickled with its owner.
        """
        method: partial[object] = partial(function, owner)
        method.__name__ = getattr(function, "__name__", name)  # pyright: ignore[reportAttributeAccessIssue]
        method.__doc__ = getattr(function, "__doc__", None)
        self._set(owner, name, method, f"{name}() added", why)

    def set(self, owner: object, name: str, value: object, why: str) -> None:
        """Set a plain attribute, such as ``_attn_implementation`` of a config.

        Raises:
            ConfigError: the value, or what it would hide, is a module or tensor; or the spot is changed
                already.
        """
        self._set(owner, name, value, f"{name}={value!r}", why)

    def hook(
        self, module: nn.Module, path: str, before: Callable[..., Any], after: Callable[..., Any], why: str
    ) -> None:
        """Call ``before(module, args)`` and ``after(module, args, output)`` around each forward of ``module``.

        After an error in the forward, ``after`` is called with None.

        Args:
            module: any.
            path: of it, from the model.
            before: returns None; picklable, as the model is.
            after: likewise.
            why: the reason.
        """
        handles = (
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True),
        )
        self._spots.append(_Hooks(module, handles, Change(path, "hooks added", why)))

    def skip(self, path: str, reason: str) -> None:
        """Record that ``path`` was left as it is, and why."""
        self._skipped.append(Change(path, "skipped", reason))

    def report(self) -> list[Change]:
        """What was changed, in order, then what was skipped."""
        return [spot.change for spot in self._spots] + self._skipped

    def revert(self) -> None:
        """Undo every change, the last first; a second call does nothing.

        Raises:
            ConfigError: something else has since been put on a changed spot; nothing is undone then.
        """
        lost = [spot.change.path for spot in self._spots if not spot.is_ours()]
        if lost:
            raise ConfigError(
                got=f"{', '.join(lost)} no longer holds what this PatchSet put there.",
                need="Undoing would throw away what another change put in its place.",
                fix="Undo the later change first.",
            )
        while self._spots:
            spot = self._spots.pop()
            if isinstance(spot.new, nn.Module) and isinstance(spot.old, nn.Module):
                getattr(spot.new, "before_revert", lambda: None)()
                _take_over(spot.new, spot.old)
            spot.restore()
            _changed.pop((id(spot.owner), spot.name), None)
        self._skipped.clear()

    def _set(self, owner: object, name: str, value: object, what: str, why: str) -> None:
        place = (owner if isinstance(owner, type) else type(owner)).__name__
        held = getattr(owner, name, None)
        if isinstance(value, nn.Module | Tensor) or isinstance(held, nn.Module | Tensor):
            raise ConfigError(
                got=f"{name!r} of {place} is, or would become, a module or tensor.",
                need="Changing it as an attribute would change the names in the state dict.",
                fix="Use PatchSet.replace for modules.",
            )
        self._change(owner, name, value, Change(place, what, why))

    def _change(self, owner: object, name: str, new: object, change: Change) -> None:
        key = (id(owner), name)
        if key in _changed:
            raise ConfigError(
                got=f"{name!r} of {type(owner).__name__} is already changed ({_changed[key].change.what}).",
                need="Two changes of one spot could not be undone in any order.",
                fix="Call revert() on the PatchSet that changed it first.",
            )
        spot = _Spot(owner, name, new, change)
        setattr(owner, name, new)
        self._spots.append(spot)
        _changed[key] = spot


def _holds(owner: object, name: str) -> bool:
    """Whether the object itself holds the attribute: as submodule, in its dict, or behind a property."""
    if isinstance(owner, nn.Module) and name in vars(owner)["_modules"]:
        return True
    return name in vars(owner) or hasattr(getattr(type(owner), name, None), "__set__")


def _check_shares_state(path: str, old: nn.Module, new: nn.Module) -> None:
    """Refuse ``new`` unless its Parameters, buffers and children are the very ones of ``old``."""
    wrong: set[str] = set()
    for before, after in (
        (old.named_parameters(remove_duplicate=False), new.named_parameters(remove_duplicate=False)),
        (old.named_buffers(remove_duplicate=False), new.named_buffers(remove_duplicate=False)),
    ):
        was, becomes = dict(before), dict(after)
        wrong |= {name for name in {**was, **becomes} if was.get(name) is not becomes.get(name)}
    children: dict[str, nn.Module] = vars(old)["_modules"]
    wrong |= {name for name, child in new.named_children() if children.get(name) is not child}
    if wrong or list(old.state_dict()) != list(new.state_dict()):
        what = ", ".join(sorted(wrong)) or "its state dict"
        raise ConfigError(
            got=f"{type(new).__name__} for {path} does not share {what}.",
            need="A swapped module keeps every Parameter, buffer and child under its name, so that "
            "optimizers, adapters and checkpoints see the same model.",
            fix="Assign the old module's own objects to the new module.",
        )


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` what ``old`` holds: state, hooks and the training flag.

    The registries themselves are shared. So an adapter put on a child later, a hook removed by its
    handle, or a buffer moved to another device is seen by both, and undoing the swap loses none of it.
    """
    same = set(old.modules())
    for module in new.modules():
        if module not in same:
            module.training = old.training
    for name, value in vars(old).items():
        if name in _REGISTRIES or "_hook" in name:
            vars(new)[name] = value


def is_foreign(hook: Any) -> bool:
    """Whether a hook is another library's; our own ones act in training only."""
    return not str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("pantheraml.")


@contextmanager
def changed_within() -> Generator[PatchSet]:
    """A block whose changes are undone at its end, whatever happens there."""
    patches = PatchSet()
    try:
        yield patches
    finally:
        patches.revert()
