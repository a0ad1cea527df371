"""Reading GGUF files back, and tokenizers of the kinds that they carry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pantheraml.export.gguf.save import save_gguf
from tests import tiny

# What transformers does not read from a GGUF file but takes as given, so that models of these settings load in it.
AS_TRANSFORMERS_READS = {
    "mistral": dict(sliding_window=None),
    "qwen3": dict(head_dim=128),
    "gemma2": dict(head_dim=256, query_pre_attn_scalar=256, tie_word_embeddings=True),
    "gemma3_text": dict(head_dim=256, query_pre_attn_scalar=256, tie_word_embeddings=True),
    "qwen3_moe": dict(norm_topk_prob=True, moe_intermediate_size=768),
}


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file in float32, in torch's order of dims."""
    from gguf import GGUFReader, dequantize

    return {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for tensor in GGUFReader(file).tensors
    }


def assert_same_model(file: Path, merged: Path) -> None:
    """``file``, in float32, is what one process writes of the folder ``merged``."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    (again,) = save_gguf(model, merged.with_name("again"), tokenizer, "f32")
    found, expected = tensors_of(file), tensors_of(again)
    assert found.keys() == expected.keys()
    assert [name for name in found if not found[name].equal(expected[name])] == []
    keys, expected_keys = keys_of(file), keys_of(again)
    assert {**keys, "general.name": ""} == {**expected_keys, "general.name": ""}


def kinds_of(file: Path) -> dict[str, str]:
    """How each tensor is stored."""
    from gguf import GGUFReader

    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


def keys_of(file: Path) -> dict:
    """All metadata."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def sentencepiece_tokenizer(space_prefix: bool = True) -> PreTrainedTokenizerFast:
    """BPE that falls back to bytes, with the merges that converting a sentencepiece model gives."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(tiny.TEXTS * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    words = [token for token in learned if len(token) > 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokens += [token for token in learned if len(token) == 1]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    backend.normalizer = prepend if space_prefix else replace
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<tool▁call>", normalized=False)])
    return tokenizer


def byte_level_tokenizer(cut: str | None = None, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE that cuts words by a regular expression, or as GPT-2 does."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None)
    split = [] if cut is None else [pre_tokenizers.Split(Regex(cut), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, bytewise])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=tiny.SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(tiny.TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer
