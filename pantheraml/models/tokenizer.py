"""Load a tokenizer and mend what would spoil training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pantheraml.errors import ModelLoadError, first_line
from pantheraml.log import say, warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Any of these is a tokenizer, or most of one.
_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
# Tokens that model makers set aside for padding, in order of preference.
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>", "<unk>")


def load_tokenizer(folder: Path, *, fix: bool, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Args:
        folder: where ``tokenizer.json`` or its kin are.
        fix: give it a padding token that is not the end-of-text token, and pad on the right.
        trust_remote_code: run the folder's own Python code.

    Raises:
        ModelLoadError: no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    if not any(path for pattern in _FILES for path in folder.glob(pattern)):
        raise ModelLoadError(
            got=f"'{folder}' holds no tokenizer.",
            need="A tokenizer.json (or a sentencepiece tokenizer.model) is needed beside the weights.",
            fix="Copy the tokenizer's files of the original model there.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ModelLoadError(
            got=f"The tokenizer in '{folder}' cannot be read ({first_line(error)}).",
            need="A tokenizer.json (or a sentencepiece tokenizer.model) is needed beside the weights.",
            fix="Copy the tokenizer's files of the original model again; for tokenizer.model also "
            "`pip install 'pantheraml[sentencepiece]'`.",
        ) from error
    if fix:
        tokenizer.padding_side = "right"
        _ensure_pad_token(tokenizer)
    return tokenizer


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    named = tokenizer.pad_token
    if named is not None and named != tokenizer.eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    for token in _PAD_TOKENS:
        if token in vocabulary and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            said = "no token" if named is None else "the end-of-text token"
            say(f"padding uses {token!r}: the tokenizer named {said} for it.")
            return
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    say(f"padding uses the end-of-text token {tokenizer.pad_token!r}; padded places are never trained on.")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn when the tokenizer can produce ids that the embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess, reportCallIssue, reportIndexIssue]
    if len(tokenizer) > rows:
        warn(
            f"the tokenizer has {len(tokenizer)} tokens but the model embeds {rows}; a row that uses the extra ones "
            f"will fail. Load with resize_model_vocab={len(tokenizer)} to add rows for them."
        )
