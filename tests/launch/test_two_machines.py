"""A whole training run of two machines by torchrun: the numbers of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked, tiny
from tests.launch import namespaces
from tests.launch.namespaces import Machines
from tests.launch.test_agent import environment

pytestmark = pytest.mark.skipif(bool(namespaces.why_not()), reason=namespaces.why_not())

SCRIPT = Path(__file__).with_name("train.py")


@pytest.mark.promise("A4")
@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchrun_on_two_machines_gives_the_numbers_of_one_process(tmp_path, each):
    model = tiny.save_checkpoint(tmp_path / "model", "llama")
    alone, together = tmp_path / "alone", tmp_path / "together"
    code, _, err = forked.run(SCRIPT, model, alone, 1)
    assert code == 0, err
    with Machines(tmp_path, {"one": "10.93.0.1", "two": "10.93.0.2"}) as machines:
        agents = [
            subprocess.Popen(
                machines.inside(
                    name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={each}",
                    f"--node_rank={number}", "--master_addr=10.93.0.1", "--master_port=12355", SCRIPT, model, together,
                    str(2 * each),
                ),
                env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for number, name in enumerate(machines.addresses)
        ]  # fmt: skip
        try:
            said = [agent.communicate(timeout=120) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    done = [line for out, _ in said for line in out.splitlines() if line.endswith("is done")]
    assert sorted(done) == [f"rank {rank} is done" for rank in range(2 * each)]
    assert f"{2 * each} ranks ({each} on one: CPU; {each} on two: CPU)" in said[0][1]
    want, found = (json.loads((folder / "result.json").read_text()) for folder in (alone, together))
    assert len(want["logs"]) == 4
    for mine, theirs in zip(found["logs"], want["logs"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert sorted(found["memory"]) == [f"cpu_{rank}" for rank in range(2 * each)]
