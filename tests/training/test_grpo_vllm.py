"""``use_vllm=True``: TRL's own client against a stand-in for the server, since vLLM itself needs a GPU.

Real: TRL's client, what it asks and how it reads answers, the trainer, and ranks. Not: vLLM, and the way of weights.
"""

from __future__ import annotations

import pytest
from trl.generation import vllm_client, vllm_generation

from pantheraml.training import generators
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.training.grpo_runs import figures
from tests.training.test_grpo_ranks import assert_same
from tests.training.vllm_stand_in import standing_in


def announce(self, metadata, named_params):
    """The part of ``update_named_params`` that goes by HTTP; the tensors go by NCCL."""
    assert [name for name, _, _ in metadata] == [name for name, _ in named_params]
    self._post(f"{self.base_url}/update_weights", json={"names": [name for name, _, _ in metadata]})


@pytest.fixture
def server(monkeypatch):
    for module in (vllm_client, vllm_generation, generators):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(vllm_client.VLLMClient, "update_named_params", announce)
    with standing_in(tiny.VOCAB) as server:
        yield server


@pytest.mark.promise("C2")
def test_a_vllm_server_generates_for_one_rank_and_for_two_with_the_settings_that_were_given(server, tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "llama", "llama")
    settings = dict(
        use_vllm=True, vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=server.port,
        vllm_server_timeout=5, steps_per_generation=2,
    )  # fmt: skip
    one = figures(folder, tmp_path, per_device_train_batch_size=6, **settings)
    asked, server.asked = server.asked, []
    for rank in run_ranks(
        2, lambda: figures(folder, tmp_path, per_device_train_batch_size=3, **settings), timeout=120
    ):
        assert_same(rank, one)
    for paths in ([path for path, _ in asked], [path for path, _ in server.asked]):
        assert paths[0] == "/health" and paths.count("/v1/completions") == 2, (
            "one request for each generation"
        )
        assert paths.count("/update_weights") == 2 and paths.count("/reset_prefix_cache") == 2
    body = server.bodies("/v1/completions")[0]
    assert len(body["prompt"]) == 3 and body["n"] == 4, "a prompt is sent once, for its whole group"
    expected = {"model": "served", "temperature": 0.9, "top_k": 50, "max_tokens": 8, "logprobs": 0}
    assert expected.items() <= body.items()
    names = server.bodies("/update_weights")[0]["names"]
    assert "model.layers.0.self_attn.q_proj.weight" in names and not any("lora" in name for name in names)
