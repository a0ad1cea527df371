"""Rewards that a program can verify, for GRPO: each a function of one completion and the columns of its row.

Ranks score their own rows, so no reward looks at other rows: it is the same on any number of ranks. A completion is a
text, or a list of messages of which the last one counts.

    accuracy             1 if the answer is that of the column ``answer`` or ``solution``, else 0
    format               1 if the completion is <think>...</think> <answer>...</answer> and nothing else
    reasoning_steps      steps that are marked as such, up to three, as a share of three
    cosine               by length L of at most M tokens:  right   0.5 + 0.25 (1 + cos(pi L / M))
                                                           wrong  -0.5 - 0.25 (1 + cos(pi L / M))
    repetition_penalty   -(1 - different / all) of the runs of three words
    length               right 0.5 - L / M, wrong min(0, 0.5 - L / M)

Short right answers are worth more than long ones, and long wrong ones cost less than short ones. cosine is after Yeo et
al. 2025 (arXiv 2502.03373), length after Kimi k1.5 (arXiv 2501.12599), with M in the place of the group's longest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

from pantheraml.errors import ConfigError, DataError, did_you_mean

Reward = Callable[..., list[float]]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:\s*/\s*\d+)?%?")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FORMAT = re.compile(
    r"\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*", re.DOTALL
)
# What begins a step of reasoning: "Step 2", "3.", a bullet, or a word of order.
_STEP = re.compile(
    r"^\s*(?:step\s+\d+|\d+[.)]\s|[-*•]\s|(?:first|second|third|next|then|finally)(?:ly)?,)", re.I | re.M
)
_STEPS, _RUN = 3, 3


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def final_answer(text: str) -> str:
    """A text's answer: in <answer>...</answer>, else in the last \\boxed{...}, else its last number, else all of it."""
    tagged = _ANSWER.findall(text)
    if tagged:
        text = tagged[-1]
    boxed = _boxed(text)
    if boxed is not None:
        return boxed.strip()
    numbers = [] if tagged else _NUMBER.findall(text)
    return (numbers[-1] if numbers else text).strip()


def _boxed(text: str) -> str | None:
    """What is in the last \\boxed{...}, whose braces are matched."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place]
    return None


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same number, or the same words apart from case, blanks, $ and a last full stop."""
    numbers = _number(one), _number(other)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _plain(one) == _plain(other)


def _plain(text: str) -> str:
    return " ".join(text.replace("$", " ").lower().split()).removesuffix(".")


def _number(text: str) -> Fraction | None:
    """The number that a text is: 1,234.5, 3/4 or 12%; None if it is none."""
    text = _plain(text).replace(",", "").replace(" ", "")
    percent = text.endswith("%")
    try:
        value = Fraction(text.removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if percent else value


def _is_right(completions: Iterable[Any], columns: dict[str, Any]) -> list[bool]:
    wanted = columns.get("answer", columns.get("solution"))
    if wanted is None:
        raise DataError(
            got=f"The rows have the columns {', '.join(sorted(columns)) or 'prompt alone'}.",
            need="accuracy, cosine and length compare with the right answer.",
            fix="Call the column of right answers 'answer' or 'solution', or leave these rewards out.",
        )
    return [
        same_answer(final_answer(text_of(completion)), final_answer(str(right)))
        for completion, right in zip(completions, wanted, strict=True)
    ]


def accuracy(completions: list[Any], **columns: Any) -> list[float]:
    """1 where the final answer is that of the column ``answer`` or ``solution``.

    Raises:
        DataError: the rows have neither column.
    """
    return [float(right) for right in _is_right(completions, columns)]


def format_reward(completions: list[Any], **_: Any) -> list[float]:
    """1 where a completion is <think>...</think> <answer>...</answer> and nothing else."""
    return [float(_FORMAT.fullmatch(text_of(completion)) is not None) for completion in completions]


def reasoning_steps(completions: list[Any], **_: Any) -> list[float]:
    """Marked steps of each completion, as a share of three; more count no more."""
    return [min(1.0, len(_STEP.findall(text_of(completion))) / _STEPS) for completion in completions]


def repetition_penalty(completions: list[Any], **_: Any) -> list[float]:
    """Minus the share of repeated runs of three words, in (-1, 0]; 0 for completions of fewer words."""
    found: list[float] = []
    for completion in completions:
        words = text_of(completion).lower().split()
        runs = list(zip(*(words[start:] for start in range(_RUN)), strict=False))
        found.append(len(set(runs)) / len(runs) - 1 if runs else 0.0)
    return found


def cosine_reward(max_completion_length: int) -> Reward:
    """The reward ``cosine``, of completions of at most so many tokens."""

    def cosine(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        found: list[float] = []
        for right, ids in zip(_is_right(completions, columns), completion_ids, strict=True):
            share = min(1.0, len(ids) / max_completion_length)
            size = 0.5 + 0.25 * (1 + math.cos(math.pi * share))
            found.append(size if right else -size)
        return found

    return cosine


def length_reward(max_completion_length: int) -> Reward:
    """The reward ``length``, of completions of at most so many tokens."""

    def length(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        found: list[float] = []
        for right, ids in zip(_is_right(completions, columns), completion_ids, strict=True):
            value = 0.5 - min(1.0, len(ids) / max_completion_length)
            found.append(value if right else min(0.0, value))
        return found

    return length


def get_reward_funcs(names: Iterable[str], max_completion_length: int = 512) -> list[Reward]:
    """Rewards by their names, for ``GRPOTrainer(reward_funcs=...)``.

    Args:
        names: of the table above.
        max_completion_length: that of ``GRPOConfig``, in tokens.

    Raises:
        ConfigError: an unknown name.
    """
    known: dict[str, Reward] = {
        "accuracy": accuracy,
        "format": format_reward,
        "reasoning_steps": reasoning_steps,
        "cosine": cosine_reward(max_completion_length),
        "repetition_penalty": repetition_penalty,
        "length": length_reward(max_completion_length),
    }
    found: list[Reward] = []
    for name in names:
        if name not in known:
            raise ConfigError(
                got=f"reward_funcs names {name!r}.",
                need=f"There are {', '.join(known)}.",
                fix=did_you_mean(name, known) or "Write a function of your own: docs/grpo.md shows one.",
            )
        found.append(known[name])
    return found
