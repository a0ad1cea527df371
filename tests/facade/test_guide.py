"""A guide's calls, as one script: in one process, and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import forked, tiny
from tests.launch.test_agent import run

SCRIPT = Path(__file__).with_name("guide.py")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


@pytest.mark.promise("A8", "F1")
@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [([], 1), pytest.param(TORCHRUN, 2, marks=pytest.mark.slow)],
    ids=["python", "torchrun"],
)
def test_every_call_of_the_guide(tmp_path, launcher, ranks):
    model = tiny.save_checkpoint(tmp_path / "model", "llama", chat_template=None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": f"Add {i} and two.", "input": "", "output": f"It is {i + 2}."}) + "\n"
            for i in range(24)
        )
    )
    words = [SCRIPT, model, rows, tmp_path / "output"]
    code, _, err = run(*launcher, *words) if launcher else forked.run(*words)
    assert code == 0, err
    for rank in range(ranks):
        facts = json.loads((tmp_path / "output" / f"facts_{rank}.json").read_text())
        assert facts == {
            "available": ranks > 1, "world": ranks, "rank": rank, "main": rank == 0, "steps": [2, 2, 2, 2],
            "memory": ["cpu"] if ranks == 1 else ["cpu_0", "cpu_1"], "again": ranks > 1,
        }  # fmt: skip
    assert err.count("so LoRA r=16 is attached") == 1
    assert err.count("The data are Alpaca instructions") == 4
