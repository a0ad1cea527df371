"""A micro-batch in several passes: whole rows, or whole documents of a packed row, up to so many tokens each.

The loss is a sum over label tokens divided by the number of those in the whole step, and no row sees another one; so
its gradient is the same however rows are cut, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantheraml.training.rank_batches import LABEL_AT, without_labels
from pantheraml.training.sample_keys import KEYS, NUMBERS

Batch = dict[str, Any]
# What a row of documents may have: values of tokens, and offsets with the longest document. With anything else it stays
# whole.
_OF_TOKENS = {"input_ids", "labels", "position_ids", "seq_idx", KEYS}
_OFFSETS = {"cu_seq_lens_q": "max_length_q", "cu_seq_lens_k": "max_length_k"}
# What else a batch may tell of its tokens.
_BESIDE = {*_OFFSETS, "label_index"}
_OF_ROWS = {"attention_mask", "position_ids", "seq_idx"}
# Tokens of a pass that trains nothing.
FEW = 16


def num_tokens(batch: Batch) -> int:
    """Tokens of a pass, padding included; 0 for one whose tokens are not there as numbers."""
    ids = batch.get("input_ids")
    return 0 if ids is None else ids.numel()


def cut_batch(batch: Batch, most: int) -> list[Batch]:
    """``batch`` in passes of up to ``most`` tokens, or of one row or document where that has more.

    Args:
        batch: rows (B, S), or one row of documents (1, T) whose positions begin anew.
        most: tokens of a pass, padding included.
    """
    rows = len(batch["input_ids"]) if "input_ids" in batch else 0
    if rows == 0 or num_tokens(batch) <= most:
        return [batch]
    if rows == 1:
        return _cut_documents(batch, most)
    each = max(1, most // batch["input_ids"][0].numel())
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    if any(len(value) != rows for value in tensors.values()):  # patches of images, say
        return [batch]
    return [
        batch
        | {name: value[at : at + each] for name, value in tensors.items()}
        | _numbers(batch, slice(at, at + each), rows)
        for at in range(0, rows, each)
    ]


def _cut_documents(batch: Batch, most: int) -> list[Batch]:
    positions = batch.get("position_ids")
    tensors = {name for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    if positions is None or not tensors <= {*_OF_TOKENS, *_OFFSETS}:
        return [batch]
    starts = (positions[0, 1:] == 0).nonzero()[:, 0].add(1).tolist()
    lengths = [after - start for start, after in pairwise([0, *starts, positions.shape[1]])]
    found: list[Batch] = []
    for part in _parts(lengths, most):
        one = batch | {name: batch[name][:, part.tokens] for name in tensors & _OF_TOKENS}
        one |= _numbers(batch, part.documents, len(lengths))
        for offsets, longest in _OFFSETS.items():
            if offsets in batch:
                one[offsets] = _offsets_of(batch[offsets], part)
                one[longest] = max(lengths[part.documents])
        found.append(one)
    return found


def filler(batch: Batch) -> Batch:
    """A few tokens of ``batch``, none of which is a label: for a pass that others need this rank in.

    A batch that has more than tokens (patches of images, say) gives a whole row.
    """
    ids = batch.get("input_ids")
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    tokens = {name: value for name, value in tensors.items() if ids is not None and value.shape == ids.shape}
    if tensors.keys() - tokens.keys() - _BESIDE:
        return without_labels(cut_batch(batch, 1)[0])
    # Without a mask no token is padding, and without positions they are those of one document.
    kept = {name: value[:1, :FEW] for name, value in tokens.items() if name not in _OF_ROWS}
    return kept | {"labels": torch.full_like(kept["labels"], -100)}


def cut_flat(batch: Batch, most: int) -> list[Batch]:
    """A batch of ``FlatCollator`` in several of them, of up to ``most`` tokens or of one document."""
    found: list[Batch] = []
    for part in _parts(batch["lengths"], most):
        first, last, label_at = part.tokens.start, part.tokens.stop, batch[LABEL_AT]
        one: Batch = {name: batch[name][:, part.tokens] for name in _OF_TOKENS if name in batch}
        one |= _numbers(batch, part.documents, len(batch["lengths"]))
        one["lengths"] = batch["lengths"][part.documents]
        one["cu_seq_lens_q"] = _offsets_of(batch["cu_seq_lens_q"], part)
        one[LABEL_AT] = label_at[(label_at >= first) & (label_at < last)] - first
        found.append(one)
    return found


def _numbers(batch: Batch, part: slice, count: int) -> Batch:
    """The numbers of the rows in a ``part`` of ``count`` rows or documents; all, where they are of packed rows."""
    if NUMBERS not in batch:
        return {}
    numbers = batch[NUMBERS]
    return {NUMBERS: numbers[part] if len(numbers) == count else numbers}


class _Part(NamedTuple):
    """Documents that follow one another, and their tokens."""

    documents: slice
    tokens: slice


def _offsets_of(offsets: Tensor, part: _Part) -> Tensor:
    """Where the documents of ``part`` begin in it, and where the last one ends."""
    return offsets[part.documents.start : part.documents.stop + 1] - part.tokens.start


def _parts(lengths: Sequence[int], most: int) -> list[_Part]:
    """Documents of these lengths in parts of up to ``most`` tokens, or of one document."""
    ends = list(accumulate(lengths, initial=0))
    parts: list[_Part] = []
    first = 0
    for last in range(1, len(ends)):
        if last == len(lengths) or ends[last + 1] - ends[first] > most:
            parts.append(_Part(slice(first, last), slice(ends[first], ends[last])))
            first = last
    return parts
