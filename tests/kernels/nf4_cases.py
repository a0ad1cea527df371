"""Packed weights and what bitsandbytes makes of them, for the CPU, interpreter and GPU tests."""

from __future__ import annotations

import itertools

import torch

from pantheraml.kernels.nf4 import unpack_4bit
from pantheraml.kernels.unpack_table import UnpackTable

# (N, K), blocksize: odd rows, one row, a last block and a last word that are not full, more than one outer block
SHAPES = [
    ((128, 192), 64),
    ((1, 64), 64),
    ((33, 40), 32),
    ((5, 3), 64),
    ((7, 11), 64),
    ((300, 66), 128),
    ((16, 8192), 4096),
]


def packed(shape, dtype, blocksize=64, kind="nf4", nested=True, device="cpu", storage=torch.uint8):
    """Bytes and state of a random weight with a zero block and an outlier."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02
    weight.view(-1)[: min(blocksize, weight.numel() // 2)] = 0
    weight.view(-1)[-1] = 3.0
    return bnb.quantize_4bit(
        weight.to(device, dtype), blocksize=blocksize, compress_statistics=nested, quant_type=kind,
        quant_storage=storage,
    )  # fmt: skip


def theirs(data, state):
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(data, state)


def spread(shape, dtype, device="cpu", gap=5):
    """An output whose rows lie apart, and the whole it lies in, filled with a sign of what must not be touched."""
    whole = torch.full((shape[0], shape[1] + gap), 77.0, dtype=dtype, device=device)
    return whole[:, : shape[1]], whole


# What one table lists: one weight, q, k and v, a layer whose inputs differ; last tiles are full or not. Rows hold whole
# blocks: bitsandbytes 0.50 on a CPU lets blocks begin with rows where it unpacks, though not where it packs.
TABLES = [
    [(128, 192)],
    [(128, 192), (32, 192), (36, 192)],
    [(96, 64), (33, 64), (33, 64), (64, 128), (192, 64), (192, 64), (64, 192)],
]


def stacks(shapes, dtype, device="cpu", margin=64):
    """Targets for weights of these shapes, and the buffers they lie in, one for neighbours of the same K.

    As in a layer's stacks they lie one below the other with ``margin`` rows and columns beside them, which are filled
    with a sign of what must not be touched.
    """
    targets, wholes, row = [], [], 0
    for index, (rows, cols) in enumerate(shapes):
        if not wholes or cols + margin != wholes[-1].shape[1]:
            below = list(itertools.takewhile(lambda shape: shape[1] == cols, shapes[index:]))
            height, row = sum(shape[0] for shape in below) + margin, 0
            wholes.append(torch.full((height, cols + margin), 77.0, dtype=dtype, device=device))
        targets.append(wholes[-1][row : row + rows, :cols])
        row += rows
    return targets, wholes


def check_table(shapes, dtype, device="cpu", margin=64, **how):
    """Write a table twice and compare every bit; the second launch takes what the first has compiled."""
    weights = [packed(shape, dtype, device=device, **how) for shape in shapes]
    targets, wholes = stacks(shapes, dtype, device, margin)
    table = UnpackTable(weights, targets)
    untouched = [whole.clone() for whole in wholes]
    for whole in untouched:
        whole[: whole.shape[0] - margin, : whole.shape[1] - margin] = 0
    for _ in range(2):
        for target in targets:
            target.fill_(55)
        table.write()
        for (data, state), target in zip(weights, targets, strict=True):
            assert torch.equal(target, theirs(data, state))
            target.zero_()
        assert all(torch.equal(whole, other) for whole, other in zip(wholes, untouched, strict=True))
    return table


def check_odd_tables(dtype, device="cpu"):
    """Those of "even" are unpacked in one launch, all others one by one, and right."""
    for name, (weights, targets) in odd_tables(dtype, device).items():
        table = UnpackTable(weights, targets)
        assert table.is_one_launch == (name == "even"), name
        table.write()
        for weight, target in zip(weights, targets, strict=True):
            assert torch.equal(target, unpack_4bit(*weight, torch.empty_like(target))), name


def odd_tables(dtype, device="cpu"):
    """By name, weights and targets that differ from those of "even" in one thing."""
    usual = packed((32, 64), dtype, device=device)

    def room(shape=(32, 64), gap=64, dtype=dtype):
        return spread(shape, dtype, device, gap)[0]

    shifted = torch.cat([usual[0].new_zeros(8, 1), usual[0]])[8:]
    behind = torch.empty(32 * 64 + 2, dtype=dtype, device=device)[2:].view(32, 64)
    beside = {
        "even": (usual, room()),
        "rows of part of a word": (packed((32, 12), dtype, device=device), room((32, 12))),
        "words that are no multiple of 4": (packed((3, 8), dtype, device=device), room((3, 8))),
        "a gap of part of a word": (usual, room(gap=5)),
        "packed between 16 bytes": ((shifted, usual[1]), room()),
        "a target between 16 bytes": (usual, behind),
        "not nested": (packed((32, 64), dtype, nested=False, device=device), room()),
        "another blocksize": (packed((32, 64), dtype, 128, device=device), room()),
        "another dtype": (usual, room(dtype=torch.float64)),
    }
    return {name: ([usual, weight], [room(), target]) for name, (weight, target) in beside.items()}
