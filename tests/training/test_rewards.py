"""Rewards that a program verifies, by the names of the guide's recipe."""

from __future__ import annotations

import math

import pytest

from pantheraml.errors import ConfigError, DataError
from pantheraml.training.rewards import (
    accuracy,
    final_answer,
    format_reward,
    get_reward_funcs,
    reasoning_steps,
    repetition_penalty,
)


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("It is 12.", "12", True),
        ("3 + 9 makes 12", "12.0", True),
        ("12 or 13", "12", False),
        ("So \\boxed{\\frac{1}{2}} it is, 7 times", "\\boxed{\\frac{1}{2}}", True),
        ("<think>maybe 4</think><answer> 1,234 </answer> 5", "1234", True),
        ("<answer>3/4</answer>", "0.75", True),
        ("50%", "1/2", True),
        ("<answer>the Seine.</answer>", "The  seine", True),
        ("<answer>the Rhine</answer>", "The Seine", False),
        ("", "0", False),
        ("1/0", "1", False),
        ("-7", "7", False),
        ("#### 18", "How? It is 9 + 9.\n#### 18", True),
        ([{"role": "assistant", "content": "Paris"}], "paris", True),
        ([{"role": "assistant", "content": None}], "paris", False),
    ],
)
def test_accuracy_compares_final_answers(completion, answer, right):
    assert accuracy([completion], answer=[answer]) == accuracy([completion], solution=[answer]) == [right]


def test_a_box_that_is_not_closed_is_no_answer():
    assert final_answer("\\boxed{7") == "7" and final_answer("\\boxed{a{b}c} \\boxed{d{e}}") == "d{e}"


def test_rows_without_answers_are_refused():
    with pytest.raises(DataError, match="Call the column of right answers 'answer' or 'solution'"):
        accuracy(["1"], question=["?"])


def test_format_is_the_whole_completion():
    good = "<think>\n1 + 1\n</think>\n<answer>2</answer>\n"
    bad = [good + "x", good * 2, "<answer>2</answer>", "<think></think><answer>2</answer>", "2"]
    assert format_reward([good, *bad]) == [1, 0, 0, 0, 0, 0]


def test_steps_and_repetition():
    text = "Step 1: add.\nThen, carry.\n3) write 4.5\n- done"
    assert reasoning_steps([text, "First, add.\nIt is 2. Yes", "2 and 3"]) == [1, 1 / 3, 0]
    assert repetition_penalty(["a b c d", "a b c A B C a b c", "a b"]) == [0, pytest.approx(3 / 7 - 1), 0]


def test_cosine_and_length_prefer_short_right_answers_and_long_wrong_ones():
    cosine, length = get_reward_funcs(["cosine", "length"], max_completion_length=4)
    assert (cosine.__name__, length.__name__) == ("cosine", "length")
    ids = [[1] * n for n in (0, 2, 4, 9, 2, 4)]
    given = {"completion_ids": ids, "answer": ["1"] * 6}
    texts = ["1"] * 4 + ["2"] * 2
    assert cosine(texts, **given) == pytest.approx([1.0, 0.75, 0.5, 0.5, -0.75, -0.5])
    assert length(texts, **given) == pytest.approx([0.5, 0.0, -0.5, -0.5, 0.0, -0.5])
    assert cosine(["1"], completion_ids=[[1]], answer=["1"])[0] == pytest.approx(
        0.75 + 0.25 * math.cos(math.pi / 4)
    )


@pytest.mark.promise("C2")
def test_the_guides_names_are_known_and_others_are_not():
    names = ["accuracy", "format", "reasoning_steps", "cosine", "repetition_penalty", "length"]
    assert len(get_reward_funcs(names)) == 6
    with pytest.raises(ConfigError, match="Did you mean 'accuracy'"):
        get_reward_funcs(["acuracy"])
