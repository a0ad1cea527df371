"""Several 4-bit weights unpacked, each to its own place, in one launch.

Shapes: weights W_i (N_i, K_i) in 4 bits as ``nf4`` describes them, targets (N_i, K_i) whose rows may lie apart. Every
value is what ``unpack_4bit`` gives, bit by bit: both kernels unpack words by the same function.

A launch costs the host tens of microseconds whatever the size of the weight, and a layer unpacks seven weights forward
and seven backward: with short samples a step waits for that. A table on the device lists where each weight lies, where
it goes, and the first of its programs,

    program p  ->  entry e, the last with first_e <= p  ->  tile p - first_e of weight e

so one grid serves weights of any sizes without a program to spare, and the kernel has one argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantheraml.kernels.launch import FixedLaunch, jit, launching_on, runs_triton, tl
from pantheraml.kernels.nf4 import TILE, fill, read_state, unpack_words

# Values in a word of 4 bytes, the kernel's unit.
_PER = 8
# Where an entry starts that is none: behind every program.
_NEVER = 2**62


class _Part(NamedTuple):
    """A weight and its place: the arguments of ``nf4.fill``, plain tensors all."""

    out: Tensor
    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested: list[Tensor]
    blocks: list[int]

    @property
    def kind(self) -> tuple[object, ...]:
        """What all weights of one launch have in common."""
        return self.out.dtype, self.out.device, tuple(self.blocks), bool(self.nested)

    @property
    def programs(self) -> int:
        """How many programs unpack it."""
        return -(-self.out.numel() // (_PER * TILE["WORDS"]))

    @property
    def is_even(self) -> bool:
        """Whether the kernel can take it: whole words and rows, where 16 bytes may be loaded and stored at once."""
        out, size, gap = self.out, self.packed.numel() * self.packed.element_size(), self._gap
        return (
            out.dtype in _NAMES
            and out.stride(1) == 1
            and out.shape[1] % _PER == 0
            and gap % _PER == 0
            and 0 <= gap < 2**31
            and size % 16 == 0
            and size * 2 == out.numel()
            # Words are counted in int32, up to the end of the last tile.
            and size // 4 + TILE["WORDS"] <= 2**31
            and self.blocks[0] % _PER == 0
            and out.data_ptr() % 16 == 0
            and self.packed.data_ptr() % 16 == 0
            and self._has_plain_scales
        )

    @property
    def _gap(self) -> int:
        """Elements between the end of a row of the target and the start of the next."""
        return self.out.stride(0) - self.out.shape[1]

    @property
    def _has_plain_scales(self) -> bool:
        """Whether scales and tables have the dtypes the kernel reads, and all lies beside the target."""
        floats = (self.code, *self.nested) if self.nested else (self.code, self.absmax)
        known = all(x.dtype == torch.float32 for x in floats)
        return (
            known
            and (not self.nested or self.absmax.dtype == torch.uint8)
            and all(
                x.is_contiguous() and x.device == self.out.device for x in (self.packed, self.absmax, *floats)
            )
        )

    def entry(self, first: int) -> list[int]:
        """Its column of the table, ``first`` being its first program."""
        absmax2, code2, offset = self.nested or (self.absmax, self.code, self.code)
        tensors = self.packed, self.absmax, self.code, absmax2, code2, offset, self.out
        words, words_in_row = self.out.numel() // _PER, self.out.shape[1] // _PER
        return [first, *(x.data_ptr() for x in tensors), words, words_in_row, self._gap]


@jit
def _unpack_table_kernel(
    table_ptr, OUT: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr,
    ENTRIES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The table is (11, ENTRIES) int64, ENTRIES a power of two; ``_Part.entry`` makes its columns."""
    program = tl.program_id(0)
    # Loads at once and a sum within a warp: a search by halves would wait for memory at every step.
    firsts = tl.load(table_ptr + tl.arange(0, ENTRIES))
    table_ptr += tl.sum((firsts <= program).to(tl.int32), 0) - 1
    tile = program - tl.load(table_ptr).to(tl.int32)
    ABSMAX: tl.constexpr = tl.uint8 if NESTED else tl.float32
    packed = tl.load(table_ptr + 1 * ENTRIES).to(tl.pointer_type(tl.int32))  # pyright: ignore[reportArgumentType]
    absmax = tl.load(table_ptr + 2 * ENTRIES).to(tl.pointer_type(ABSMAX))  # pyright: ignore[reportArgumentType]
    code = tl.load(table_ptr + 3 * ENTRIES).to(tl.pointer_type(tl.float32))  # pyright: ignore[reportArgumentType]
    absmax2 = tl.load(table_ptr + 4 * ENTRIES).to(tl.pointer_type(tl.float32))  # pyright: ignore[reportArgumentType]
    code2 = tl.load(table_ptr + 5 * ENTRIES).to(tl.pointer_type(tl.float32))  # pyright: ignore[reportArgumentType]
    offset = tl.load(table_ptr + 6 * ENTRIES).to(tl.pointer_type(tl.float32))  # pyright: ignore[reportArgumentType]
    out = tl.load(table_ptr + 7 * ENTRIES).to(tl.pointer_type(OUT))  # pyright: ignore[reportArgumentType]
    words = tl.load(table_ptr + 8 * ENTRIES).to(tl.int32)
    words_in_row = tl.load(table_ptr + 9 * ENTRIES).to(tl.int32)
    gap = tl.load(table_ptr + 10 * ENTRIES).to(tl.int32)
    # What ``is_even`` has made sure of; without it words and values would be loaded and stored one by one.
    packed = tl.multiple_of(packed, 16)
    out = tl.multiple_of(out, 16)
    words = tl.multiple_of(words, 4)
    gap = tl.multiple_of(gap, 8)
    word = tile * WORDS + tl.arange(0, WORDS)
    there = word < words
    value = unpack_words(
        word, there, packed, absmax, code, absmax2, code2, offset, 8, BLOCK, BLOCK2, NESTED
    )  # fmt: skip
    at = word.to(tl.int64) * 8 + (word // words_in_row).to(tl.int64) * gap
    tl.store(out + (at[:, None] + tl.arange(0, 8)[None, :]), value.to(OUT), mask=there[:, None])


class UnpackTable:
    """4-bit weights and where each goes: listed once, unpacked as often as asked.

    The table holds the weights and targets it was given, and so their memory. It does not see a weight or a state
    change its tensors (``model.to`` moves them): whoever does that makes a new table. What changes inside the tensors
    is seen.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Any]], targets: Sequence[Tensor]) -> None:
        """List what goes where.

        One launch serves weights that share blocksize, kind of statistics, device and dtype of the target, where rows
        and words are whole and aligned to 16 bytes: all of a layer, usually. Others are unpacked one by one.

        Args:
            weights: the bytes of each, contiguous, and their ``bitsandbytes.functional.QuantState``.
            targets: for each an (N, K) of any floating dtype with stride 1 along a row; rows may lie apart. No two
                overlap.
        """
        self._parts = [
            # Attributes of bitsandbytes' Parameters go through Python, hence their plain tensors.
            _Part(target, packed.data, *read_state(state))
            for (packed, state), target in zip(weights, targets, strict=True)
            if target.numel()
        ]
        self._launch: FixedLaunch | None = None
        if self._fits_one_launch():
            self._list()

    @property
    def is_one_launch(self) -> bool:
        """Whether one launch unpacks all of them."""
        return self._launch is not None

    def write(self) -> None:
        """Unpack every weight to its target."""
        if self._launch is not None:
            with launching_on(self._parts[0].out):
                self._launch()
            return
        with torch.no_grad():
            for part in self._parts:
                with launching_on(part.out):
                    fill(*part)

    def _fits_one_launch(self) -> bool:
        parts = self._parts
        return (
            bool(parts)
            and runs_triton(parts[0].out)
            and len({part.kind for part in parts}) == 1
            and all(part.is_even for part in parts)
        )

    def _list(self) -> None:
        """Make the table and its launch."""
        out, *_, nested, blocks = self._parts[0]
        columns, programs = [], 0
        for part in self._parts:
            columns.append(part.entry(programs))
            programs += part.programs
        entries = 1 << (len(columns) - 1).bit_length()
        columns += [[_NEVER] + [0] * (len(columns[0]) - 1)] * (entries - len(columns))
        table = torch.tensor(columns, dtype=torch.int64).T.contiguous().to(out.device)
        arguments = table, _NAMES[out.dtype], blocks[0], blocks[-1], bool(nested), entries, TILE["WORDS"]
        self._launch = FixedLaunch(
            _unpack_table_kernel,
            (programs, 1, 1),
            arguments,
            num_warps=TILE["num_warps"],
            enable_fp_fusion=False,
        )


_NAMES = {} if tl is None else {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip
