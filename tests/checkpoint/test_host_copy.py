"""A state that is copied for a thread to write: as it was, in plain containers, tied weights once."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import pytest
import torch

from pantheraml.checkpoint.host_copy import host_copy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_it_stays_what_it_was(device):
    weight = torch.nn.Parameter(torch.randn(4, 6, device=device))
    turned, none = torch.randn(3, 5, device=device).t(), torch.empty(0, 2, device=device)
    moments = defaultdict(dict, {0: {"step": torch.tensor(3.0), "mean": turned}})
    state = OrderedDict(
        weight=weight, tied=weight.detach(), groups=[{"lr": 0.1, "betas": (0.9, none)}], state=moments
    )
    wanted = weight.detach().cpu().clone(), turned.cpu().clone()
    found = host_copy(state)
    with torch.no_grad():
        weight.zero_(), turned.zero_()
    assert torch.equal(found["weight"], wanted[0]) and found["tied"] is found["weight"]
    assert torch.equal(found["state"][0]["mean"], wanted[1])
    assert found["state"][0]["mean"].stride() == turned.stride()
    assert not found["weight"].requires_grad and found["groups"][0]["lr"] == 0.1
    assert found["groups"][0]["betas"][1].shape == (0, 2)
    assert {type(found), type(found["state"])} == {dict} and type(found["groups"][0]["betas"]) is tuple
    assert found["weight"].is_pinned() == (device == "cuda") and found["weight"].device.type == "cpu"


def test_two_views_are_two():
    whole = torch.arange(6.0)
    found = host_copy([whole[:3], whole[3:]])
    assert [one.tolist() for one in found] == [[0, 1, 2], [3, 4, 5]]
