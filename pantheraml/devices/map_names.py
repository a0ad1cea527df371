"""Device maps in the form of transformers: from names of modules to GPUs, written and read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Protocol

from pantheraml.devices.device_map import Placement
from pantheraml.errors import ConfigError, did_you_mean

_GPU = re.compile(r"(?:cuda:)?(\d+)")
_EXAMPLE = 'Write device_map={"model": 0, "lm_head": 1}, for example, or device_map="balanced".'


class Paths(Protocol):
    """Where the parts of a model are, as dotted paths; a ``ModelFamily`` is one."""

    @property
    def embedding(self) -> str:
        """The embedding of tokens."""
        ...

    @property
    def layers(self) -> str:
        """The list of decoder layers."""
        ...

    @property
    def final_norm(self) -> str:
        """The norm before the head."""
        ...

    @property
    def head(self) -> str:
        """The head."""
        ...

    @property
    def not_text(self) -> tuple[str, ...]:
        """What stands beside the language model."""
        ...


def as_device_map(placement: Placement, paths: Paths) -> dict[str, int]:
    """``placement`` with a name for every module; rotary angles are with the first layer, the norm with the head."""
    return {
        **dict.fromkeys(paths.not_text, placement.embedding),
        paths.embedding: placement.embedding,
        **{f"{paths.layers}.{index}": gpu for index, gpu in enumerate(placement.layers)},
        paths.final_norm: placement.head,
        _rotary(paths): placement.layers[0],
        paths.head: placement.head,
    }


def read_device_map(
    mapping: Mapping[str, object], paths: Paths, num_layers: int, *, tied: bool = False
) -> Placement:
    """The placement that a user wrote.

    Args:
        mapping: from names of modules to GPUs (``1``, ``"1"``, ``"cuda:1"``, or a torch device); the longest name that
            a module begins with counts, so that ``{"model": 0, "lm_head": 1}`` is enough. What it says of the final
            norm and of rotary angles is not followed: the norm goes with the head, angles with the first layer.
        paths: where the parts are.
        num_layers: of the model.
        tied: whether the head is the embedding; one of the two names then is enough.

    Returns:
        A placement for which nothing is predicted.

    Raises:
        ConfigError: names that are no parts, parts without a place, places that are no GPU, or layers that go back to a
            GPU that they had left.
    """
    layers = [f"{paths.layers}.{index}" for index in range(num_layers)]
    parts = [paths.embedding, *layers, paths.head]
    known = [*parts, paths.final_norm, _rotary(paths), *paths.not_text]
    _check_names(mapping, known, paths)
    places = {name: _gpu(name, value) for name, value in mapping.items()}
    found = {part: _place_of(part, places) for part in parts}
    if tied:
        _settle_tied(found, paths)
    missing = [part for part, gpu in found.items() if gpu is None]
    if missing:
        raise ConfigError(
            got=f"device_map places {len(parts) - len(missing)} of {len(parts)} parts; it lacks {_listed(missing)}.",
            need="Embedding, every layer and the head need a GPU.",
            fix=f"Add {missing[0]!r}, or a name that it begins with.",
        )
    gpus = {part: gpu for part, gpu in found.items() if gpu is not None}
    order = tuple(gpus[layer] for layer in layers)
    _check_order(order)
    return Placement(gpus[paths.embedding], order, gpus[paths.head], {}, {}, {})


def _rotary(paths: Paths) -> str:
    """The module of rotary angles, which stands beside the layers."""
    return f"{paths.layers.rpartition('.')[0]}.rotary_emb"


def _check_names(mapping: Mapping[str, object], known: list[str], paths: Paths) -> None:
    """Refuse names that no part begins with, and those of modules inside a part."""
    for name in mapping:
        if any(_begins(part, str(name)) for part in known):
            continue
        inside = next((part for part in known if _begins(str(name), part)), None)
        if inside is not None:
            raise ConfigError(
                got=f"device_map places {name!r}, which is inside {inside!r}.",
                need="A layer is computed in one piece, on one GPU; so are embedding and head.",
                fix=f"Write {inside!r} in its place.",
            )
        whole = [part for part in known if not part.startswith(f"{paths.layers}.")]
        last = sum(part.startswith(f"{paths.layers}.") for part in known) - 1
        raise ConfigError(
            got=f"device_map places {name!r}, which is no part of this model.",
            need=f"Its parts are '{paths.layers}.0' to '{paths.layers}.{last}', {_listed(whole, most=9)}.",
            fix=did_you_mean(str(name), [paths.layers, *whole]) or "Remove it.",
        )


def _gpu(name: str, value: object) -> int:
    is_name = isinstance(value, int | str) or type(value).__name__ == "device"
    found = _GPU.fullmatch(str(value)) if is_name and not isinstance(value, bool) else None
    if found is None:
        raise ConfigError(
            got=f"device_map puts {name!r} on {value!r}.",
            need="Weights that are trained stay on GPUs, named 0, '0' or 'cuda:0'; host and disk hold none of them.",
            fix=_EXAMPLE,
        )
    return int(found[1])


def _place_of(part: str, places: Mapping[str, int]) -> int | None:
    names = [name for name in places if _begins(part, name)]
    return places[max(names, key=len)] if names else None


def _begins(path: str, start: str) -> bool:
    """Whether ``path`` is ``start`` or inside of it; everything is inside of the model itself, the empty name."""
    return start == "" or f"{path}.".startswith(f"{start}.")


def _settle_tied(found: dict[str, int | None], paths: Paths) -> None:
    embedding, head = found[paths.embedding], found[paths.head]
    if embedding is not None and head is not None and embedding != head:
        raise ConfigError(
            got=f"device_map puts {paths.embedding!r} on GPU {embedding} and {paths.head!r} on GPU {head}.",
            need="This model's head is its embedding: one weight, on one GPU.",
            fix="Give both the GPU of the last layers.",
        )
    found[paths.embedding] = found[paths.head] = head if embedding is None else embedding


def _check_order(order: tuple[int, ...]) -> None:
    left: set[int] = set()
    for index, (before, gpu) in enumerate(pairwise(order), start=1):
        if gpu != before:
            left.add(before)
        if gpu in left:
            raise ConfigError(
                got=f"device_map puts layer {index} on GPU {gpu}, which the layers before it had left.",
                need="The layers of a GPU are neighbours, so that a token comes to each GPU once.",
                fix=_EXAMPLE,
            )


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(map(repr, names[:most])) + (", …" if len(names) > most else "")
