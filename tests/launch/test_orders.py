"""The order of imports, of arguments and of ``initialize_distributed`` does not matter."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import pytest

from tests.launch.test_agent import run

SCRIPT = Path(__file__).with_name("orders.py")
ORDERS = [
    "torch transformers pantheraml arguments ranks trl",  # as guides print it
    "ranks pantheraml trl arguments transformers torch",
    "trl arguments transformers ranks torch pantheraml",
    "arguments trl pantheraml torch ranks transformers",
]


def train(model, output, order):
    code, out, err = run(SCRIPT, model, output, *order.split())
    assert code == 0, f"{order}\n{err}"
    # The other rank's lines may come after it.
    return json.loads(next(line for line in reversed(out.splitlines()) if line.startswith('{"')))


@pytest.mark.promise("B3")
@pytest.mark.parametrize("orders", [ORDERS[:2], pytest.param(ORDERS, marks=pytest.mark.slow)], ids=["2", "4"])
def test_every_order_trains_the_same(llama, tmp_path, orders):
    """Losses and gradient norms, to the last bit."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(train, repeat(llama), map(tmp_path.joinpath, "abcd"), orders))
    assert len(found[0]["figures"]) == 2 and found[0]["is_one_state"]
    assert found == [found[0]] * len(orders)
