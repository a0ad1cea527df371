"""GGUF files hold the merged model, as transformers and the gguf library read them, or are refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_CUT

from pantheraml.errors import AdapterError, ConfigError, NotYetError, SaveError
from pantheraml.export.gguf.save import save_gguf
from pantheraml.export.merge import merged_tensors
from tests import tiny
from tests.export.gguf_files import (
    AS_TRANSFORMERS_READS,
    byte_level_tokenizer,
    keys_of,
    kinds_of,
    sentencepiece_tokenizer,
    tensors_of,
)
from tests.export.models import adapted, assert_same, logits, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    # The gguf library reads arrays out of a memory map.
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]
# What rounding may do to the logits, relative to them; docs/saving.md has the figures.
WITHIN = dict(f32=5e-6, bf16=0.015, f16=0.003, q8_0=0.05, q5_1=0.25, q5_0=0.25, q4_1=0.4, q4_0=0.5)


def model_of(family, **overrides):
    return adapted(tiny.build_model(family, **AS_TRANSFORMERS_READS.get(family, {}), **overrides))


def relative_error(found, expected):
    """Root of the mean square of the difference, of that of the logits."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def read(folder, name):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@pytest.mark.promise("F9")
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "qwen3_moe"]
)
def test_transformers_loads_the_trained_model(family, tokenizer, tmp_path):
    model = model_of(family)
    expected, before = logits(model), snapshot(model)
    formats = list(WITHIN) if family == "llama" else ["f32", "q8_0"]
    if family == "qwen3_moe":
        formats.pop()  # a rounded weight may send a token to another expert
    files = save_gguf(model, tmp_path, tokenizer, formats)
    assert_same(snapshot(model), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)
    for name, file in zip(formats, files, strict=True):
        found = logits(read(tmp_path, file.name))
        assert relative_error(found, expected) < WITHIN[name], name
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.2


@pytest.mark.promise("F9")
def test_formats_keep_what_needs_more_bits(tokenizer, tmp_path):
    model = model_of("mixtral", intermediate_size=80)
    save_gguf(model, tmp_path, tokenizer, ["q4_0", "q8_0"])
    kinds = kinds_of(tmp_path / "model-Q4_0.gguf")
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_gate_exps.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"  # rows of 80 are no whole number of blocks
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.1.attn_norm.weight"] == "F32"
    merged = dict(merged_tensors(model, "float32"))
    gate, up = merged["model.layers.1.mlp.experts.gate_up_proj"].chunk(2, dim=1)
    for bits, name in ((8, "model-Q8_0.gguf"), (4, "model-Q4_0.gguf")):
        found = tensors_of(tmp_path / name)
        for part, values in (("gate", gate), ("up", up)):
            error = (found[f"blk.1.ffn_{part}_exps.weight"] - values).unflatten(-1, (-1, 32)).abs().amax(-1)
            largest = values.unflatten(-1, (-1, 32)).abs().amax(-1)
            # Half a step and a scale in float16; of 4 bits, the side without the largest value has one step less.
            assert (error <= largest * (0.5 / 127 + 2**-11 if bits == 8 else 1.01 / 8)).all()


def test_experts_that_alternate_are_taken_apart(tokenizer, tmp_path):
    model = model_of("gpt_oss")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)  # biases and sinks, too
    save_gguf(model, tmp_path, tokenizer, "f32")
    merged, found = dict(merged_tensors(model, "float32")), tensors_of(tmp_path / "model-F32.gguf")
    layer = "model.layers.1.mlp.experts."
    assert found["blk.1.ffn_gate_exps.weight"].equal(merged[f"{layer}gate_up_proj"][..., ::2].mT)
    assert found["blk.1.ffn_up_exps.weight"].equal(merged[f"{layer}gate_up_proj"][..., 1::2].mT)
    assert found["blk.1.ffn_up_exps.bias"].equal(merged[f"{layer}gate_up_proj_bias"][..., 1::2])
    assert found["blk.1.ffn_down_exps.weight"].equal(merged[f"{layer}down_proj"].mT)
    assert found["blk.1.ffn_down_exps.bias"].equal(merged[f"{layer}down_proj_bias"])
    assert found["blk.1.attn_sinks.weight"].equal(merged["model.layers.1.self_attn.sinks"])
    keys = keys_of(tmp_path / "model-F32.gguf")
    assert keys["gpt-oss.expert_count"] == 4 and keys["gpt-oss.attention.sliding_window"] == 16


