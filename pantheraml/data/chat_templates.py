"""Chat templates: how a conversation becomes the text that a model family was trained on.

Each template is a short Jinja file in ``templates/``, with ``{% generation %}`` around what the assistant
says including the token that ends its turn, so that a loss on assistant tokens alone can be taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pantheraml.errors import ConfigError, did_you_mean
from pantheraml.log import warn

_FOLDER = Path(__file__).parent / "templates"
_DEFAULT_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ChatTemplate:
    """One template of the registry.

    Args:
        name: the name to ask for.
        eos_token: the token that ends a turn; None where the tokenizer's own end token does.
        special_tokens: the tokens it writes, which must be single tokens of the vocabulary.
        aliases: other names for it.
    """

    name: str
    eos_token: str | None = None
    special_tokens: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @cached_property
    def text(self) -> str:
        """The Jinja source."""
        return (_FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")


_LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("alpaca"),
        ChatTemplate("chatml", "<|im_end|>", _CHATML_TOKENS),
        ChatTemplate(
            "gemma",
            "<end_of_turn>",
            ("<start_of_turn>", "<end_of_turn>"),
            ("gemma-2", "gemma2", "gemma-3", "gemma3"),
        ),
        ChatTemplate("llama-3", "<|eot_id|>", _LLAMA_TOKENS, ("llama3",)),
        ChatTemplate(
            "llama-3.1",
            "<|eot_id|>",
            _LLAMA_TOKENS,
            ("llama3.1", "llama-31", "llama-3.2", "llama3.2", "llama-3.3", "llama3.3"),
        ),
        ChatTemplate("mistral", None, ("[INST]", "[/INST]"), ("mixtral",)),
        ChatTemplate(
            "phi-3", "<|end|>", ("<|user|>", "<|assistant|>", "<|end|>"), ("phi3", "phi-3.5", "phi3.5")
        ),
        ChatTemplate("phi-4", "<|im_end|>", ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), ("phi4",)),
        ChatTemplate(
            "qwen-2.5", "<|im_end|>", _CHATML_TOKENS, ("qwen2.5", "qwen-25", "qwen25", "qwen2", "qwen-2")
        ),
        ChatTemplate("qwen-3", "<|im_end|>", _CHATML_TOKENS, ("qwen3",)),
        ChatTemplate("vicuna", None, (), ("vicuna-1.5",)),
        ChatTemplate("zephyr"),
    )
}


def find_template(name: str) -> ChatTemplate:
    """The template of that name or alias; upper and lower case and underscores do not matter.

    Raises:
        ConfigError: there is none.
    """
    wanted = name.lower().replace("_", "-")
    for template in CHAT_TEMPLATES.values():
        if wanted in (template.name, *template.aliases):
            return template
    names = [name for template in CHAT_TEMPLATES.values() for name in (template.name, *template.aliases)]
    raise ConfigError(
        got=f"There is no chat template called {name!r}. {did_you_mean(wanted, names)}".strip(),
        need=f"The templates are {', '.join(CHAT_TEMPLATES)}.",
        fix="Choose one of them, or give your own as chat_template=(jinja_text, eos_token).",
    )


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | tuple[str, str | None] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> PreTrainedTokenizerBase:
    """Give the tokenizer a chat template.

    Args:
        tokenizer: changed in place.
        chat_template: a name such as ``"llama-3.1"``, or your own as ``(jinja_text, eos_token)``.
        mapping: how the messages of your data are written, for the keys ``role`` and ``content`` and the
            names of ``user`` and ``assistant``; for ShareGPT that is
            ``{"role": "from", "content": "value", "user": "human", "assistant": "gpt"}``. Messages written
            with role and content are read as well.
        map_eos_token: make the token that ends a turn the tokenizer's ``eos_token``, so that generation stops
            there. No token is ever added to the vocabulary.
        system_message: the system turn of conversations that bring none.

    Returns:
        The same tokenizer.

    Raises:
        ConfigError: no template of that name, or a mapping with unknown keys.
    """
    if isinstance(chat_template, str):
        template = find_template(chat_template)
        name, text, eos_token, special = (
            template.name,
            template.text,
            template.eos_token,
            template.special_tokens,
        )
    else:
        text, eos_token = chat_template
        name, special = "given", (eos_token,) if eos_token else ()
    tokenizer.chat_template = (
        _bos_prelude(tokenizer, text) + _mapping_prelude(mapping) + _system_prelude(system_message) + text
    )
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in special if token not in vocabulary]
    if missing:
        warn(
            f"The vocabulary of this tokenizer lacks {', '.join(missing)}, which the {name} template writes: "
            "they are split into pieces that mean nothing to the model. Choose the template that the model "
            "was made for, or 'alpaca', which needs no special token."
        )
    if map_eos_token and eos_token in vocabulary:
        tokenizer.eos_token = eos_token
    return tokenizer


def detect_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The template of the registry that the tokenizer carries, None when it carries another or none."""
    text = template_text(tokenizer)
    matches = [template for template in CHAT_TEMPLATES.values() if text and text.endswith(template.text)]
    return matches[0] if matches else None


def template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template; its default one where several are named, None without any."""
    text = tokenizer.chat_template
    return text.get("default") if isinstance(text, dict) else text


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its begin token before every text."""
    begin = tokenizer.bos_token_id
    return begin is not None and tokenizer("a")["input_ids"][:1] == [begin]


def _bos_prelude(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Rendered conversations are tokenised without special tokens, so the template writes the first token.

    Needed for templates that do not write it themselves, on tokenizers that put it before plain text.
    """
    return "{{- bos_token }}\n" if begins_with_bos(tokenizer) and "bos_token" not in text else ""


def _mapping_prelude(mapping: Mapping[str, str] | None) -> str:
    """Jinja that rewrites the messages to role and content before the template reads them."""
    if mapping is None or dict(mapping) == _DEFAULT_MAPPING:
        return ""
    unknown = set(mapping) - {*_DEFAULT_MAPPING, "system"}
    if unknown:
        raise ConfigError(
            got=f"The mapping has the key {', '.join(map(repr, sorted(unknown)))}.",
            need="A mapping may have the keys 'role', 'content', 'user', 'assistant' and 'system'.",
            fix='For ShareGPT: {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}.',
        )
    names = {**_DEFAULT_MAPPING, **mapping}
    roles = {names[role]: role for role in ("user", "assistant", "system") if role in names}
    role_key, content_key = json.dumps(names["role"]), json.dumps(names["content"])
    return (
        f"{{%- set roles = {json.dumps(roles)} %}}\n"
        "{%- set read = namespace(messages=[]) %}\n"
        "{%- for m in messages %}\n"
        f"    {{%- set role = m[{role_key}] if {role_key} in m else m.role %}}\n"
        f"    {{%- set content = m[{content_key}] if {content_key} in m else m.content %}}\n"
        "    {%- set message = dict(m, role=roles.get(role, role), content=content) %}\n"
        "    {%- set read.messages = read.messages + [message] %}\n"
        "{%- endfor %}\n"
        "{%- set messages = read.messages %}\n"
    )


def _system_prelude(system_message: str | None) -> str:
    """Jinja that puts ``system_message`` before conversations that bring no system turn."""
    if system_message is None:
        return ""
    turn = json.dumps({"role": "system", "content": system_message})
    return (
        "{%- if not messages or messages[0].role != 'system' %}\n"
        f"    {{%- set messages = [{turn}] + messages %}}\n"
        "{%- endif %}\n"
    )
