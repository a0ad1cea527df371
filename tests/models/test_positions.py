"""Stretched rotary positions: cos and sin against the formulas, and how many positions are known."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from pantheraml import FastLanguageModel
from pantheraml.errors import ConfigError
from pantheraml.models.positions import extend_positions
from tests import tiny

POSITIONS, DIM, THETA = 256, 16, 10_000.0
STOCK = THETA ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)  # inverse frequencies


@pytest.fixture
def load(llama):
    def load(folder=None, **flags):
        flags = {"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **flags}
        return FastLanguageModel.from_pretrained(str(folder or llama), **flags)[0]

    return load


def turned(model, count):
    """cos and sin of the positions below ``count``, as the model uses them: (count, DIM / 2) each."""
    hidden = torch.zeros(1, count, 64)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(count)[None])
    return cos[0, :, : DIM // 2].double(), sin[0, :, : DIM // 2].double()


def assert_turned(model, count, frequencies, scale=1.0):
    angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
    cos, sin = turned(model, count)
    torch.testing.assert_close(cos, angles.cos() * scale, rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, angles.sin() * scale, rtol=0, atol=1e-4)


def test_without_scaling_nothing_is_stretched(load):
    model = load()
    assert_turned(model, 300, STOCK)
    assert model.config.max_position_embeddings == POSITIONS


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_linear_divides_positions(load, name, caplog):
    model = load(max_seq_length=1024, rope_scaling={name: "linear", "factor": 4.0})
    assert_turned(model, 1024, STOCK / 4)
    assert model.config.max_position_embeddings == 1024
    assert "positions this model was made for" not in caplog.text
    assert_turned(load(rope_scaling={"factor": 4}), 1024, STOCK / 4)


def test_dynamic_begins_beyond_the_first_positions(load, caplog):
    model = load(max_seq_length=512, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert_turned(model, POSITIONS, STOCK)
    theta = THETA * (2.0 * 512 / POSITIONS - 1) ** (DIM / (DIM - 2))
    assert_turned(model, 512, theta ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))
    assert "positions this model was made for" not in caplog.text


def test_yarn_stretches_slow_turns_and_leaves_fast_ones(load):
    model = load(max_seq_length=1024, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    cos, sin = turned(model, 1024)
    scale = 0.1 * math.log(4) + 1
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, scale), rtol=1e-5, atol=0)
    positions = torch.arange(1024, dtype=torch.float64)
    for column, frequency in ((0, STOCK[0]), (-1, STOCK[-1] / 4)):
        torch.testing.assert_close(sin[:, column], (positions * frequency).sin() * scale, rtol=0, atol=1e-4)
    assert model.config.max_position_embeddings == 1024


def test_llama3_stretches_slow_turns_and_leaves_fast_ones(load):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = load(rope_scaling=scaling)
    lengths = 2 * math.pi / STOCK
    expected = STOCK.clone()
    expected[lengths > POSITIONS / 1.0] /= 8.0
    known = (lengths < POSITIONS / 4.0) | (lengths > POSITIONS / 1.0)
    found = model.model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(found[known], expected[known], rtol=1e-5, atol=0)
    assert known.sum() >= 6 and model.config.max_position_embeddings == 2048


def test_longrope_multiplies_each_frequency(load):
    factors = {"short_factor": [1.0] * (DIM // 2), "long_factor": [2.0] * (DIM // 2)}
    model = load(max_seq_length=512, rope_scaling={"rope_type": "longrope", "factor": 2.0, **factors})
    scale = math.sqrt(1 + math.log(2) / math.log(POSITIONS))
    assert_turned(model, POSITIONS, STOCK, scale)
    assert_turned(model, 512, STOCK / 2, scale)


@pytest.mark.promise("F1")
def test_a_stretched_model_answers_otherwise_and_saves_what_it_is(load, tmp_path):
    ids = torch.arange(5, 45)[None]
    stock, stretched = load(), load(rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with torch.no_grad():
        assert not torch.allclose(stock(ids).logits, stretched(ids).logits, atol=1e-3)
        stretched.save_pretrained(tmp_path)
        tiny.build_tokenizer().save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path).eval()(ids).logits, stretched(ids).logits)


@pytest.mark.parametrize("first", ["linear", "yarn"])
@pytest.mark.parametrize("then", ["linear", "yarn", "dynamic"])
def test_a_second_scaling_replaces_the_first(llama, first, then):
    config = AutoConfig.from_pretrained(llama)
    extend_positions(config, 64, {"rope_type": first, "factor": 2.0})
    assert config.max_position_embeddings == 2 * POSITIONS
    extend_positions(config, 4 * POSITIONS, {"rope_type": then, "factor": 4.0})
    assert config.max_position_embeddings == (POSITIONS if then == "dynamic" else 4 * POSITIONS)
    assert config.rope_parameters["rope_theta"] == THETA and config.rope_parameters["factor"] == 4.0
    config.validate_rope()


def test_longer_rows_than_the_model_knows_are_told(load, caplog):
    load(max_seq_length=600)
    assert "max_seq_length=600 is more than the 256 positions" in caplog.text
    assert '"factor": 3.0' in caplog.text
    caplog.clear()
    load(max_seq_length=600, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert (
        "max_seq_length=600 is more than the 512 positions" in caplog.text and '"factor": 3.0' in caplog.text
    )
    caplog.clear()
    load(max_seq_length=256)
    assert "positions" not in caplog.text


def test_learned_positions_end(load, tmp_path):
    config = GPT2Config(vocab_size=tiny.VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path, max_seq_length=32).config.max_position_embeddings == 32
    with pytest.raises(ConfigError, match="model with 32 learned positions"):
        load(tmp_path, max_seq_length=33)
    with pytest.raises(ConfigError, match="no rotary positions"):
        load(tmp_path, max_seq_length=32, rope_scaling={"factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yern", "factor": 2.0}, "Did you mean 'yarn'"),
        ({"rope_type": "default", "factor": 2.0}, "rope_type='default'"),
        ({"rope_type": "linear"}, "lacks factor"),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0]}, "lacks long_factor"),
        ({"factor": 0.5}, "factor=0.5"),
        ({"factor": "2"}, "factor='2'"),
    ],
)
def test_what_cannot_be_stretched(llama, scaling, message):
    config = AutoConfig.from_pretrained(llama)
    before = dict(config.rope_parameters)
    with pytest.raises(ConfigError, match=message):
        extend_positions(config, 64, scaling)
    assert config.rope_parameters == before


def test_several_sets_of_rotary_positions_are_left_alone(checkpoints):
    config = AutoConfig.from_pretrained(checkpoints("gemma3_text"))
    with pytest.raises(ConfigError, match="several sets"):
        extend_positions(config, 64, {"factor": 2.0})