ROPES = {
    "llama3": ("llama", dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "linear": ("llama", dict(factor=4.0)),
    "yarn": ("qwen2", dict(factor=4.0, attention_factor=1.5)),
    "longrope": (
        "phi3",
        dict(short_factor=[1.0 + i / 8 for i in range(8)], long_factor=[1.0 + i for i in range(8)]),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.filterwarnings("ignore:This model config has set")
def test_rope_scalings(kind, tokenizer, tmp_path):
    family, settings = ROPES[kind]
    rope = dict(rope_type=kind, rope_theta=500.0, **settings)
    overrides = {} if kind == "linear" else dict(original_max_position_embeddings=64)
    model = tiny.build_model(
        family, rope_parameters=rope | overrides, **(overrides if kind == "longrope" else {})
    )
    save_gguf(model, tmp_path, tokenizer, "f32")
    keys, tensors = keys_of(tmp_path / "model-F32.gguf"), tensors_of(tmp_path / "model-F32.gguf")
    arch = keys["general.architecture"]
    frequencies = model.model.rotary_emb.inv_freq
    plain = 1.0 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    assert keys[f"{arch}.rope.freq_base"] == 500.0 and keys[f"{arch}.rope.dimension_count"] == 16
    if kind == "llama3":
        assert f"{arch}.rope.scaling.type" not in keys
        torch.testing.assert_close(plain / tensors["rope_freqs.weight"], frequencies)
        return
    assert keys[f"{arch}.rope.scaling.type"] == kind
    if kind == "longrope":
        assert tensors["rope_factors_long.weight"].tolist() == settings["long_factor"]
        torch.testing.assert_close(plain / tensors["rope_factors_short.weight"], frequencies)
        factor = keys[f"{arch}.rope.scaling.attn_factor"]
        assert factor == pytest.approx(model.model.rotary_emb.attention_scaling)
        return
    assert keys[f"{arch}.rope.scaling.factor"] == 4.0
    if kind == "yarn":
        assert keys[f"{arch}.rope.scaling.original_context_length"] == 64
        usual = 1 + 0.1 * torch.tensor(4.0).log().item()  # which llama.cpp multiplies it by
        assert keys[f"{arch}.rope.scaling.attn_factor"] * usual == pytest.approx(1.5)


SAID = [
    "Hello world, it's 12345 o'clock!\n\n  tabs\t and   spaces",
    "Ünïcödé 漢字 🙂 The quick brown fox",
    "I'LL <tool>x",
]
LLAMA3_CUT = QWEN2_CUT.replace(r"\p{N}|", r"\p{N}{1,3}|")
TOKENIZERS = {
    "gpt-2": lambda: byte_level_tokenizer(),
    "qwen2": lambda: byte_level_tokenizer(QWEN2_CUT),
    "llama-bpe": lambda: byte_level_tokenizer(LLAMA3_CUT, ignore_merges=True),
    "default": sentencepiece_tokenizer,
}


@pytest.mark.promise("F9")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_comes_back(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = tiny.CHATML
    save_gguf(tiny.build_model("llama", vocab_size=480), tmp_path, tokenizer, "q8_0")
    keys = keys_of(tmp_path / "model-Q8_0.gguf")
    assert keys["tokenizer.ggml.pre"] == name and keys["tokenizer.chat_template"] == tiny.CHATML
    is_sentencepiece = name == "default"
    assert keys["tokenizer.ggml.model"] == ("llama" if is_sentencepiece else "gpt2")
    assert keys["tokenizer.ggml.add_bos_token"] is is_sentencepiece
    assert len(keys["tokenizer.ggml.tokens"]) == keys["llama.vocab_size"] == 480
    assert keys["tokenizer.ggml.tokens"][479] == "[PAD479]" and keys["tokenizer.ggml.token_type"][479] == 5
    assert keys["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    if version.parse(transformers.__version__) >= version.parse(
        "5.23"
    ):  # older ones cut words in ways of their own
        again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model-Q8_0.gguf")
        for text in SAID:
            assert again.encode(text) == tokenizer.encode(text)
    start = keys["tokenizer.ggml.tokens"].index("<|im_start|>")
    assert keys["tokenizer.ggml.token_type"][start] == 3


def test_kinds_of_sentencepiece_tokens(tmp_path):
    tokenizer = sentencepiece_tokenizer(space_prefix=False)
    save_gguf(tiny.build_model("llama", vocab_size=480), tmp_path, tokenizer, "q8_0")
    keys = keys_of(tmp_path / "model-Q8_0.gguf")
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert kinds[tokens.index("<0x41>")] == 6 and kinds[tokens.index("</s>")] == 3
    assert kinds[tokens.index("<tool call>")] == 4  # as text has it
    scores = keys["tokenizer.ggml.scores"]
    first, second = (tokens.index(token) for token in ("er", "▁t"))
    assert (scores[first] > scores[second]) == (first < second)  # what is merged first


def test_a_4_bit_base_is_read_as_training_saw_it(tokenizer, tmp_path):
    tiny.save_checkpoint(tmp_path / "base", "qwen2", intermediate_size=128)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4))
    save_gguf(model, tmp_path / "out", tokenizer, ["f32", "not_quantized"])
    merged, found = dict(merged_tensors(model, "float32")), tensors_of(tmp_path / "out" / "model-F32.gguf")
    for ours, theirs in (("mlp.gate_proj", "ffn_gate"), ("self_attn.q_proj", "attn_q")):
        assert found[f"blk.1.{theirs}.weight"].equal(merged[f"model.layers.1.{ours}.weight"])
    assert (tmp_path / "out" / "model-BF16.gguf").exists()


def test_the_configuration_comes_back(tokenizer, tmp_path):
    sizes = dict(head_dim=32, query_pre_attn_scalar=32, tie_word_embeddings=True, num_hidden_layers=6)
    rope = {
        "full_attention": dict(rope_type="linear", rope_theta=50000.0, factor=8.0),
        "sliding_attention": dict(rope_type="default", rope_theta=3000.0),
    }
    model = tiny.build_model("gemma3_text", rope_parameters=rope, **sizes)
    save_gguf(model, tmp_path, tokenizer, "f16")
    ours, theirs = model.config, AutoConfig.from_pretrained(tmp_path, gguf_file="model-F16.gguf")
    for name in (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "sliding_window", "layer_types",
        "bos_token_id", "eos_token_id",
    ):  # fmt: skip
        expected = getattr(ours, name)
        assert getattr(theirs, name) == (
            pytest.approx(expected) if isinstance(expected, float) else expected
        ), name
    keys = keys_of(tmp_path / "model-F16.gguf")  # transformers does not read these
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (50000.0, 3000.0)
    assert (keys["gemma3.rope.scaling.type"], keys["gemma3.rope.scaling.factor"]) == ("linear", 8.0)
    assert "output.weight" not in kinds_of(tmp_path / "model-F16.gguf")


REFUSED = [
    ("llama", {}, "q4_k_m", NotYetError, r"llama-quantize FOLDER/model-BF16.gguf FOLDER/model-Q4_K_M.gguf Q4_K_M"),
    ("llama", {}, "q8", ConfigError, "q8_0"),
    ("llama", {}, [], ConfigError, "empty"),
    ("qwen3_moe", dict(norm_topk_prob=False), "f16", NotYetError, "norm_topk_prob=False"),
    ("gemma3_text", dict(query_pre_attn_scalar=64), "f16", NotYetError, "query_pre_attn_scalar=64"),
    ("gemma2", dict(layer_types=["full_attention"] * 2), "f16", NotYetError, "layer_types"),
    ("gemma2", dict(tie_word_embeddings=False), "f16", NotYetError, "lm_head.weight"),
    ("llama", dict(hidden_act="relu"), "f16", NotYetError, "activation relu"),
    ("llama", dict(vocab_size=384), "f16", SaveError, "embedding 384 rows"),
    (
        "llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
        "f16", NotYetError, "scaled by 'dynamic'",
    ),
]  # fmt: skip


@pytest.mark.promise("F9")
@pytest.mark.parametrize(
    ("family", "overrides", "method", "error", "said"), REFUSED, ids=lambda value: str(value)[:20]
)
def test_what_cannot_be_written_is_refused(family, overrides, method, error, said, tokenizer, tmp_path):
    with pytest.raises(error, match=said):
        save_gguf(tiny.build_model(family, **overrides), tmp_path / "out", tokenizer, method)
    assert list(tmp_path.iterdir()) == []


def test_other_models_and_tokenizers_are_refused(tmp_path, tokenizer):
    config = AutoConfig.for_model("gpt2", vocab_size=512, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    with pytest.raises(NotYetError, match=r"gpt2.*convert_hf_to_gguf"):
        save_gguf(AutoModelForCausalLM.from_config(config), tmp_path / "out", tokenizer)
    model = tiny.build_model("llama")
    with pytest.raises(SaveError, match="tokenizer is missing"):
        save_gguf(model, tmp_path / "out", None)
    with pytest.raises(NotYetError, match="cuts words by"):
        save_gguf(model, tmp_path / "out", byte_level_tokenizer(r"\w+"))
    prompt = adapted(model)
    prompt.base_model.model.model.layers[0].mlp.up_proj.lora_bias["default"] = True
    with pytest.raises(AdapterError, match="lora_bias"):
        save_gguf(prompt, tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("F9")
def test_what_does_not_fit_leaves_the_older_file(tokenizer, tmp_path):
    model = model_of("llama")
    save_gguf(model, tmp_path, tokenizer, "f16")
    before = (tmp_path / "model-F16.gguf").read_bytes()
    weight = model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight
    with torch.no_grad():
        weight[0, 0] = 1e6
    with pytest.raises(SaveError, match=r"blk\.1\.ffn_down\.weight.*bf16"):
        save_gguf(model, tmp_path, tokenizer, ["bf16", "f16"])
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(SaveError, match=r"layers\.1\.mlp\.down_proj.*not finite"):
        save_gguf(model, tmp_path, tokenizer, "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["model-F16.gguf"]
    assert (tmp_path / "model-F16.gguf").read_bytes() == before


def test_a_window_that_llama_cpp_has_not_is_said(tokenizer, tmp_path, caplog):
    save_gguf(tiny.build_model("mistral"), tmp_path, tokenizer, "f16")
    assert "the last 16 tokens only" in caplog.text
