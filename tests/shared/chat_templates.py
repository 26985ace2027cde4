# ruff: noqa: E501
"""Small templates that behave as those of well-known families do, in words of our own."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tuneloop.models.chat.renderer import Renderer

WITH_TOOLS = ["qwen2.5", "qwen3", "llama3", "mistral", "granite"]

_HERMES_TOOLS = """\
{%- macro described(tools) %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>{% endmacro %}"""

_HERMES_CALLS = """\
{%- for call in m.tool_calls or [] %}{%- if not loop.first or m.content %}{{ '\\n' }}{% endif -%}
{%- set function = call.function or call -%}
{{ '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{%- if function.arguments is string %}{{ function.arguments }}{% else -%}
{{ function.arguments | tojson }}{% endif %}{{ '}\\n</tool_call>' }}{% endfor -%}"""

# Writes a default system message, and knows no tools.
SMOLLM2 = """\
{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant<|im_end|>
{% endif %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Tools in the system message, results of tools as turns of the user, neighbours in one turn.
QWEN25 = (
    _HERMES_TOOLS
    + """
{%- set has_system = messages[0].role == 'system' %}
{%- set system = messages[0].content if has_system else 'You are a helpful assistant.' %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}{{ '\\n\\n' + described(tools) }}{% endif %}{{ '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' or m.role == 'system' and not loop.first
    or m.role == 'assistant' and not m.tool_calls %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + (m.content or '') }}"""
    + _HERMES_CALLS
    + """{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
)

# A think block in answers after the last question only; thoughts of earlier ones are dropped.
QWEN3 = (
    _HERMES_TOOLS
    + """
{%- if tools or messages[0].role == 'system' %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + ('\\n\\n' if tools else '') }}{% endif %}
{%- if tools %}{{- described(tools) }}{% endif %}{{- '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = '' %}
{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{% endif %}"""
    + _HERMES_CALLS
    + """{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
)

# Writes today's date, tools in the first question, a call as bare JSON, one call in a turn.
LLAMA3 = """\
{{- bos_token }}
{%- if strftime_now is defined %}{%- set today = strftime_now("%d %b %Y") %}
{%- else %}{%- set today = "26 Jul 2024" %}{% endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + today + '\\n\\n' + system + '<|eot_id|>' }}
{%- if tools %}{{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
{{- messages[0].content | trim + '<|eot_id|>' }}{%- set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{%- if m.content is mapping %}{{- m.content | tojson }}{% else %}{{- m.content }}{% endif %}{{- '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# No generation prompt, strict alternation, tools before the last question only.
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(last=-1, system='') %}
{%- if messages[0].role == 'system' %}{%- set ns.system = messages[0].content %}{%- set messages = messages[1:] %}{% endif %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- set turn = namespace(index=0) %}
{%- for m in messages %}
{%- if m.role == 'user' or m.role == 'assistant' and not m.tool_calls %}
{%- if (m.role == 'user') != (turn.index % 2 == 0) %}
{{- raise_exception('roles must alternate user and assistant') }}{% endif %}
{%- set turn.index = turn.index + 1 %}{% endif %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + (ns.system + '\\n\\n' if ns.system and loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id[-9:]} | tojson }}
{%- if not loop.last %}{{- ', ' }}{% endif %}{% endfor %}{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}"""

# No system message; the assistant is called model.
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

# Tools as a turn of their own, today's date, calls as one list, results as turns.
GRANITE = """\
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "Today's Date: " + strftime_now('%B %d, %Y') + '.' %}{% endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<|start_of_role|>' + ('tool_response' if m.role == 'tool' else m.role) + '<|end_of_role|>' }}
{%- if m.tool_calls %}{{- '<|tool_call|>[' }}
{%- for call in m.tool_calls %}
{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
{%- if not loop.last %}{{- ', ' }}{% endif %}{% endfor %}{{- ']' }}
{%- else %}{{- m.content }}{% endif %}{{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

# Opens the thinking itself, drops it from all answers, and wants null beside calls.
R1 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
{{- '<|Assistant|>' + content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{% endif %}"""

# The template that a tokenizer of the SentencePiece kind comes with: spaces around the answer.
LLAMA2 = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
ZEPHYR = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}"""

# Special tokens of each family, the one that ends an answer first.
# As Phi-3-mini had it first: turns of other roles vanish.
PHI3 = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>
{{ m.content }}<|end|>
<|assistant|>
{% elif m.role == 'assistant' %}{{ m.content }}<|end|>
{% endif %}{% endfor %}"""

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "smollm2": (SMOLLM2, ("<|im_end|>", "<|im_start|>")),
    "qwen2.5": (QWEN25, ("<|im_end|>", "<|im_start|>")),
    "qwen3": (QWEN3, ("<|im_end|>", "<|im_start|>")),
    "llama3": (LLAMA3, ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")),
    "mistral": (
        MISTRAL,
        (
            *("</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
    ),
    "gemma": (GEMMA, ("<end_of_turn>", "<start_of_turn>")),
    "granite": (
        GRANITE,
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    ),
}


def renderer_of(template: str, special: tuple[str, ...], tiny_model: Path) -> Renderer:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.eos_token = special[0]
    tokenizer.bos_token = "<|endoftext|>"
    return Renderer(tokenizer, template)
