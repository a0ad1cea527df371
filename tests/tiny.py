"""Tiny random checkpoints, one per model family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

VOCAB = 512
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris.",
    "### Instruction:\nAdd two and three.\n\n### Response:\nFive is the answer to that question.",
    "user assistant system Human and machine write short questions and answers about the world.",
]

_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_MOE = dict(num_local_experts=4, num_experts_per_tok=2)
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": dict(sliding_window=16, head_dim=16),
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "gemma2": dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3_text": dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
    "phi3": {},
    "mixtral": dict(**_MOE),
    "qwen3_moe": dict(head_dim=16, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(
        head_dim=16,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **_MOE,
    ),
}


def build_tokenizer(chat_template: str | None = CHATML):
    """A byte-level BPE tokenizer of at most ``VOCAB`` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    fast.chat_template = chat_template
    return fast


def build_model(family: str = "llama", seed: int = 0, **overrides):
    """A float32 causal language model of ``family`` with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family], **overrides})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_checkpoint(
    folder: Path, family: str = "llama", chat_template: str | None = CHATML, **overrides
) -> Path:
    """Write a tiny checkpoint with its tokenizer to ``folder``; returns ``folder``."""
    build_model(family, **overrides).save_pretrained(folder)
    build_tokenizer(chat_template).save_pretrained(folder)
    return folder
