"""The texts around what user and assistant say, found by rendering a probe conversation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import jinja2
from transformers import PreTrainedTokenizerBase

from pantheraml.data.chat_templates import template_text
from pantheraml.data.offsets import decode_with_offsets

# Unlikely in a template, and kept as they are by templates that trim or lower-case nothing else.
_USER = ("Probe-question-1", "Probe-question-2")
_ASSISTANT = ("Probe-answer-1", "Probe-answer-2")
# What a template is made of: <token>, [TOKEN], or a single character.
_PIECE = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]|.", re.DOTALL)


@dataclass(frozen=True)
class TurnParts:
    """The fixed texts of a chat template.

    Args:
        instruction_part: what stands before the user's text, such as ``<|im_start|>user\\n``.
        response_part: what stands before the assistant's text, such as ``<|im_start|>assistant\\n``.
        end_of_turn: what ends the assistant's text, such as ``<|im_end|>``; empty when nothing does.
    """

    instruction_part: str
    response_part: str
    end_of_turn: str = ""


def find_turn_parts(tokenizer: PreTrainedTokenizerBase) -> TurnParts | None:
    """The turn parts of the tokenizer's chat template, whatever template that is.

    Two questions and answers are rendered, tokenised and decoded, and the texts between them compared, so
    that the parts are what decoded rows hold. None when the tokenizer has no template, or when its template
    does not write a question or an answer as it stands.
    """
    if template_text(tokenizer) is None:
        return None
    conversation = []
    for question, answer in zip(_USER, _ASSISTANT, strict=True):
        conversation += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        input_ids = cast(list[int], tokenizer.apply_chat_template(conversation, return_dict=False))
    except (jinja2.TemplateError, TypeError, ValueError):
        return None
    rendered, _ = decode_with_offsets(input_ids, tokenizer)
    between = re.split("|".join(_USER + _ASSISTANT), rendered)
    if len(between) != 5:
        return None
    _, to_answer, to_question, _, end = between
    ending = _common_start(to_question, end)
    instruction_part = to_question[len(ending) :]
    # A user turn mostly ends as an assistant turn does; that end is no part of the answer's header.
    response_part = to_answer[len(_common_start(to_answer, ending)) :]
    # Thoughts are said by the assistant, also the empty ones that some templates write for it.
    response_part = response_part.partition("<think>")[0]
    if not instruction_part.strip() or not response_part.strip():
        return None
    return TurnParts(instruction_part, response_part, ending.strip())


def _common_start(text: str, other: str) -> str:
    """The longest start the two texts share, cut only between tokens."""
    start = ""
    for piece, other_piece in zip(_PIECE.findall(text), _PIECE.findall(other), strict=False):
        if piece != other_piece:
            break
        start += piece
    return start
