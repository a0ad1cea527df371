"""One training row as a reader sees it, with what is trained on marked."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from pantheraml.data.offsets import decode_with_offsets

_OPEN, _CLOSE = "‹", "›"
_RUN, _WHOLE = 600, 4000  # longest run of one kind and longest text, in characters


def describe_sample(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a tokenised row; what is trained on stands between ‹ and ›.

    Args:
        row: a row with ``input_ids`` and, unless all of it is trained on, ``labels``.
        tokenizer: the tokenizer that made it.

    Returns:
        A line with the counts, then the text. Long stretches are shortened in their middle.
    """
    input_ids = row["input_ids"]
    labels = input_ids if row.get("labels") is None else row["labels"]
    text, offsets = decode_with_offsets(input_ids, tokenizer)
    shown, start = [], 0
    for trained, run in groupby(zip(labels, offsets, strict=True), key=lambda pair: pair[0] != -100):
        end = max(span_end for _, (_, span_end) in run)
        piece = _shorten(text[start:end], _RUN)
        start = end
        shown.append(f"{_OPEN}{piece}{_CLOSE}" if trained else piece)
    count = sum(label != -100 for label in labels)
    documents = 1 if row.get("seq_lengths") is None else len(row["seq_lengths"])
    packed = f", {documents} documents packed" if documents > 1 else ""
    head = f"{count} of {len(input_ids)} tokens are trained on, marked {_OPEN}{_CLOSE}{packed}:"
    return f"{head}\n{_shorten(''.join(shown), _WHOLE)}"


def _shorten(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
