"""``pantheraml export``: what it writes loads in plain transformers, and is what training made."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from pantheraml.cli.app import main
from pantheraml.export.adapter import save_adapter
from tests import tiny
from tests.export.models import adapted, logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]


def run(*words) -> int:
    with pytest.raises(SystemExit) as left:
        main(["export", *map(str, words)])
    return left.value.code or 0


def test_an_adapter_becomes_a_model_and_gguf_files(llama, tmp_path, capsys, caplog):
    trained = adapted(AutoModelForCausalLM.from_pretrained(llama))
    save_adapter(trained, tmp_path / "adapter", tiny.build_tokenizer())
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of what PEFT asks transformers
        assert run(tmp_path / "adapter", out, "--as", "merged_16bit", "--as", "f32", "--as", "q8_0") == 0
    assert "max_seq_length" not in caplog.text, "nothing is trained"
    assert sorted(path.name for path in out.glob("model*")) == [
        "model-F32.gguf",
        "model-Q8_0.gguf",
        "model.safetensors",
    ]
    found = AutoModelForCausalLM.from_pretrained(out, gguf_file="model-F32.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(found), logits(trained), rtol=0, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert (logits(merged) - logits(trained)).abs().max() < 0.05
    assert run(tmp_path / "adapter", tmp_path / "none", "--as", "q4_k_m") == 2
    assert "llama-quantize" in capsys.readouterr().err
    assert run(tmp_path / "adapter", tmp_path / "none", "--as", "merged_4bit", "--as", "merged_16bit") == 2
    assert not (tmp_path / "none").exists()
