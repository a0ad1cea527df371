"""The support matrix says what the table refuses."""

from __future__ import annotations

from pantheraml.config.combinations import REFUSED
from tests.docs.support_matrix import FEATURES, PAGE, WAYS, with_matrix


def test_the_page_has_the_table_of_now():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_matrix(page), "type: python -m tests.docs.support_matrix"


def test_every_strategy_of_the_table_has_a_column():
    named = {name for names in WAYS.values() for name in names}
    assert {spread.split(",")[0] for spread, _ in REFUSED} <= {name.split(",")[0] for name in named}


def test_what_can_be_told_in_a_table_is_in_it():
    special = {
        "fp16", "cpu_offload", "modules_to_save", "experts", "no plan", "another strategy", "whole model", "device_map",
    }  # fmt: skip
    assert {feature for _, feature in REFUSED} - special <= FEATURES.keys()
