"""Calls are read as each family's template writes them, whole and while they are being written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import chat_templates as written
from chat_templates import WITH_TOOLS, renderer_of
from tuneloop.models.chat.calls import Call, CallReader, CallSyntax, find_calls
from tuneloop.models.chat.own_templates import TEMPLATES
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message
from tuneloop.serving.constraint import Constraints
from tuneloop.serving.requests import AnswerForm

TURN = """\
{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"""
END = """\
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
CALLS = "{%- for call in m.tool_calls or [] %}{%- set f = call.function %}"
PARAMETERS = "{%- for key, value in f.arguments.items() %}"
VALUE = "{{- value if value is string else value | tojson }}"
# Arguments one by one, the name before the JSON, and tags around both.
OTHERS = {
    "qwen3-coder": f"""{TURN}{CALLS}{{{{- '\\n<tool_call>\\n<function=' + f.name + '>\\n' }}}}
{PARAMETERS}{{{{- '<parameter=' + key + '>\\n' }}}}{VALUE}{{{{- '\\n</parameter>\\n' }}}}
{{%- endfor %}}{{{{- '</function>\\n</tool_call>' }}}}{{% endfor %}}{END}""",
    "glm": f"""{TURN}{{%- if m.role == 'assistant' %}}<think></think>{{% endif %}}{CALLS}
{{{{- '\\n<tool_call>' + f.name + '\\n' }}}}{PARAMETERS}
{{{{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}}}{VALUE}{{{{- '</arg_value>\\n' }}}}
{{%- endfor %}}{{{{- '</tool_call>' }}}}{{% endfor %}}{END}""",
    "mistral-v11": f"""{TURN}{CALLS}
{{{{- '[TOOL_CALLS]' + f.name + '[ARGS]' + f.arguments | tojson }}}}{{% endfor %}}{END}""",
    "deepseek": f"""{TURN}{CALLS}{{{{- '<calls>' if loop.first else '\\n' }}}}
{{{{- '<call>function<sep>' + f.name + '\\n```json\\n' + f.arguments | tojson + '\\n```</call>' }}}}
{{%- if loop.last %}}</calls>{{% endif %}}{{% endfor %}}{END}""",
}
SPECIAL = ("<|im_end|>", "<|im_start|>", "[TOOL_CALLS]", "[ARGS]")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "where": {"type": "object"},
                },
                "required": ["city"],
            },
        },
    }
    for name in ("forecast", "warn-all")
]
MADE = [
    Call("forecast", {"city": "Oslo \u00e9 12", "days": 3, "where": {"street": ["a", None]}}),
    Call("warn-all", {"city": "12"}),
]

MADE_B = [Call("forecast", {"city": "b"})]


def renderer(family: str, tiny_model: Path) -> Renderer:
    if family in written.FAMILIES:
        return renderer_of(*written.FAMILIES[family], tiny_model)
    template = OTHERS.get(family) or TEMPLATES[family]
    return renderer_of(template, SPECIAL, tiny_model)


def answer_ids(renderer: Renderer, calls: list[Call]) -> list[int]:
    """Return what the model was trained to answer, without the token that ends it."""
    made = [
        {
            "id": "abcdefgh1",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for call in calls
    ]
    question = Message("user", "a")
    sample = renderer.sample(
        [question, Message("assistant", "", tool_calls=json.dumps(made))], TOOLS
    )
    ids = sample.input_ids[len(renderer.prompt_ids([question], TOOLS)) :]
    return ids[:-1] if ids[-1] in renderer.stop_ids else ids


@pytest.mark.parametrize("family", [*WITH_TOOLS, "chatml_tools", *OTHERS])
def test_calls_are_read_as_the_template_writes_them(family: str, tiny_model: Path) -> None:
    made = renderer(family, tiny_model)
    syntax = CallSyntax.of(made)
    calls = MADE[:1] if family == "llama3" else MADE
    ids = answer_ids(made, calls)
    text = made.decode_with(syntax.special_ids(made), ids)
    content, found = CallReader(syntax, TOOLS).finish(text)
    assert (content, found) == ("", calls)
    assert CallReader(syntax, TOOLS, most=1).finish(text).calls == calls[:1]
    # By one character at a time the same is told, and no call before it is whole.
    said = "It depends.\n\n" if syntax.marker else ""
    reader = CallReader(syntax, TOOLS)
    told = [*map(reader.push, said + text), reader.finish("")]
    assert [call for new in told for call in new.calls] == calls
    if "<think>" not in text:
        assert "".join(new.content for new in told) == said.rstrip()
    # A call that is cut off is no call.
    cut = text[: text.index("forecast") + 12]
    assert CallReader(syntax, TOOLS).finish(cut) == (cut, [])


@pytest.mark.parametrize("family", [*WITH_TOOLS, "chatml_tools", *OTHERS])
def test_an_answer_that_has_to_be_a_call_is_bound_to_what_was_trained(
    family: str, tiny_model: Path
) -> None:
    made = renderer(family, tiny_model)
    syntax = CallSyntax.of(made)
    constraints = Constraints(made, len(made.tokenizer))

    def takes(calls: list[Call], is_parallel: bool) -> bool:
        form = AnswerForm("lark", syntax.grammar(TOOLS, is_parallel, made), "tool_choice")
        follower = constraints.compile(form).start()
        text = made.decode_with(syntax.special_ids(made), answer_ids(made, calls))
        # A thought before the call is the model's own.
        ids = made.backend.encode(text.rpartition("</think>")[2].strip())
        for token in ids:
            if not follower.allows(token):
                return False
            follower.push(token)
        return True

    few = [Call("forecast", {"city": "Oslo", "days": 3}), Call("warn-all", {"city": "12"})]
    assert takes(few[:1], False)
    assert not takes([Call("forecast", {"city": "Oslo", "days": "soon"})], False)
    assert not takes([Call("forecast", {"days": 3})], False)
    assert not takes([Call("unknown", {"city": "Oslo"})], False)
    if family != "llama3":
        assert takes(few, True)
        assert not takes(few, False)


@pytest.mark.parametrize("family", ["chatml_tools", *OTHERS])
def test_arguments_whose_schemas_refer_to_definitions(family: str, tiny_model: Path) -> None:
    # As Pydantic writes the schema of nested models, enumerations and what may be left out.
    place = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    parameters = {
        "type": "object",
        "$defs": {"Color": {"type": "string", "enum": ["red", "1"]}, "Place": place},
        "properties": {
            "color": {"$ref": "#/$defs/Color"},
            "where": {"allOf": [{"$ref": "#/$defs/Place"}]},
            "many": {"type": "array", "items": {"$ref": "#/$defs/Place"}},
            "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "days": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        },
        "required": ["color", "where", "many", "code", "days"],
    }
    tools = [{"type": "function", "function": {"name": "forecast", "parameters": parameters}}]
    made = renderer(family, tiny_model)
    syntax = CallSyntax.of(made)
    form = AnswerForm("lark", syntax.grammar(tools, False, made), "tool_choice")
    constraint = Constraints(made, len(made.tokenizer)).compile(form)
    good = {"color": "1", "where": {"n": 1}, "many": [{"n": 2}], "code": "12345", "days": 3}

    def takes(arguments: dict[str, Any]) -> bool:
        ids = answer_ids(made, [Call("forecast", arguments)])
        text = made.decode_with(syntax.special_ids(made), ids)
        found = CallReader(syntax, tools).finish(text).calls
        assert found == [Call("forecast", arguments)]
        follower = constraint.start()
        for token in made.backend.encode(text.rpartition("</think>")[2].strip()):
            if not follower.allows(token):
                return False
            follower.push(token)
        return True

    assert takes(good)
    assert takes(good | {"code": None})
    wrong = [{"color": "blue"}, {"where": {"n": "x"}}, {"many": [{}]}, {"days": "soon"}]
    assert not any(takes(good | one) for one in wrong)


def test_templates_that_write_no_calls_are_known_by_their_tag(tiny_model: Path) -> None:
    told = TURN.replace("tools | tojson", "tools | tojson + ' as <tool_call>{}</tool_call>'")
    syntax = CallSyntax.of(renderer_of(told + END, SPECIAL, tiny_model))
    text = 'First.\n<tool_call>[{"name": "forecast", "arguments": {"city": "a"}}]</tool_call>'
    assert CallReader(syntax, TOOLS).finish(text) == ("First.", [Call("forecast", {"city": "a"})])
    bare = CallSyntax.of(renderer_of(TURN + END, SPECIAL, tiny_model))
    text = '{"name": "forecast", "parameters": {"city": "a"}}'
    assert CallReader(bare, TOOLS).finish(text) == ("", [Call("forecast", {"city": "a"})])
    for other in ('{"name": "Ann", "parameters": {}}', '{"name": "forecast"}', "{", "Yes. " + text):
        assert CallReader(bare, TOOLS).finish(other) == (other, [])
        reader = CallReader(bare, TOOLS)
        told = [*map(reader.push, other), reader.finish("")]
        assert ("".join(new.content for new in told), sum(len(n.calls) for n in told)) == (other, 0)


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_what_a_model_thinks_of_calls_is_no_call(family: str, tiny_model: Path) -> None:
    syntax = CallSyntax.of(renderer(family, tiny_model))
    made = '{"name": "forecast", "arguments": {"city": "b"}}'
    thought = f"<think>{syntax.opening}{made.replace('b', 'a')}</think>"
    # Opened by the answer, or by the prompt.
    for prompt, said in (("", thought), ("x<think>\n", thought.removeprefix("<think>"))):
        text = f"{said}\n\n{syntax.opening}{made}"
        assert CallReader(syntax, TOOLS, prompt=prompt).finish(text) == (said, MADE_B)
        reader = CallReader(syntax, TOOLS, prompt=prompt)
        told = [*map(reader.push, text), reader.finish("")]
        assert "".join(new.content for new in told) == said
        assert [call for new in told for call in new.calls] == MADE_B
        # A thought that does not end.
        text = text.replace("</think>", "")
        assert CallReader(syntax, TOOLS, prompt=prompt).finish(text) == (text, [])


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_tags_around_no_thought_are_no_content_before_a_call(family: str, tiny_model: Path) -> None:
    syntax = CallSyntax.of(renderer(family, tiny_model))
    call = syntax.opening + '{"name": "forecast", "arguments": {"city": "b"}}'
    tags = "<think>\n\n</think>\n\n"
    for text, content, calls in (
        (tags + call, "", MADE_B),
        (f"<think>\nWell.</think>\n{call}", "<think>\nWell.</think>", MADE_B),
        (tags + "Yes <b>it</b>", tags + "Yes <b>it</b>", []),
        (tags, tags, []),
    ):
        assert CallReader(syntax, TOOLS).finish(text) == (content, calls)
        reader = CallReader(syntax, TOOLS)
        told = [*map(reader.push, text), reader.finish("")]
        assert "".join(new.content for new in told) == content
        assert [one for new in told for one in new.calls] == calls


@pytest.mark.parametrize("family", ["qwen3", "llama3", "qwen3-coder"])
def test_an_argument_may_close_a_thought(family: str, tiny_model: Path) -> None:
    made = renderer(family, tiny_model)
    syntax = CallSyntax.of(made)
    calls = [Call("forecast", {"city": "<think>a</think> b"})]
    text = made.decode_with(syntax.special_ids(made), answer_ids(made, calls))
    assert CallReader(syntax, TOOLS).finish(text).calls == calls
    reader = CallReader(syntax, TOOLS)
    told = [*map(reader.push, text), reader.finish("")]
    assert [one for new in told for one in new.calls] == calls


def test_ids_are_of_the_kind_that_the_template_takes_back(tiny_model: Path) -> None:
    strict = written.MISTRAL.replace(
        "{%- for call in m.tool_calls %}",
        "{%- for call in m.tool_calls %}"
        "{%- if call.id | length != 9 %}{{- raise_exception('9 letters') }}{% endif %}",
        1,
    )
    special = written.FAMILIES["mistral"][1]
    assert len(CallSyntax.of(renderer_of(strict, special, tiny_model)).new_id()) == 9
    assert CallSyntax.of(renderer("mistral", tiny_model)).new_id().startswith("call_")


def test_a_control_sign_that_no_call_needs_is_not_text(tiny_model: Path) -> None:
    made = renderer("mistral", tiny_model)
    inst, calls = made.tokenizer.convert_tokens_to_ids(["[INST]", "[TOOL_CALLS]"])
    kept = CallSyntax.of(made).special_ids(made)
    assert kept == {calls}
    ids = [*made.backend.encode("yes"), inst, calls, *made.backend.encode("no")]
    assert made.decode_with(kept, ids) == "yes[TOOL_CALLS]no"


@pytest.mark.parametrize("family", [*WITH_TOOLS, "chatml_tools", *OTHERS])
def test_what_json_cannot_write_is_no_argument(family: str, tiny_model: Path) -> None:
    made = renderer(family, tiny_model)
    syntax = CallSyntax.of(made)
    ids = answer_ids(made, [Call("forecast", {"city": "a", "days": 77})])
    written_text = made.decode_with(syntax.special_ids(made), ids)
    for number in ("1e999", "-1e999", "NaN", "-Infinity"):
        text = written_text.replace("77", number)
        # Where arguments stand one by one, what is no JSON is a text.
        calls = [Call("forecast", {"city": "a", "days": number})] if syntax.parameters else []
        assert number in text
        assert CallReader(syntax, TOOLS).finish(text) == ("" if calls else text, calls)
        reader = CallReader(syntax, TOOLS)
        told = [*map(reader.push, text), reader.finish("")]
        assert [call for new in told for call in new.calls] == calls


def test_calls_in_any_text() -> None:
    assert find_calls('so <x>{"name": "a", "arguments": {}} {"b": 1}') == [Call("a", {})]
    assert find_calls('{"name": "a", "arguments": {"x": 1e999}}') == []
    as_text = {"name": "a", "arguments": '{"x": NaN}'}
    assert find_calls(json.dumps(as_text)) == []
    assert find_calls(json.dumps(as_text | {"arguments": '{"x": 1e9}'})) == [Call("a", {"x": 1e9})]
    assert find_calls(json.dumps(as_text | {"arguments": "[" * 9000})) == []
