"""A Modelfile says what the chat template says, or is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tuneloop.errors import ModelError
from tuneloop.models.chat.own_templates import TEMPLATES
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.export.ollama import modelfile

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + TEMPLATES["chatml"]
)
BEGINS_ONCE = (
    "{{ '<|endoftext|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
SYSTEM_IN_QUESTION = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + TEMPLATES["chatml"]
)


@pytest.fixture
def render(tiny_model: Path):  # type: ignore[no-untyped-def]
    return lambda template: Renderer(AutoTokenizer.from_pretrained(tiny_model), template)


def parsed(text: str) -> dict[str, str]:
    """Return the commands of a Modelfile, the last of each, as Ollama's parser reads them."""
    commands: dict[str, str] = {}
    name, value = "", ""
    for sign in text:
        told = value.strip()
        quotes = next((q for q in ('"""', '"') if told.startswith(q)), "")
        is_whole = not quotes or (told.endswith(quotes) and len(told) >= 2 * len(quotes))
        if not name and sign not in " \n":
            value += sign
        elif not name:
            name, value = value, ""
        elif sign in "\r\n" and is_whole:
            commands[name] = told.removeprefix(quotes).removesuffix(quotes)
            name, value = "", ""
        elif sign.isprintable() or sign in "\t\r\n":
            value += sign
    return commands


def said(template: str) -> str:
    """Return a Go template with its constants written out."""
    return re.sub(
        r'\{\{ "([^"]*)" \}\}',
        lambda found: found[1].encode().decode("unicode_escape"),
        template,
    )


def template_of(text: str) -> str:
    return text.split('TEMPLATE """')[1].split('"""')[0]


def test_each_turn_stands_between_its_markers(render) -> None:  # type: ignore[no-untyped-def]
    text = modelfile(render(TEMPLATES["chatml"]), "faq-Q8_0.gguf", 'Say "yes".', 512)
    turns = "".join(
        f'{{{{ {word} eq .Role "{role}" }}}}<|im_start|>{role}\n{{{{ .Content }}}}<|im_end|>\n'
        for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
    )
    assert template_of(text) == (
        f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}<|im_start|>assistant\n"
    )
    assert text.startswith("FROM ./faq-Q8_0.gguf\n")
    assert text.endswith(
        'SYSTEM """Say "yes"."""\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n'
        "PARAMETER repeat_penalty 1\nPARAMETER num_ctx 512\n"
    )


def test_a_default_system_prompt_is_written_only_without_another(render) -> None:  # type: ignore[no-untyped-def]
    template = template_of(modelfile(render(DEFAULT_SYSTEM), "x.gguf", "", 512))
    assert template.startswith(
        "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range .Messages }}"
    )


def test_what_begins_a_talk_is_written_once(render) -> None:  # type: ignore[no-untyped-def]
    renderer = render(BEGINS_ONCE)
    renderer.tokenizer.bos_token = "<|endoftext|>"
    template = template_of(modelfile(renderer, "x.gguf", "", 512))
    assert template.startswith("<|endoftext|>{{ range .Messages }}")
    assert template.count("<|endoftext|>") == 1


@pytest.mark.parametrize(
    "instruction", ['Say """so""" or\n"so".', 'He said "', " a\tb \r\n", "{{ x }}"]
)
def test_an_instruction_is_read_back(render, instruction: str) -> None:  # type: ignore[no-untyped-def]
    commands = parsed(modelfile(render(TEMPLATES["chatml"]), "x.gguf", instruction, 512))
    assert commands["SYSTEM"] == instruction
    assert commands["TEMPLATE"].endswith("<|im_start|>assistant\n")
    assert commands["FROM"] == "./x.gguf"


@pytest.mark.parametrize(
    "instruction", ['Write\n"""\ncode\n"""\n', "two\u3000words", "a\xa0b {{ {", '""""""" \nnot']
)
def test_an_instruction_that_a_block_would_change_is_in_the_template(  # type: ignore[no-untyped-def]
    render, instruction: str
) -> None:
    commands = parsed(modelfile(render(DEFAULT_SYSTEM), "x.gguf", instruction, 512))
    assert "SYSTEM" not in commands
    default, _, others = said(commands["TEMPLATE"]).partition("{{ end }}{{ range .Messages }}")
    turn = f"<|im_start|>system\n{instruction}<|im_end|>\n"
    assert default == "{{ if not .System }}" + turn
    assert others.endswith("<|im_start|>assistant\n")


def test_a_template_that_does_more_is_refused(render) -> None:  # type: ignore[no-untyped-def]
    for template in (SYSTEM_IN_QUESTION, NO_SYSTEM):
        with pytest.raises(ModelError, match="Ollama's templates cannot express"):
            modelfile(render(template), "x.gguf", "", 512)
