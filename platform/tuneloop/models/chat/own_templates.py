"""Chat templates: our own, and the one that `model.chat_template` names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tuneloop.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Explicit templates for models that come without one. They are saved with the model, so that
# any server renders what was trained.
_ALPACA = """\
{% set ns = namespace(system='Below is an instruction that describes a task. \
Write a response that appropriately completes the request.') %}\
{% for message in messages %}\
{% if message.role == 'system' %}{% set ns.system = message.content %}{% endif %}\
{% endfor %}\
{{ ns.system }}

{% for message in messages %}\
{% if message.role == 'user' %}### Instruction:
{{ message.content }}

{% elif message.role == 'assistant' %}### Response:
{{ message.content }}{{ eos_token }}

{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}### Response:
{% endif %}"""

_CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_PLAIN = """\
{% for message in messages %}{{ message.content }}\
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}\
{% endfor %}"""

# As Hermes and Qwen 2.5 write tools, in words of our own.
_CHATML_TOOLS = """\
{% set ns = namespace(system='') %}\
{% for m in messages if m.role == 'system' %}{% set ns.system = m.content %}{% endfor %}\
{% if tools %}{% set ns.system = ns.system + ('\\n\\n' if ns.system else '') + \
'You may call these functions, described in JSON:\\n<tools>\\n' %}\
{% for tool in tools %}{% set ns.system = ns.system + (tool | tojson) + '\\n' %}{% endfor %}\
{% set ns.system = ns.system + '</tools>\\nTo call one, answer with its name and arguments:\\n\
<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>' %}{% endif %}\
{% if ns.system %}<|im_start|>system
{{ ns.system }}<|im_end|>
{% endif %}\
{% for m in messages if m.role != 'system' %}\
<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{% if m.role == 'tool' %}<tool_response>
{{ m.content }}
</tool_response>{% else %}{{ m.content or '' }}{% endif %}\
{% for call in m.tool_calls or [] %}{{ '\\n' if m.content or not loop.first }}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "chatml_tools": _CHATML_TOOLS,
    "plain": _PLAIN,
}


def chosen_template(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> str:
    """Return the Jinja text that `model.chat_template` names."""
    own = tokenizer.chat_template if chat_template == "auto" else None
    if isinstance(own, dict):  # several, by name
        if "default" not in own:
            raise ModelError.of(
                "the model has several chat templates and none of them is its default",
                where="model.chat_template",
                got=", ".join(sorted(own)),
                remedy="write one of them into a file and set model.chat_template to its path",
            )
        own = own["default"]
    if own:
        return str(own)
    if chat_template == "auto":
        chat_template = "alpaca"
    if chat_template in TEMPLATES:
        bos = tokenizer.bos_token_id
        # Servers tokenize rendered chats without adding BOS, so the template has to carry it.
        needs_bos = bos is not None and tokenizer.encode("a")[:1] == [bos]
        text = ("{{ bos_token }}" if needs_bos else "") + TEMPLATES[chat_template]
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        # A vocabulary without ChatML's stop token ends turns with its own, as Zephyr's does.
        return text if "<|im_end|>" in known else text.replace("<|im_end|>", "{{ eos_token }}")
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError.of(
            "no such chat template",
            where="model.chat_template",
            got=chat_template,
            allowed="auto, " + ", ".join(TEMPLATES) + ", or the path of a Jinja file",
        ) from error


def template_from_root(chat_template: str) -> str:
    """Return `model.chat_template`; a file's path from the root, as workers run elsewhere."""
    is_file = chat_template not in TEMPLATES and Path(chat_template).is_file()
    return str(Path(chat_template).absolute()) if is_file else chat_template
