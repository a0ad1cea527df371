"""The data set inside the package is what first runs and tests learn from."""

from __future__ import annotations

import pytest

from pantheraml.data.debug_dataset import load_debug_dataset
from pantheraml.data.formats import format_dataset
from pantheraml.errors import ConfigError


@pytest.mark.promise("D4")
@pytest.mark.parametrize(("split", "least"), [("train", 360), ("validation", 40)])
def test_rows(split, least, tokenizer):
    rows = load_debug_dataset(split)
    assert rows.column_names == ["instruction", "input", "output"] and len(rows) >= least
    assert all(row["instruction"].strip() and 1 <= len(row["output"].split()) <= 15 for row in rows)
    assert any(row["input"] for row in rows) and any(not row["input"] for row in rows)
    questions = {(row["instruction"], row["input"]) for row in rows}
    assert len(questions) == len(rows)
    formatted, found = format_dataset(rows, tokenizer)
    assert found.name == "alpaca" and len(formatted) == len(rows)


def test_validation_can_be_learnt_and_is_not_in_the_training_rows():
    train, validation = load_debug_dataset(), load_debug_dataset("validation")
    asked = {(row["instruction"], row["input"]) for row in train}
    assert not asked & {(row["instruction"], row["input"]) for row in validation}
    assert set(validation["output"]) <= set(train["output"])


def test_unknown_split():
    with pytest.raises(ConfigError, match="no split 'test'"):
        load_debug_dataset("test")
