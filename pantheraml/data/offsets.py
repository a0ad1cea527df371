"""Where each token lies in the text that a row decodes to.

Finding text in token ids is not safe: the same text is cut differently beside other text. Offsets into
the decoded text are exact whatever the tokenizer merged.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# Tokens decoded before the next one, so that a tokenizer which drops a leading space drops it there.
_WINDOW = 8


def decode_with_offsets(
    input_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """Decode token ids, special tokens included.

    Args:
        input_ids: the ids of one row.
        tokenizer: the tokenizer that made them.

    Returns:
        The text, and for each token the half-open span of its characters in it. A token that completes no
        character has an empty span or, with fast tokenizers, the span of the character it is a part of.
    """
    input_ids = list(input_ids)
    text = _decode(input_ids, tokenizer)
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if encoded["input_ids"] == input_ids:
            return text, [tuple(span) for span in encoded["offset_mapping"]]
    return _decode_stepwise(input_ids, tokenizer)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _decode_stepwise(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """Decode token by token behind a short window of earlier tokens; for ids that do not encode back.

    Such ids come from rows cut inside a character or joined from parts that were tokenised alone.
    """
    text, spans = "", []
    window = read = 0  # ids[window:read] is decoded text that is already in `text`
    for index in range(len(ids)):
        known = _decode(ids[window:read], tokenizer)
        grown = _decode(ids[window : index + 1], tokenizer)
        # A trailing replacement character is the first part of a character that later tokens complete.
        unfinished = grown.endswith("�") and index + 1 < len(ids) and index - read < 4
        piece = "" if unfinished else grown[len(known) :]
        spans.append((len(text), len(text) + len(piece)))
        if not unfinished:
            text += piece
            read = index + 1
            window = max(window, read - _WINDOW)
    return text, spans
