"""Copies, sums, kernels and trainings, each with a fault: real ones on the CPU where it can have them."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from pantheraml.devices.nvml import Wires
from pantheraml.doctor.checks import (
    all_reduce,
    attention,
    four_bit,
    host_link,
    parity,
    peer_copies,
    triton_kernel,
)
from pantheraml.doctor.links import Link, pcie_link, peer_link, slowest
from pantheraml.kernels.attention import package
from pantheraml.kernels.attention.flash_attn_2 import FlashAttn2
from pantheraml.kernels.attention.plain import Plain
from pantheraml.kernels.attention.probe import failure
from tests.distributed.ranks import run_ranks

NVLINK, PCIE = Link("NVLink", 450.0), Link("PCIe", 63.0)


def flip(source, target):
    """A copy that turns one bit."""
    target.copy_(source)
    target[target.numel() // 2] ^= 1


def nothing(source, target):
    """A copy that ends without an error, and without a byte."""


def test_links_on_paper():
    wires = Wires(nvlinks=18, pcie_generation=5, pcie_width=16)
    assert peer_link(wires, wires, (9, 0), is_direct=True) == NVLINK and NVLINK.expected == 225
    assert round(pcie_link(wires).paper) == 63 and pcie_link(None) == Link("PCIe", None)
    narrow = wires._replace(nvlinks=0, pcie_width=4)
    assert round(peer_link(wires, narrow, (9, 0), is_direct=True).paper) == 16
    through_host = peer_link(wires, wires, (9, 0), is_direct=False)
    assert through_host.kind == "host memory" and through_host.expected == pytest.approx(12.6, abs=0.1)
    assert Link("PCIe", None).expected is None and Link("PCIe", None).describe() == "PCIe"
    assert slowest([NVLINK, PCIE, Link("PCIe", 31.0)]) == Link("PCIe", 31.0) and slowest([]) is None


@pytest.mark.parametrize("copy", [flip, nothing])
def test_a_corrupted_copy_between_gpus(copy):
    """Between two tensors of the CPU, by a copy that does not do what it says."""
    right = peer_copies.measure((0, 1), NVLINK, ("cpu", "cpu"), size=2**16)
    wrong = peer_copies.measure((1, 0), NVLINK, ("cpu", "cpu"), size=2**16, copy=copy)
    assert right.is_right and right.rate > 0
    row = peer_copies.judge((right, wrong))[0]
    assert row.state == "bad" and "other bytes arrive than were sent: 1 to 0" in row.seen
    assert "NCCL_P2P_DISABLE=1" in row.fix and "ACS" in row.fix


def test_slow_copies_between_gpus_are_a_note():
    fast = [peer_copies.PeerCopy(a, b, True, 370.0, NVLINK) for a, b in ((0, 1), (1, 0))]
    (row,) = peer_copies.judge(tuple(fast))
    assert row.state == "ok" and row.seen.startswith(
        "2 ways, the same bytes on each, 370 to 370 GB/s (NVLink, 450"
    )
    (row,) = peer_copies.judge((fast[0], replace(fast[1], rate=40.0)))
    assert row.state == "note" and row.seen.endswith("expected 225): 1 to 0") and "nvlink -s" in row.fix
    unknown = replace(fast[1], rate=1.0, link=Link("PCIe", None))
    assert peer_copies.judge((unknown,))[0].state == "ok"


@pytest.mark.parametrize("copy", [flip, nothing])
def test_a_corrupted_copy_to_the_host(copy):
    assert host_link.measure("cpu", PCIE, 0, size=2**16).is_right
    (row,) = host_link.judge((host_link.measure("cpu", PCIE, 3, size=2**16, copy=copy),))
    assert row.state == "bad" and "Do not train on GPU 3" in row.fix


def test_a_slow_link_to_the_host_is_a_note():
    link = host_link.HostLink(0, True, 53.0, 54.0, PCIE)
    assert host_link.judge((link,))[0].state == "ok"
    (row,) = host_link.judge((link, replace(link, gpu=1, down=6.0)))
    assert (
        row.state == "note"
        and row.seen.startswith("GPU 1: 53.0 GB/s there, 6.0 back")
        and "-q -d PCI" in row.fix
    )


def one_more(rank, count):
    """What rank 1 adds is off by one in the last place."""
    values = all_reduce.contribution(rank, count)
    values[-1] += rank == 1
    return values


def test_sums_over_ranks_and_a_rank_that_adds_something_else():
    for facts in run_ranks(3, all_reduce.reduce_numbers, 1000):
        assert facts.wrong == (0, 0, 0) and facts.rate > 0 and facts.link is None
    (row,) = all_reduce.judge(facts)
    assert (row.state, row.seen) == ("ok", "sums over 3 ranks (gloo) are right")
    facts = run_ranks(2, all_reduce.reduce_numbers, 1000, one_more)[0]
    (row,) = all_reduce.judge(facts)
    assert row.state == "bad" and "wrong: 1 numbers on rank 0, 1 numbers on rank 1" in row.seen
    assert "NCCL_P2P_DISABLE=1 pantheraml doctor" in row.fix


def test_slow_sums_are_a_note():
    facts = all_reduce.Facts("nccl", (0, 0), 290.0, NVLINK)
    assert all_reduce.judge(facts)[0].state == "ok"
    (row,) = all_reduce.judge(replace(facts, rate=20.0))
    assert row.state == "note" and "20 GB/s (NVLink, 450 GB/s on paper), expected 225" in row.seen
    assert "NCCL_DEBUG=INFO" in row.fix
    assert all_reduce.judge(replace(facts, rate=1.0, link=Link("PCIe", None)))[0].state == "ok"


def test_a_4_bit_product_and_a_wrong_one(monkeypatch):
    import bitsandbytes as bnb

    (row,) = four_bit.judge(four_bit.probe(0))
    assert row.state == "ok" and bnb.__version__ in row.seen
    right = bnb.matmul_4bit
    for factor in (1.1, float("nan")):
        monkeypatch.setattr(bnb, "matmul_4bit", lambda *a, factor=factor, **k: factor * right(*a, **k))
        (row,) = four_bit.judge(four_bit.probe(0))
        assert (
            row.state == "bad"
            and "a 4-bit product is off" in row.seen
            and "python -m bitsandbytes" in row.fix
        )
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda packed, state: torch.zeros(state.shape))
    (row,) = four_bit.judge(four_bit.probe(0))
    assert row.state == "bad" and "4 bits took 100% of the weight" in row.seen


def test_a_kernel_that_does_not_launch_or_is_wrong():
    found = triton_kernel.judge(
        (
            triton_kernel.Launch("cuda:0", None, 1e-7),
            triton_kernel.Launch("cuda:1", "a Triton kernel did not launch (RuntimeError: no C compiler)"),
            triton_kernel.Launch("cuda:2", None, float("nan")),
        )
    )
    assert [row.state for row in found] == ["bad", "bad"]
    assert "cuda:1" in found[0].seen and "apt install gcc" in found[0].fix
    assert "cuda:2: a kernel is off by nan" in found[1].seen and 'kernels="off"' in found[1].fix
    (row,) = triton_kernel.judge((triton_kernel.Launch("cuda:0", None, 1e-7),))
    assert (row.state, row.seen) == ("ok", "a kernel is right on cuda:0")
    # For real: no kernel launches on a CPU.
    (row,) = triton_kernel.judge((triton_kernel.launch("cpu"),))
    assert row.state == "bad" and "Triton needs a GPU" in row.seen


class Raising(Plain):
    name = "flex"

    def why_not(self, call):
        return failure(self, call.features)

    def forward(self, q, k, v, call):
        raise RuntimeError("no C compiler\nmore of it")


class Wrong(Raising):
    name = "torch-flash"

    def forward(self, q, k, v, call):
        out, kept = Plain.forward(self, q, k, v, call)
        return 1.1 * out, kept


def test_attention_that_raises_or_is_wrong():
    facts = attention.try_backends((Raising(), Wrong(), Plain()), "cpu", is_packed=True)
    raised, wrong, right = attention.judge(facts)
    assert raised.state == wrong.state == "bad" and right.seen == "right: plain"
    assert raised.seen.startswith("flex (packed rows): tried on cpu, it raised RuntimeError: no C compiler")
    assert (
        "gcc" in raised.fix
        and "its output and dq and dk were wrong" in wrong.seen
        and "--force-reinstall torch" in wrong.fix
    )


def test_attention_of_a_package_that_does_not_load(monkeypatch, tmp_path):
    """What is installed and broken is red; what is not there is not."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c105ErrorC2')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    package._find.cache_clear()

    class OnCPU(FlashAttn2):
        def why_not(self, call):
            return package.why_absent("flash_attn.flash_attn_interface", "f")

    (row, _) = attention.judge(attention.try_backends((OnCPU(),), "cpu", is_packed=False))
    assert row.state == "bad" and "cannot be used: ImportError: undefined symbol" in row.seen
    assert "pip uninstall flash-attn" in row.fix
    package._find.cache_clear()


