"""Tools over the whole protocol, asked with OpenAI's own client: a tiny model bound to calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch
from starlette.testclient import TestClient
from transformers import LlamaForCausalLM

from tuneloop.config import OneTaskConfig
from tuneloop.evals.scoring.function_calls import function_call
from tuneloop.models.chat.calls import Call
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message, call_text
from tuneloop.serving.answers import tool_call
from tuneloop.serving.api import build_api
from tuneloop.serving.loaded import ServedModel
from tuneloop.serving.replica import ModelServer

PARAMETERS = {
    "type": "object",
    "properties": {"c": {"enum": ["a", "b"]}},
    "required": ["c"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name in ("f", "g")
]
ASKED: dict[str, Any] = {
    "model": "t",
    "messages": [{"role": "user", "content": "a"}],
    "tools": TOOLS,
    "temperature": 0,
    "max_tokens": 120,
}
NAMED = {"type": "function", "function": {"name": "g"}}


@pytest.fixture(scope="module")
def client(server: ModelServer) -> Iterator[openai.OpenAI]:
    api = build_api({"m": server, "t": server})
    with (
        TestClient(api, base_url="http://test/v1") as http,
        openai.OpenAI(base_url="http://test/v1", api_key="none", http_client=http) as client,
    ):
        yield client


def test_a_demanded_call_is_made_and_fits_the_schema(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**ASKED, tool_choice=NAMED)
    choice = first.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or ()
    assert (call.type, call.function.name, call.id[:5]) == ("function", "g", "call_")
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    # What was called goes back with its result, and is rendered.
    messages = [
        *ASKED["messages"],
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    again = client.chat.completions.create(**{**ASKED, "messages": messages, "max_tokens": 4})
    assert again.usage is not None
    assert first.usage is not None
    assert again.usage.prompt_tokens > first.usage.total_tokens


def test_calls_are_streamed_whole_and_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    asked = {**ASKED, "tool_choice": "required", "seed": 3, "temperature": 1, "n": 2}
    asked["parallel_tool_calls"] = False
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        events = list(stream)
        streamed = stream.get_final_completion()
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert other.finish_reason == one.finish_reason
        assert (other.message.content or None) == one.message.content
        made = [call.function for call in one.message.tool_calls or ()]
        sent = [call.function for call in other.message.tool_calls or ()]
        assert [(f.name, f.arguments) for f in sent] == [(f.name, f.arguments) for f in made]
        for function in made:
            assert function.name in ("f", "g")
            jsonschema.validate(json.loads(function.arguments), PARAMETERS)
    assert any(choice.message.tool_calls for choice in whole.choices)
    assert "tool_calls.function.arguments.done" in {event.type for event in events}


def test_one_call_at_most_where_calls_are_not_parallel(client: openai.OpenAI) -> None:
    asked = {**ASKED, "tool_choice": "required", "temperature": 2, "seed": 1, "n": 4}
    counts = [
        [len(choice.message.tool_calls or ()) for choice in answer.choices]
        for answer in (
            client.chat.completions.create(**asked),
            client.chat.completions.create(**asked, parallel_tool_calls=False),
        )
    ]
    assert max(counts[0]) > 1
    assert set(counts[1]) == {1}


def test_a_call_that_is_cut_off_is_text(client: openai.OpenAI) -> None:
    asked = {**ASKED, "tool_choice": "required", "max_tokens": 15}
    choice = client.chat.completions.create(**asked).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert str(choice.message.content).startswith("<tool_call>")
    pieces = client.chat.completions.create(**asked, stream=True)
    deltas = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(deltas) == choice.message.content


def test_half_a_character_in_a_call_stays_an_escape() -> None:
    call = tool_call(Call("f", {"c": "\ud83d", "d": "é"}), "call_1")
    for text in (call["function"]["arguments"], call_text(call)):
        assert r'"\ud83d", "d": "é"' in text
        assert text.encode()
    assert json.loads(call["function"]["arguments"]) == {"c": "\ud83d", "d": "é"}


def test_a_model_is_not_told_of_tools_it_may_not_call(client: openai.OpenAI) -> None:
    plain = {key: value for key, value in ASKED.items() if key != "tools"} | {"max_tokens": 8}
    short = {**ASKED, "max_tokens": 8}
    none = client.chat.completions.create(**short, tool_choice="none")
    assert none.usage == client.chat.completions.create(**plain).usage
    for choice in ("auto", openai.omit):
        auto = client.chat.completions.create(**short, tool_choice=choice)
        assert auto.usage is not None
        assert none.usage is not None
        assert auto.usage.prompt_tokens > none.usage.prompt_tokens
        assert auto.choices[0].message.tool_calls is None
        assert auto.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("change", "param", "told"),
    [
        ({"model": "m"}, "tools", "no place for `tools`"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "given: none"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            "'other', which is none of `tools` (given: f, g)",
        ),
        ({"tool_choice": "always"}, "tool_choice", "`tool_choice`"),
        ({"tools": [{"type": "function"}]}, "tools", "`tools.0.function.name` is missing"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "excludes `response_format`",
        ),
        (
            {
                "tools": [{"function": {"name": "f", "parameters": {"type": "no"}}}],
                "tool_choice": "required",
            },
            "tool_choice",
            "cannot have this form",
        ),
    ],
)
def test_a_call_that_cannot_be_made_is_refused(
    client: openai.OpenAI, change: dict[str, Any], param: str, told: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**ASKED, **change})
    assert caught.value.body["param"] == param  # type: ignore[index]
    assert told in caught.value.body["message"]  # type: ignore[index]


def test_the_responses_protocol_is_the_same_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "t", "input": "a", "temperature": 0, "max_output_tokens": 8}
    chat = client.chat.completions.create(
        model="t", messages=[{"role": "user", "content": "a"}], temperature=0, max_tokens=8
    )
    whole = client.responses.create(**asked)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    assert whole.usage is not None
    assert whole.usage.total_tokens == chat.usage.total_tokens  # type: ignore[union-attr]
    with client.responses.stream(**asked) as stream:
        events: list[Any] = list(stream)
    assert events[-1].response.output_text == whole.output_text
    assert "".join(e.delta for e in events if "text.delta" in e.type) == whole.output_text
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.incomplete")
    # What was answered goes back as it came, with an instruction before it.
    more = [{"role": "user", "content": "a"}, *whole.output, {"role": "user", "content": "b"}]
    again = client.responses.create(**{**asked, "input": more}, instructions="c")
    turns = [("system", "c"), ("user", "a"), ("assistant", whole.output_text), ("user", "b")]
    messages: Any = [{"role": role, "content": content} for role, content in turns]
    chat = client.chat.completions.create(model="t", messages=messages, temperature=0, max_tokens=8)
    assert again.output_text == chat.choices[0].message.content


def test_calls_and_forms_in_the_responses_protocol(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **TOOLS[0]["function"]}]
    asked: dict[str, Any] = {"model": "t", "input": "a", "temperature": 0, "tools": tools}
    asked |= {"tool_choice": {"type": "function", "name": "f"}, "max_output_tokens": 120}
    whole = client.responses.create(**asked)
    (call,) = whole.output
    assert (whole.status, call.type, call.name) == ("completed", "function_call", "f")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    with client.responses.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        (streamed,) = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    assert "response.function_call_arguments.done" in kinds
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    back = [{"role": "user", "content": "a"}, call, result]
    short = {**asked, "max_output_tokens": 4, "tool_choice": "auto"}
    again = client.responses.create(**{**short, "input": back})
    assert again.usage is not None
    assert whole.usage is not None
    assert again.usage.input_tokens > whole.usage.total_tokens
    # As kept in a file, with every field that is null; and a result in parts.
    parts = [{"type": "input_text", "text": "do"}, {"type": "input_text", "text": "ne"}]
    kept = [back[0], call.model_dump(), {**result, "output": parts, "status": None}]
    assert client.responses.create(**{**short, "input": kept}).usage == again.usage
    form = {"type": "json_schema", "name": "it", "schema": {"enum": ["yes", "no"]}}
    bound = client.responses.create(model="t", input="a", text={"format": form})
    assert json.loads(bound.output_text) in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="t", input="a", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.responses.create(model="x", input="a")


def test_what_was_trained_on_calls_answers_in_calls(tiny_model: Path, tmp_path: Path) -> None:
    """And evaluation's scorer finds them in what its client makes of the answer."""
    renderer = Renderer.load(tiny_model, "chatml_tools")
    question = Message("user", "a")
    made = {"id": "1", "type": "function", "function": {"name": "g", "arguments": '{"c": "b"}'}}
    answer = Message("assistant", "", tool_calls=json.dumps([made]))
    sample = renderer.sample([question, answer], TOOLS)
    ids = torch.tensor([sample.input_ids])
    labels = ids.masked_fill(torch.tensor([sample.loss_mask]) == 0, -100)
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    renderer.save(tmp_path)
    trained = ModelServer({"trained": ServedModel(tmp_path)}, max_batch_size=1)
    with TestClient(build_api({"trained": trained}), base_url="http://test/v1") as http:
        client = openai.OpenAI(base_url="http://test/v1", api_key="none", http_client=http)
        choice = client.chat.completions.create(**{**ASKED, "model": "trained"}).choices[0]
    trained._loading.result()["trained"].engine.close()
    (call,) = choice.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("g", '{"c": "b"}')
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    text = call_text(call.model_dump())
    assert function_call(answer.text, text, OneTaskConfig(type="generation")) == 1
