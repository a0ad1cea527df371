"""A small Llama-shaped base model and a tokenizer, built on this machine from the demo's own rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


def build_base_model(folder: Path, texts: Iterable[str], *, seed: int = 3407) -> int:
    """Write a random Llama with 4 layers of width 256 and a byte-level BPE tokenizer trained on ``texts``.

    Args:
        folder: where the checkpoint goes (``config.json``, safetensors, tokenizer).
        texts: what the tokenizer is trained on.
        seed: of the random weights.

    Returns:
        The number of parameters.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    pad, begin, end = SPECIAL_TOKENS[:3]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=pad, bos_token=begin, eos_token=end)
    tokenizer.save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