def test_attention_of_this_machine():
    (row,) = attention.judge(attention.probe(0))
    assert (
        row.state == "ok"
        and row.seen.startswith("right: plain (flash-attn-4, ")
        and "needs a GPU" in row.seen
    )


RANKS = 2


@functools.cache
def alone(folder):
    rows = parity.build_rows(RANKS * parity.ROWS_A_RANK * parity.STEPS)
    return rows, parity.train(str(folder), rows, RANKS * parity.ROWS_A_RANK)


def judged(folder, train):
    rows, steps = alone(folder)
    found = run_ranks(RANKS, train, str(folder), rows, parity.ROWS_A_RANK)
    assert found[0] == found[1]
    (row,) = parity.judge(parity.Facts(RANKS, "CPU", steps, found[0]))
    return row


def without_some(folder, rows, per_device):
    """Rank 1 loses what is to be learned from a row of eight."""
    if dist.get_rank() == 1:
        rows = [
            {**row, "labels": [-100] * len(row["labels"])} if i % 8 == 0 else row
            for i, row in enumerate(rows)
        ]
    return parity.train(folder, rows, per_device)


def with_another_seed(folder, rows, per_device):
    return parity.train(folder, rows, per_device, seed=1)


def test_one_rank_and_two_train_the_same(tmp_path_factory):
    row = judged(tmp_path_factory.getbasetemp(), parity.train)
    assert row.state == "ok" and row.seen.startswith("4 steps on one rank and on 2 ranks (CPU)")


@pytest.mark.parametrize("train", [without_some, with_another_seed])
def test_ranks_that_train_otherwise(tmp_path_factory, train):
    row = judged(tmp_path_factory.getbasetemp(), train)
    assert row.state == "bad" and "on one rank" in row.seen and "on 2 ranks (CPU)" in row.seen
    assert "pip check" in row.fix


def test_trainings_of_unlike_length_or_without_a_number():
    steps = tuple(parity.Step(6.2, 0.1 * (number + 1)) for number in range(parity.STEPS))
    facts = parity.Facts(4, "GPUs", steps, steps)
    assert parity.judge(facts)[0].state == "ok"
    (row,) = parity.judge(replace(facts, together=steps[:2]))
    assert row.state == "bad" and "did 2" in row.seen and "CUDA_VISIBLE_DEVICES=0" in row.fix
    broken = (*steps[:3], parity.Step(float("nan"), 0.4))
    (row,) = parity.judge(replace(facts, together=broken))
    assert row.state == "bad" and row.seen.startswith(
        "step 4: loss 6.200000 on one rank, nan on 4 ranks (GPUs)"
    )
    assert "NCCL_P2P_DISABLE=1" in row.fix
