"""Weights written to disk shard by shard, as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from pantheraml.errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"5GB"`` (10**9) or ``"5GiB"`` (2**30).

    Raises:
        ConfigError: ``size`` is not a number with a unit, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", str(size).upper())
    count = size if isinstance(size, int) else int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count <= 0:
        raise ConfigError(
            got=f"max_shard_size={size!r} is not a size.",
            need="It limits each weight file and is a number of bytes or a number with a unit.",
            fix="Write max_shard_size='5GB'.",
        )
    return count


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int | str
) -> None:
    """Write ``tensors`` to ``model.safetensors``, or to shards with an index when one is too small.

    At most one shard of tensors is held beyond what the iterable itself holds. A tensor larger than
    ``max_shard_size`` gets a file of its own.

    Args:
        folder: an existing folder.
        tensors: names and CPU tensors, each name once.
        max_shard_size: bytes, or a size such as "5GB".
    """
    limit = parse_size(max_shard_size)
    shards: list[list[str]] = []
    sizes = parameters = held = 0
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > limit:
            flush()
            held = 0
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
        sizes += tensor.nbytes
        parameters += tensor.numel()
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_parameters": parameters, "total_size": sizes}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
