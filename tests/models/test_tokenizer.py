"""Tokenizers: a padding token that is not the end-of-text token, or nothing touched."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from pantheraml import FastLanguageModel
from pantheraml.errors import ModelLoadError
from pantheraml.models.tokenizer import load_tokenizer
from tests import tiny


@pytest.fixture
def written(tmp_path):
    """Writes a tokenizer whose vocabulary has ``extra`` tokens and whose roles are ``roles``."""

    def write(extra=(), **roles):
        tokenizer = tiny.build_tokenizer()
        tokenizer.add_tokens(list(extra))
        for name, value in {"pad_token": None, "padding_side": "left", **roles}.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("extra", "roles", "pad", "said"),
    [
        ((), {"pad_token": "<|im_end|>"}, "<|im_end|>", ""),
        ((), {}, "<pad>", "'<pad>': the tokenizer named no token for it"),
        ((), {"pad_token": "</s>"}, "<pad>", "'<pad>': the tokenizer named the end-of-text token for it"),
        (("<|finetune_right_pad_id|>",), {}, "<|finetune_right_pad_id|>", "named no token"),
        ((), {"eos_token": "<pad>"}, "<pad>", "padding uses the end-of-text token '<pad>'"),
        ((), {"eos_token": "<pad>", "pad_token": "<pad>"}, "<pad>", "padding uses the end-of-text token"),
        (("[PAD]", "<unk>"), {"eos_token": "<pad>"}, "[PAD]", "'[PAD]'"),
    ],
)
def test_the_padding_token(written, caplog, extra, roles, pad, said):
    caplog.set_level("INFO", logger="pantheraml")
    folder = written(extra, **roles)
    tokenizer = load_tokenizer(folder, fix=True)
    assert tokenizer.pad_token == pad and tokenizer.padding_side == "right"
    assert said in caplog.text and bool(caplog.text) == bool(said)
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(folder)), "no token is added"


def test_fix_tokenizer_off_leaves_everything(written, llama, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    folder = written()
    tokenizer = load_tokenizer(folder, fix=False)
    assert tokenizer.pad_token is None and tokenizer.padding_side == "left" and not caplog.text
    for fix, pad in ((False, None), (True, "<pad>")):
        tiny.build_model().save_pretrained(folder)
        _, tokenizer = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu", fix_tokenizer=fix
        )
        assert tokenizer.pad_token == pad


def test_a_vocabulary_that_the_model_does_not_embed_is_told(tmp_path, caplog):
    tiny.save_checkpoint(tmp_path, vocab_size=300)

    def load(**flags):
        caplog.clear()
        FastLanguageModel.from_pretrained(
            str(tmp_path), max_seq_length=64, load_in_4bit=False, device_map="cpu", **flags
        )
        return caplog.text

    count = len(tiny.build_tokenizer())
    assert f"the tokenizer has {count} tokens but the model embeds 300" in load()
    assert f"resize_model_vocab={count}" in caplog.text
    assert "embeds" not in load(resize_model_vocab=count)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelLoadError, match="holds no tokenizer"):
        load_tokenizer(tmp_path, fix=True)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_tokenizer(tmp_path, fix=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_tokenizer(tmp_path, fix=True)
