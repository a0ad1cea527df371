"""A tokenizer as keys of a GGUF file: byte-level BPE ("gpt2") or sentencepiece's BPE ("llama").

llama.cpp cuts text by code of its own that goes by a name, so the way a tokenizer cuts must be one that has a name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from pantheraml.errors import NotYetError, SaveError
from pantheraml.export.gguf.formats import load_gguf
from pantheraml.log import warn

Keys = dict[str, Any]
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str) -> str:
    """Words whose capitals are at the beginning."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"


# The expression that cuts text into words -> llama.cpp's name of it.
_CUTS = {
    _ENDINGS + _WORD + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _ENDINGS + _WORD + r"|\p{N}" + _REST: "qwen2",
    _cased("") + r"|\p{N}" + _SLASHED: "tekken",
    _cased(_ENDINGS + "?") + r"|\p{N}{1,3}" + _SLASHED: "gpt-4o",
}


def read_vocabulary(tokenizer: Any, rows: int) -> Keys:
    """The keys of ``tokenizer``, as methods of ``gguf.GGUFWriter`` without their ``add_``.

    Args:
        tokenizer: a fast tokenizer, or a processor that has one.
        rows: of the embedding; what the tokenizer lacks is filled with unused tokens.

    Raises:
        SaveError: there is no fast tokenizer, or it has more tokens than the model.
        NotYetError: it is of a kind that llama.cpp does not have, or cuts text in a way without a name there.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SaveError(
            got=f"The tokenizer is {'missing' if tokenizer is None else 'a ' + type(tokenizer).__name__}.",
            need="A GGUF file carries its tokenizer, which is read from a fast one.",
            fix="Pass the tokenizer that FastLanguageModel.from_pretrained returned.",
        )
    parts = json.loads(backend.to_str())
    model = parts["model"]
    is_byte_level = any(step["type"] == "ByteLevel" for step in _steps(parts["pre_tokenizer"]))
    if model["type"] != "BPE" or not (is_byte_level or model.get("byte_fallback")):
        raise NotYetError(
            got=f"The tokenizer is of the kind {model['type']}, not of bytes.",
            need="GGUF files are written with byte-level BPE and with sentencepiece's BPE that falls back to bytes.",
            fix="Use save_pretrained_merged, which transformers and vLLM load.",
        )
    tokens, types = _tokens(tokenizer, rows, is_sentencepiece=not is_byte_level)
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    keys: Keys = {"token_list": tokens, "token_types": types}
    if is_byte_level:
        keys |= {"tokenizer_model": "gpt2", "tokenizer_pre": _cut(parts)}
        keys["token_merges"] = [" ".join(merge) for merge in merges]
    else:
        keys |= {"tokenizer_model": "llama", "tokenizer_pre": "default"}
        keys["token_scores"] = _scores(tokens, model["vocab"], merges)
        keys["add_space_prefix"] = _has_space_prefix(parts)
    return keys | _special(tokenizer)


def _steps(node: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The normalizers or pre-tokenizers of a ``tokenizer.json``, one after another."""
    if node is None:
        return
    if node["type"] == "Sequence":
        for step in node.get("pretokenizers", node.get("normalizers", ())):
            yield from _steps(step)
    else:
        yield node


def _tokens(tokenizer: Any, rows: int, is_sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Every token and its kind, in the order of their ids."""
    kinds = load_gguf().TokenType
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(kinds.UNUSED)] * rows
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise SaveError(
            got=f"The tokenizer has {max(vocabulary.values()) + 1} tokens and the model's embedding {rows} rows.",
            need="Every token needs a row.",
            fix="Load with resize_model_vocab=len(tokenizer), or pass the model's own tokenizer.",
        )
    added = tokenizer.added_tokens_decoder
    for token, number in vocabulary.items():
        tokens[number] = token
        if number in added:
            types[number] = int(kinds.CONTROL if added[number].special else kinds.USER_DEFINED)
            if is_sentencepiece and not added[number].special:
                tokens[number] = token.replace(_SPACE, " ")
        else:
            is_byte = is_sentencepiece and _BYTE.fullmatch(token)
            types[number] = int(kinds.BYTE if is_byte else kinds.NORMAL)
    return tokens, types


def _cut(parts: dict[str, Any]) -> str:
    """llama.cpp's name of the way that words are cut."""
    steps = list(_steps(parts["pre_tokenizer"]))
    last = steps[-1]
    found = None
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        before = [(step["type"], step.get("individual_digits")) for step in steps[:-1]]
        if last["use_regex"]:
            found = {(): "gpt-2", (("Digits", True),): "smollm"}.get(tuple(before))
        elif [step for step, _ in before] == ["Split"]:
            found = _CUTS.get(steps[0]["pattern"].get("Regex"))
    if found == "llama-bpe" and not parts["model"].get("ignore_merges"):
        found = "dbrx"  # the same words; whole words that are tokens are merged like others
    if found is None:
        raise NotYetError(
            got=f"The tokenizer cuts words by {json.dumps(parts['pre_tokenizer'])}.",
            need="llama.cpp has names for such ways; known here are those of Llama 3, Qwen, Mistral, GPT-2, GPT-4o.",
            fix="Use save_pretrained_merged and llama.cpp's convert_hf_to_gguf.py, which knows more.",
        )
    return found


def _scores(tokens: list[str], vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> list[float]:
    """What sentencepiece merges first has the higher score: minus the place of a token's first merge."""
    places: dict[str, int] = {}
    for merge in merges:
        places.setdefault("".join(merge), len(places))
    ways = sum(
        token[:cut] in vocabulary and token[cut:] in vocabulary
        for token in places
        for cut in range(1, len(token))
    )
    if ways != len(merges):
        warn(
            f"The tokenizer has {len(merges)} merges; llama.cpp makes its tokens in all {ways} ways that there are, "
            "and may cut some words otherwise."
        )
    return [-float(places.get(token, len(places))) for token in tokens]


def _has_space_prefix(parts: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    prepends = any(step["type"] == "Prepend" for step in _steps(parts["normalizer"]))
    return prepends or any(
        step["type"] == "Metaspace" and step["prepend_scheme"] != "never"
        for step in _steps(parts["pre_tokenizer"])
    )


def _special(tokenizer: Any) -> Keys:
    """Tokens with a part to play, whether text gets them, and the chat template."""
    keys: Keys = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")
    }
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    keys["add_bos_token"] = whole[0] == tokenizer.bos_token_id != bare[0]
    keys["add_eos_token"] = whole[-1] == tokenizer.eos_token_id != bare[-1]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    keys["chat_template"] = template
    return {key: value for key, value in keys.items() if value is not None}
