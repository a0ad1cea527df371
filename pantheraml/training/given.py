"""What a trainer is given: a loaded model, and a tokenizer under one of two names."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from pantheraml.errors import ConfigError


def refuse_name(model: object) -> None:
    """Refuse a model that is named and not loaded."""
    if isinstance(model, str):
        raise ConfigError(
            got=f"model={model!r} was given to the trainer.",
            need="The trainer takes a loaded model.",
            fix=f"Write model, tokenizer = FastLanguageModel.from_pretrained({model!r}).",
        )


def one_tokenizer(
    processing_class: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer under either of its names."""
    if processing_class is not None and tokenizer is not None and processing_class is not tokenizer:
        raise ConfigError(
            got="tokenizer= and processing_class= were given, and they differ.",
            need="They are two names of the same argument.",
            fix="Keep one.",
        )
    chosen = processing_class if processing_class is not None else tokenizer
    if chosen is None:
        raise ConfigError(
            got="The trainer got no tokenizer.",
            need="Rows are formatted and tokenised by the tokenizer that came with the model.",
            fix="Pass tokenizer=tokenizer, the second value of FastLanguageModel.from_pretrained.",
        )
    return chosen
