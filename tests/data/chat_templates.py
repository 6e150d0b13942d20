"""Chat templates in the styles of open models, and a tokenizer with their control tokens."""

import functools
import pathlib
from typing import Any

import tokenizers

from tests.hf.tokenizer_folders import byte_level, write

QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
LLAMA2_TOKENS = ("<s>", "</s>")

# In each, GEN and END stand around what the assistant writes, where tags of {% generation %} may go.
QWEN = """
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- GEN -%}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- END %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- GEN -%}
        {{- message['content'] | trim + '<|eot_id|>' }}
        {%- END %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """
{{- bos_token }}
{%- set ns = namespace(head='', turns=messages) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set ns.head = messages[0]['content'] + '\\n\\n' -%}
    {%- set ns.turns = messages[1:] -%}
{%- endif -%}
{%- for message in ns.turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Turns must alternate user/assistant') }}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}
    {%- if message['role'] == 'assistant' -%}
        {%- GEN -%}
        {{- message['content'] | trim + '<end_of_turn>' }}
        {%- END -%}
        {{- '\\n' }}
    {%- else -%}
        {{- (ns.head if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' }}
{%- endif -%}
"""
LLAMA2 = """
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {%- GEN -%}
        {{- ' ' + message.content + ' ' + eos_token }}
        {%- END %}
    {%- endif %}
{%- endfor %}
"""
# The assistant's header at the end of every chat.
ALWAYS = LLAMA3.replace("if add_generation_prompt", "if true")
# Only the last turn of the assistant keeps its thoughts.
THINKING = """
{%- for message in messages %}
    {%- set thought = message.thought if loop.last and message.thought else '' %}
    {{- '<|im_start|>' + message.role + '\\n' + thought + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# No control tokens at all.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# A chat in words, for a vocabulary without control tokens but its end token.
PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

NAMED = {
    "qwen": {"eos_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
}
TEMPLATES = {"qwen": QWEN, "llama3": LLAMA3, "gemma": GEMMA, "llama2": LLAMA2}


def unmarked(template: str) -> str:
    return template.replace("{%- GEN -%}", "").replace("{%- END %}", "").replace("{%- END -%}", "")


def marked(template: str) -> str:
    """Return a template with tags of generation that enclose the end token."""
    ended = template.replace("{%- END %}", "{%- endgeneration %}").replace(
        "{%- END -%}", "{%- endgeneration -%}"
    )
    return ended.replace("{%- GEN -%}", "{%- generation -%}")


@functools.cache
def _tokenizer() -> str:
    tokens = (*QWEN_TOKENS, *LLAMA3_TOKENS, *GEMMA_TOKENS, *LLAMA2_TOKENS)
    return byte_level("", tokens).to_str()


def write_folder(folder: pathlib.Path, style: str, template: Any, **settings: Any) -> str:
    """Write a tokenizer with a chat template; return the path of its tokenizer.json, for data.vocabulary."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED[style], **settings}
    if template is not None:
        settings["chat_template"] = template
    write(folder, tokenizer=tokenizers.Tokenizer.from_str(_tokenizer()), tokenizer_config=settings)
    return str(folder / "tokenizer.json")
