"""The table's decisions on machines that are not here, what the log says of them, and docs/attention.md."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from pantheraml import log
from pantheraml.kernels.attention import AttentionCall, Layout, attend, choose, cudnn, table

CUDA = torch.device("cuda", 0)
CALL = AttentionCall(4, 2048, 32, 8, 128, torch.bfloat16, CUDA, scale=0.1)
LAYOUT = Layout((1, 16384), CUDA, torch.tensor([0, 700, 16384]), 15684)
PACKED = replace(CALL, rows=1, tokens=16384, layout=LAYOUT)
FILES = ("cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4", "flex", "torch_efficient", "torch_flash")
PAGE = Path(__file__).parents[2] / "docs" / "attention.md"


class Machine:
    """A GPU of some capability with some packages; ``broken``: what its probes say of a backend."""

    def __init__(self, monkeypatch):
        self.capability, self.packages, self.broken = (9, 0), set(), {}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(cudnn, "_planned", set())
        monkeypatch.setattr(table, "_told", set())
        monkeypatch.setattr(log, "_said", set())
        for file in FILES:
            module = import_module(f"pantheraml.kernels.attention.{file}")
            monkeypatch.setattr(module, "failure", lambda backend, features: self.broken.get(backend.name))
            if hasattr(module, "why_absent"):
                absent = lambda *_, name=file: None if name in self.packages else "not installed"  # noqa: E731
                monkeypatch.setattr(module, "why_absent", absent)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def dropped(*names):
    return {name: f"tried on cuda:0, it raised RuntimeError: {name}" for name in names}


FA4, FA3, FA2 = "flash_attn_4", "flash_attn_3", "flash_attn_2"


@pytest.mark.parametrize(
    ("call", "packages", "broken", "capability", "chosen"),
    [
        (CALL, {FA4, FA3, FA2}, (), (9, 0), "flash-attn-4"),
        (CALL, {FA3, FA2}, (), (9, 0), "flash-attn-3"),
        (CALL, {FA2}, (), (9, 0), "cudnn"),
        (CALL, {FA4, FA3, FA2}, ("flash-attn-4",), (10, 0), "cudnn"),
        (CALL, {FA4, FA3, FA2}, (), (8, 0), "torch-flash"),
        (CALL, set(), ("cudnn",), (9, 0), "torch-flash"),
        (CALL, {FA2}, ("cudnn", "torch-flash"), (9, 0), "flash-attn-2"),
        (CALL, set(), ("cudnn", "torch-flash"), (7, 5), "torch-efficient"),
        (CALL, set(), ("cudnn", "torch-flash", "torch-efficient"), (9, 0), "flex"),
        (CALL, set(), ("cudnn", "torch-flash", "torch-efficient", "flex"), (9, 0), "plain"),
        (replace(CALL, window=512), set(), (), (9, 0), "torch-flash"),
        (replace(CALL, window=128, sinks=True, head_dim=64), set(), (), (9, 0), "torch-flash"),
        (replace(CALL, softcap=50.0, head_dim=256), {FA4}, (), (9, 0), "flash-attn-4"),
        (replace(CALL, softcap=50.0, head_dim=256), {FA2}, (), (8, 0), "flash-attn-2"),
        (replace(CALL, softcap=50.0, head_dim=256), set(), (), (9, 0), "flex"),
        (replace(CALL, softcap=50.0, rows=1, tokens=512), set(), (), (9, 0), "plain"),
        (replace(CALL, dtype=torch.float32), {FA4}, (), (9, 0), "torch-efficient"),
        (replace(CALL, dtype=torch.float32, softcap=50.0), {FA4}, (), (9, 0), "plain"),
        (replace(CALL, dtype=torch.float64), {FA4}, (), (9, 0), "plain"),
        (replace(CALL, head_dim=36), {FA4}, (), (9, 0), "plain"),
        (replace(CALL, head_dim=36, dtype=torch.float32), {FA4}, (), (9, 0), "torch-efficient"),
        (replace(CALL, tokens=1), set(), (), (9, 0), "torch-flash"),
        (replace(CALL, device=torch.device("cpu")), {FA4}, (), (9, 0), "plain"),
        (PACKED, {FA4, FA3, FA2}, (), (9, 0), "flash-attn-4"),
        (PACKED, {FA3}, (), (9, 0), "flash-attn-3"),
        (PACKED, {FA2}, (), (9, 0), "torch-flash"),
        (PACKED, {FA2}, ("torch-flash",), (9, 0), "flash-attn-2"),
        (PACKED, set(), ("torch-flash",), (7, 0), "torch-efficient"),
        (replace(PACKED, softcap=50.0), set(), (), (9, 0), "flex"),
        (replace(PACKED, softcap=50.0, dtype=torch.float32), set(), (), (9, 0), "plain"),
    ],
)
def test_each_row_is_reached(machine, call, packages, broken, capability, chosen):
    machine.packages, machine.broken, machine.capability = packages, dropped(*broken), capability
    assert choose(call).name == chosen


@pytest.mark.parametrize(
    ("call", "chosen"),
    [(CALL, "torch-flash"), (PACKED, "torch-flash"), (replace(CALL, softcap=50.0), "flash-attn-2"),
     (replace(CALL, dtype=torch.float32), "torch-efficient")],
)  # fmt: skip
def test_deterministic_training_takes_what_has_a_fixed_order(machine, call, chosen):
    machine.packages = {FA4, FA3, FA2}
    torch.use_deterministic_algorithms(True)
    try:
        backend, passed = table.fastest(call)
    finally:
        torch.use_deterministic_algorithms(False)
    assert backend.name == chosen
    assert call.dtype == torch.float32 or ("flash-attn-4", "adds gradients up in no fixed order") in passed


def test_every_backend_is_somebodys_choice():
    cases = test_each_row_is_reached.pytestmark[0].args[1]
    assert {case[-1] for case in cases if not case[0].packed} == {b.name for b in table.DENSE}
    assert {case[-1] for case in cases if case[0].packed} == {b.name for b in table.PACKED}
    assert table.DENSE[-1].name == table.PACKED[-1].name == "plain"


def test_lengths_that_vary_leave_cudnn(machine):
    """The first shapes keep their plans, later ones never get one: no shape changes sides."""
    lengths = [100 + n for n in range(40)]
    names = []
    for length in lengths * 2:
        call = replace(CALL, tokens=length)
        backend = choose(call)
        names.append(backend.name)
        if backend.name == "cudnn":
            cudnn._planned.add(cudnn._shape(call))  # what its forward does
    assert names[:40] == names[40:] == ["cudnn"] * 16 + ["torch-flash"] * 24


def said(machine, caplog, *calls):
    with caplog.at_level(logging.INFO, logger="pantheraml"):
        for call in calls:
            choose(call)
    return [record.getMessage() for record in caplog.records]


def test_the_log_says_it_once_per_kind(machine, caplog):
    machine.packages = {"flash_attn_4"}
    assert said(machine, caplog, CALL, CALL, replace(CALL, tokens=77), PACKED) == [
        "Attention of dense rows (bfloat16, 32/8 heads of 128): flash-attn-4.",
        "Attention of packed rows (bfloat16, 32/8 heads of 128): flash-attn-4.",
    ]


def test_the_log_says_what_was_passed_over(machine, caplog):
    machine.broken = dropped("torch-flash")
    windowed = replace(PACKED, window=128, sinks=True, head_dim=64)
    assert said(machine, caplog, CALL, windowed, replace(CALL, softcap=50.0)) == [
        "Attention of dense rows (bfloat16, 32/8 heads of 128): cudnn. "
        "Passed over: flash-attn-4: not installed (pip install 'pantheraml[hopper]').",
        "Attention of packed rows (bfloat16, 32/8 heads of 64, window, sinks): torch-efficient. "
        "Passed over: flash-attn-4: not installed (pip install 'pantheraml[hopper]'); "
        "torch-flash: tried on cuda:0, it raised RuntimeError: torch-flash.",
        "Attention of dense rows (bfloat16, 32/8 heads of 128, soft-cap): flex. "
        "Passed over: flash-attn-4: not installed (pip install 'pantheraml[hopper]'); cudnn: has no soft-cap; "
        "torch-flash: has no soft-cap; torch-efficient: has no soft-cap.",
    ]


def test_the_log_says_nothing_on_cpu(machine, caplog):
    assert said(machine, caplog, replace(CALL, device=torch.device("cpu"))) == []


def test_a_backend_that_fails_is_passed_over_by_attend(machine, monkeypatch):
    """A wrong kernel in the first row: the probe refuses it and the next one computes."""
    from pantheraml.kernels.attention.plain import Plain
    from pantheraml.kernels.attention.probe import failure

    class Wrong(Plain):
        name = "wrong"

        def why_not(self, call):
            return failure(self, call.features)

        def backward(self, *arguments):
            dq, dk, dv = super().backward(*arguments)
            return dq, dv, dk

    wrong = Wrong()
    monkeypatch.setattr(table, "DENSE", (wrong, Plain()))
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    call = AttentionCall.of(q, k)
    assert wrong.why_not(call) == "tried on cpu, its dk and dv were wrong" and choose(call).name == "plain"
    attend(q, k, v, call).sum().backward()
    assert k.grad.abs().sum() > 0


COLUMNS = {
    "packed": PACKED,
    "window": replace(CALL, window=100),
    "soft-cap": replace(CALL, softcap=50.0),
    "sinks": replace(CALL, sinks=True),
    "heads of 256": replace(CALL, head_dim=256),
    "float32": replace(CALL, dtype=torch.float32),
}


def test_the_page_shows_the_table(machine):
    machine.packages = {FA4, FA3, FA2}
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|([^\n]+)\|$", PAGE.read_text(encoding="utf-8"), re.M)
    head = next(
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| backend")
    )
    titles = [cell.strip() for cell in head.strip("|").split("|")][1 : 1 + len(COLUMNS)]
    assert titles == list(COLUMNS)
    assert [name for name, _ in rows] == [backend.name for backend in table.DENSE]
    for (name, cells), backend in zip(rows, table.DENSE, strict=True):
        shown = [cell.strip() for cell in cells.split("|")][: len(COLUMNS)]
        takes = ["yes" if backend.why_not(call) is None else "" for call in COLUMNS.values()]
        assert shown == takes, (name, dict(zip(COLUMNS, takes, strict=True)))
