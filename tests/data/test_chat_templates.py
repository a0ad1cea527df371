"""What each template writes, against the published text of its family."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl

from pantheraml.data.chat_templates import CHAT_TEMPLATES, detect_template, find_template, get_chat_template
from pantheraml.data.turns import TurnParts, find_turn_parts
from pantheraml.errors import ConfigError
from tests import tiny

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
GOLDEN = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
    "<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
    "llama-3.1": "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST] Hello</s>[INST] Bye[/INST]",
    "phi-3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
    "<|user|>\nBye<|end|>\n<|endoftext|>",
    "phi-4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
    "<|im_start|>assistant<|im_sep|>Hello<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|>",
    "qwen-2.5": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n",
    "qwen-3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n",
    "vicuna": "Be brief. USER: Hi ASSISTANT: Hello</s>USER: Bye ",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n",
}
GENERATION_PROMPT = {
    "alpaca": "\n\n### Response:\n",
    "chatml": "<|im_start|>assistant\n",
    "gemma": "<start_of_turn>model\n",
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-3.1": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "",
    "phi-3": "<|assistant|>\n",
    "phi-4": "<|im_start|>assistant<|im_sep|>",
    "qwen-2.5": "<|im_start|>assistant\n",
    "qwen-3": "<|im_start|>assistant\n",
    "vicuna": "ASSISTANT:",
    "zephyr": "<|assistant|>\n",
}
END_OF_TURN = {"alpaca": "</s>", "mistral": "</s>", "vicuna": "</s>", "zephyr": "</s>"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
CONVERSATIONS = {
    "question": CONVERSATION[1:2],
    "answer": CONVERSATION[1:3],
    "with system": CONVERSATION,
    "two turns": [*CONVERSATION[1:], {"role": "assistant", "content": " spaces "}],
    "thoughts": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\na"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nnew\n</think>\n\nb"},
    ],
    "tool": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "thanks"},
    ],
}
# Our template, the copy that trl ships of the model's own, and the conversations both can write.
PLAIN = ("question", "answer", "with system", "two turns")
PUBLISHED = {
    "gemma": ("gemma3", PLAIN),
    "llama-3": ("llama3", PLAIN),
    "llama-3.1": ("llama3_1", (*PLAIN, "tool")),
    "phi-3": ("phi3", PLAIN),
    "qwen-2.5": ("qwen2_5", (*PLAIN, "tool")),
    "qwen-3": ("qwen3", (*PLAIN, "thoughts", "tool")),
}


@pytest.fixture
def tokenizer():
    """A tokenizer that knows the special tokens of every template."""
    tokenizer = tiny.build_tokenizer(chat_template=None)
    tokens = {token for template in CHAT_TEMPLATES.values() for token in template.special_tokens}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(tokens - set(tokenizer.get_vocab()))})
    return tokenizer


def test_every_template_has_a_golden_text():
    assert set(GOLDEN) == set(GENERATION_PROMPT) == set(CHAT_TEMPLATES)


@pytest.mark.promise("F5")
@pytest.mark.parametrize("name", GOLDEN)
def test_text(name, tokenizer):
    get_chat_template(tokenizer, name, map_eos_token=False)
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == GOLDEN[name]
    prompted = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    # A finished phi-3 conversation ends in one more token, which a prompt has not.
    assert prompted == GOLDEN[name].removesuffix("<|endoftext|>") + GENERATION_PROMPT[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_generation_mask_is_what_the_assistant_says_and_its_end(name, tokenizer):
    get_chat_template(tokenizer, name)
    conversation = [*CONVERSATION, {"role": "assistant", "content": "See you soon."}]
    encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    pairs = list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))
    said = tokenizer.decode([token for token, mask in pairs if mask])
    end = END_OF_TURN.get(name, CHAT_TEMPLATES[name].eos_token)
    before_last = "<think>\n\n</think>\n\n" if name == "qwen-3" else ""
    space = " " if name in ("mistral", "vicuna") else ""
    assert said == f"{space}Hello{end}{space}{before_last}See you soon.{end}"


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("name", "published", "conversation"),
    [(name, published, key) for name, (published, keys) in PUBLISHED.items() for key in keys],
)
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": True}, {"tools": [TOOL]}], ids=["", "prompt", "tools"]
)
def test_text_equals_the_published_template(name, published, conversation, options, tokenizer):
    tokenizer.eos_token = "<|endoftext|>"  # of phi-3, whose published template writes the tokenizer's
    copy = (Path(trl.__file__).parent / "chat_templates" / f"{published}.jinja").read_text(encoding="utf-8")
    texts = [
        tokenizer.apply_chat_template(
            CONVERSATIONS[conversation], chat_template=text, tokenize=False, **options
        )
        for text in (CHAT_TEMPLATES[name].text, copy)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["alpaca", "gemma", "mistral", "phi-3", "phi-4", "vicuna", "zephyr"])
def test_roles_without_a_place_are_refused(name, tokenizer):
    get_chat_template(tokenizer, name)
    with pytest.raises(Exception, match=f"The {name} template has no turn for the role tool"):
        tokenizer.apply_chat_template(CONVERSATIONS["tool"], tokenize=False)


@pytest.mark.parametrize(
    ("asked", "name"),
    [("llama3", "llama-3"), ("Qwen2.5", "qwen-2.5"), ("gemma_3", "gemma"), ("phi4", "phi-4")],
)
def test_aliases(asked, name):
    assert find_template(asked).name == name


def test_aliases_are_not_shared():
    names = [name for template in CHAT_TEMPLATES.values() for name in (template.name, *template.aliases)]
    assert len(names) == len(set(names))


def test_unknown_name_tells_the_close_ones(tokenizer):
    with pytest.raises(ConfigError, match=r"'chatlm'. Did you mean 'chatml'.*alpaca, chatml, gemma"):
        get_chat_template(tokenizer, "chatlm")


@pytest.mark.parametrize("name", GOLDEN)
def test_detect(name, tokenizer):
    get_chat_template(tokenizer, name, system_message="x", mapping={"role": "from", "content": "value"})
    assert detect_template(tokenizer).name == name


def test_detect_knows_what_is_not_ours():
    assert detect_template(tiny.build_tokenizer()) is None
    assert detect_template(tiny.build_tokenizer(chat_template=None)) is None


def test_eos_is_mapped_to_the_end_of_turn_without_new_tokens(tokenizer):
    size = len(tokenizer)
    assert get_chat_template(tokenizer, "chatml").eos_token == "<|im_end|>"
    assert len(tokenizer) == size
    tokenizer.eos_token = "</s>"
    assert get_chat_template(tokenizer, "chatml", map_eos_token=False).eos_token == "</s>"


def test_missing_tokens_are_named(caplog):
    tokenizer = tiny.build_tokenizer()
    size = len(tokenizer)
    get_chat_template(tokenizer, "llama-3")
    assert "lacks <|start_header_id|>, <|end_header_id|>, <|eot_id|>" in caplog.text
    assert (tokenizer.eos_token, len(tokenizer)) == ("</s>", size)


def test_complete_vocabularies_are_not_warned_about(tokenizer, caplog):
    get_chat_template(tokenizer, "llama-3")
    assert not caplog.text


def test_own_template(tokenizer):
    text = "{% for m in messages %}{{ m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
    get_chat_template(tokenizer, (text, "<|im_end|>"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template(CONVERSATION[1:2], tokenize=False) == "user>Hi<|im_end|>"


def test_mapping_reads_sharegpt_and_still_messages(tokenizer):
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    get_chat_template(tokenizer, "llama-3.1", mapping=mapping, map_eos_token=False)
    sharegpt = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Bye"},
    ]
    assert tokenizer.apply_chat_template(sharegpt, tokenize=False) == GOLDEN["llama-3.1"]
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == GOLDEN["llama-3.1"]


def test_mapping_with_unknown_keys_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="has the key 'human'"):
        get_chat_template(tokenizer, "chatml", mapping={"human": "user"})


def test_system_message_is_for_conversations_without_one(tokenizer):
    get_chat_template(tokenizer, "chatml", system_message='Say "yes".\n')
    text = tokenizer.apply_chat_template(CONVERSATION[1:2], tokenize=False)
    assert text == '<|im_start|>system\nSay "yes".\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == GOLDEN["chatml"]


def test_begin_token_is_written_where_the_tokenizer_puts_one(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    get_chat_template(tokenizer, "chatml")
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == "<s>" + GOLDEN["chatml"]
    get_chat_template(tokenizer, "llama-3")
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == GOLDEN["llama-3"]


@pytest.mark.parametrize("name", GOLDEN)
def test_turn_parts(name, tokenizer):
    get_chat_template(tokenizer, name, map_eos_token=False)
    response = {"mistral": "[/INST] ", "vicuna": " ASSISTANT: "}.get(name, GENERATION_PROMPT[name])
    instruction = {
        "alpaca": "\n\n### Instruction:\n",
        "gemma": "<start_of_turn>user\n",
        "mistral": "[INST] ",
        "vicuna": "USER: ",
    }.get(name, response.replace("assistant", "user"))
    end = END_OF_TURN.get(name, CHAT_TEMPLATES[name].eos_token)
    assert find_turn_parts(tokenizer) == TurnParts(instruction, response, end)


def test_turn_parts_of_templates_that_are_not_ours():
    assert find_turn_parts(tiny.build_tokenizer()) == TurnParts(
        "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
    )
    assert find_turn_parts(tiny.build_tokenizer(chat_template=None)) is None
    loses_the_answer = "{% for m in messages %}{{ m.role }}{% endfor %}"
    assert find_turn_parts(tiny.build_tokenizer(chat_template=loses_the_answer)) is None
    refuses = "{{ raise_exception('never') }}"
    assert find_turn_parts(tiny.build_tokenizer(chat_template=refuses)) is None
    thinks = (
        "{% for m in messages %}<{{ m.role }}>{{ '<think></think>' if m.role == 'assistant' }}"
        "{{ m.content }}</e>{% endfor %}"
    )
    assert find_turn_parts(tiny.build_tokenizer(chat_template=thinks)) == TurnParts(
        "<user>", "<assistant>", "</e>"
    )
