"""Protocol and replica without Ray: what is asked, what is answered, what is refused."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

from tuneloop.models.chat.renderer import Renderer
from tuneloop.serving.answers import TextOffsets, event
from tuneloop.serving.app import _base_url, _gpu_share
from tuneloop.serving.loaded import ServedModel
from tuneloop.serving.parsing import parse_chat, parse_completion, unknown_model
from tuneloop.serving.protocol import ChatRequest, CompletionRequest, ProtocolError
from tuneloop.serving.replica import ModelServer
from tuneloop.serving.responses import ResponsesRequest, parse_responses, response_events
from tuneloop.serving.text import Detokenizer, StreamedText

CHATS, TEXTS, RESPONSES = "chat", "completions", "responses"
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "What is it?"}]}


def answer(server: ModelServer, route: Any, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return asyncio.run(server.answer(route, body))


def streamed(server: ModelServer, route: Any, body: dict[str, Any]) -> list[Any]:
    async def collect() -> list[Any]:
        return [item async for item in server.stream(route, body)]

    return asyncio.run(collect())


def test_left_out_fields_take_openais_defaults() -> None:
    params = parse_chat(CHAT).params(10, logprobs=False)
    assert (params.temperature, params.top_p, params.stop) == (1.0, 1.0, ())
    assert parse_chat(CHAT).params(10, False).seed != params.seed
    asked = parse_chat({**CHAT, "temperature": 0, "top_p": 0.5, "seed": -3, "stop": "x"})
    params = asked.params(10, logprobs=False)
    assert (params.temperature, params.top_p, params.stop) == (0.0, 0.5, ("x",))
    assert params.seed == asked.params(10, False).seed >= 0


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1, "tools": [], "presence_penalty": 0.0, "response_format": {"type": "text"}},
        {"stop": None, "logit_bias": None, "user": "me", "stream": False, "logprobs": False},
        {"tool_choice": "auto", "parallel_tool_calls": True, "ignore_eos": False, "anything": None},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(more: dict[str, Any]) -> None:
    assert parse_chat({**CHAT, **more}).model == "m"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 200}, "n"),
        ({"tools": {"type": "function"}}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_k": -5}, "top_k"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "refusal": 1}]}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "return_token_ids": True}, "stream"),
    ],
)
def test_what_is_not_done_is_refused(more: dict[str, Any], param: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_chat({**CHAT, **more})
    assert caught.value.status == 400
    assert caught.value.body()["error"]["param"] == param


def test_what_is_wrong_is_told_by_its_place_in_the_request() -> None:
    image = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    for more, told in (
        ({"messages": [{"role": "user", "content": image}]}, "`messages.0.content.1.type`"),
        ({"messages": [{"role": "user", "content": 3}]}, "`messages.0.content`: "),
        ({"stop": [None]}, "`stop.0`: "),
    ):
        with pytest.raises(ProtocolError, match=re.escape(told)):
            parse_chat({**CHAT, **more})
    with pytest.raises(ProtocolError, match=r"`prompt\.1`: Input should be a valid integer"):
        parse_completion({"model": "m", "prompt": [1, "a"]})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_all_four_kinds_of_prompt(prompt: Any, expected: Any) -> None:
    assert parse_completion({"model": "m", "prompt": prompt}).prompts() == expected


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": []},
        {"prompt": [1, "a"]},
        {"max_tokens": 0},
        {"n": 3, "best_of": 2},
        {"best_of": 2, "stream": True},
        {"prompt": ["a"] * 100, "best_of": 100},
        {"reasoning_effort": "high"},
    ],
)
def test_completion_refusals(more: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse_completion({"model": "m", "prompt": "a", **more})


OFFICIAL: list[tuple[Any, str, dict[str, Any]]] = [
    (chat_params.CompletionCreateParamsBase, CHATS, CHAT),
    (completion_params.CompletionCreateParamsBase, TEXTS, {"model": "m", "prompt": "a"}),
    (response_params.ResponseCreateParamsBase, RESPONSES, {"model": "m", "input": "a"}),
]
PARSE = {CHATS: parse_chat, TEXTS: parse_completion, RESPONSES: parse_responses}
KINDS = {CHATS: ChatRequest, TEXTS: CompletionRequest, RESPONSES: ResponsesRequest}


@pytest.mark.parametrize(("official", "kind", "body"), OFFICIAL)
def test_each_parameter_of_openais_client_is_known(
    official: Any, kind: str, body: dict[str, Any]
) -> None:
    """It is done, of no effect on the answer, or refused by its name as not supported."""
    codes = {}
    for name in official.__annotations__.keys() - KINDS[kind].model_fields.keys():
        PARSE[kind](body | {name: None})
        try:
            PARSE[kind](body | {name: "something"})
        except ProtocolError as error:
            codes[error.param] = error.code
    assert set(codes.values()) == {"unsupported_parameter"}, codes
    assert codes.keys() >= {CHATS: {"audio"}, TEXTS: {"suffix"}, RESPONSES: {"prompt"}}[kind]


def test_an_address_of_the_newer_protocol_stands_in_brackets() -> None:
    hosts = ("127.0.0.1", "0.0.0.0", "", "::", "::1", "machine.example")
    reached = ("127.0.0.1", "127.0.0.1", "127.0.0.1", "[::1]", "[::1]", "machine.example")
    assert [_base_url(host, 80) for host in hosts] == [f"http://{one}:80/v1" for one in reached]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = parse_chat({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert asked.conversation()[0].content == "ab"


def test_pieces_join_to_the_whole_text(renderer: Renderer) -> None:
    text = "naïve café — 東京 🎉 done"
    ids = renderer.text_ids(text)
    assert len(ids) > len(text)  # characters that span tokens
    detokenizer = Detokenizer(renderer.decode)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_offsets_are_places_in_the_text_also_behind_broken_characters(renderer: Renderer) -> None:
    (word,), (lead, rest) = renderer.text_ids(" list"), renderer.text_ids("é")
    for ids, text, expected in (
        ([lead, word, lead, rest, word], "\ufffd listé list", [0, 1, 6, 6, 7]),
        ([lead, lead, word], "\ufffd\ufffd list", [0, 1, 2]),
        ([lead, rest, lead, rest, lead], "éé\ufffd", [0, 0, 1, 1, 2]),
    ):
        offsets = TextOffsets(renderer, renderer.decode, 10)
        assert renderer.decode(ids) == text
        assert [offsets.next(token) - 10 for token in ids] == expected


def test_streamed_text_holds_back_what_may_become_a_stop_string(renderer: Renderer) -> None:
    text = StreamedText(renderer.decode, ["##END"])
    sent = [text.push(token) for token in renderer.text_ids("a ##EN b ##END c")]
    assert "".join(sent) == "a ##EN b "
    assert text.finish("a ##EN b ") == ""


def test_chat_answer(server: ModelServer, renderer: Renderer) -> None:
    status, got = answer(
        server,
        "chat",
        {**CHAT, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 2,
         "return_token_ids": True},
    )  # fmt: skip
    assert status == 200
    [choice] = got["choices"]
    assert choice["message"]["content"] == renderer.decode(choice["token_ids"])
    assert got["prompt_token_ids"] == renderer.prompt_ids(parse_chat(CHAT).conversation())
    assert [len(item["top_logprobs"]) for item in choice["logprobs"]["content"]] == [2] * 5
    assert got["usage"]["total_tokens"] == len(got["prompt_token_ids"]) + 5


def test_without_a_bound_the_models_positions_are_it(server: ModelServer) -> None:
    status, got = answer(server, "chat", {**CHAT, "temperature": 0})
    assert status == 200
    assert got["choices"][0]["finish_reason"] == "stop" or got["usage"]["total_tokens"] == 512


def test_stream_equals_whole(server: ModelServer) -> None:
    body = {**CHAT, "max_tokens": 20, "temperature": 1, "seed": 4, "stop": ["e"]}
    _, whole = answer(server, "chat", body)
    items = streamed(server, "chat", {**body, "stream": True})
    assert items[0] == (200, {})
    assert items[-1] == "data: [DONE]\n\n"
    chunks = [json.loads(item.removeprefix("data: ")) for item in items[1:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_refusals_are_answers(server: ModelServer) -> None:
    status, got = answer(server, "completions", {"model": "m", "prompt": "a", "max_tokens": 9999})
    assert (status, got["error"]["code"]) == (400, "context_length_exceeded")
    [(status, got)] = streamed(server, "chat", {**CHAT, "stream": True, "max_tokens": 9999})
    assert (status, got["error"]["param"]) == (400, "messages")
    # One prompt of several that cannot be answered refuses all.
    status, _ = answer(server, "completions", {"model": "m", "prompt": [[1], [99999]]})
    assert status == 400


def test_a_separator_of_lines_in_a_streamed_response_is_text() -> None:
    text = "a\u2028b\x85c"

    async def chunks() -> Any:
        for delta, reason in (({"content": text}, None), ({}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            yield event({"choices": [choice]})
        yield event(None)

    async def run() -> list[str]:
        request = parse_responses({"model": "m", "input": "a", "stream": True})
        return [item async for item in response_events(request, chunks())]

    last = json.loads(asyncio.run(run())[-1].split("\n")[1].removeprefix("data: "))
    assert last["type"] == "response.completed"
    assert last["response"]["output"][0]["content"][0]["text"] == text


def test_what_is_no_number_is_null_in_a_stream() -> None:
    told = event({"logprob": float("-inf"), "text": "é"})
    assert json.loads(told.removeprefix("data: ")) == {"logprob": None, "text": "é"}


def test_a_model_that_does_not_load_answers_500(tmp_path: Path) -> None:
    status, got = answer(ModelServer({"m": ServedModel(tmp_path)}, 4), "chat", CHAT)
    assert (status, got["error"]["code"]) == (500, "model_not_loaded")
    assert str(tmp_path) in got["error"]["message"]


def test_a_directory_that_renders_otherwise_than_in_training_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    recorded = {"renderer_hash": Renderer.load(model).hash}
    (model / "tuneloop_render.json").write_text(json.dumps(recorded))
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("Be brief. " + template)
    status, got = answer(ModelServer({"m": ServedModel(model)}, 4), "chat", CHAT)
    assert (status, got["error"]["code"]) == (500, "model_not_loaded")
    assert "renders otherwise" in got["error"]["message"]


def test_unknown_model_lists_what_is_served() -> None:
    error = unknown_model("x", ["a", "b"])
    assert (error.status, error.code) == (404, "model_not_found")
    assert "a, b" in error.message


@pytest.mark.parametrize(
    ("num_gpus", "num_models"), [(1, 1), (1, 3), (2, 3), (8, 2), (0.5, 2), (3, 7)]
)
def test_every_replica_finds_a_gpu_with_room_for_its_share(
    num_gpus: float, num_models: int
) -> None:
    share = _gpu_share(num_gpus, num_models)
    on_each = [int(min(1.0, num_gpus) / share)] * max(1, int(num_gpus))
    assert 0 < share <= 1
    assert sum(on_each) >= num_models


def test_a_conversation_with_calls_and_their_results_is_read_whole() -> None:
    function = {"name": "temperature", "arguments": '{"city": "Oslo"}'}
    asked = [
        {"role": "user", "content": "How warm is it?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "-3", "tool_call_id": "1"},
    ]
    request = parse_chat({"model": "m", "messages": asked, "tools": [{"function": function}]})
    user, call, result = request.conversation()
    assert (user.role, user.content, user.tool_calls) == ("user", "How warm is it?", "")
    assert call.calls[0]["function"] == function
    assert (result.role, result.content, result.tool_call_id) == ("tool", "-3", "1")
    assert request.tools == [{"function": function}]
    # Templates without ids know whose a result is by its place.
    at_once = [{"id": call_id, "type": "function", "function": function} for call_id in "xy"]
    results = [{"role": "tool", "content": i, "tool_call_id": i} for i in "yx"]
    turns = [asked[0], {"role": "assistant", "content": None, "tool_calls": at_once}, *results]
    request = parse_chat({"model": "m", "messages": turns})
    assert [message.content for message in request.conversation()[2:]] == ["x", "y"]


def test_a_question_with_tools_is_asked_by_the_ids_it_is_trained_with(tiny_model: Path) -> None:
    from tuneloop.models.client.client import chat_request
    from tuneloop.records import Message, SamplingParams

    renderer = Renderer.load(tiny_model, "chatml_tools")
    function = {"name": "temperature", "arguments": '{"city": "Oslo"}'}
    calls = json.dumps([{"id": "1", "type": "function", "function": function}])
    tools = [{"type": "function", "function": {"name": "temperature", "parameters": {}}}]
    turns = [
        Message("system", "Be brief."),
        Message("user", "How warm is it?"),
        Message("assistant", "", tool_calls=calls, weight=0),
        Message("tool", "-3", tool_call_id="1"),
        Message("assistant", "Cold."),
    ]
    body = chat_request("m", turns[:-1], SamplingParams()) | {"tools": tools}
    request = parse_chat(json.loads(json.dumps(body)))
    prompt = renderer.prompt_ids(request.conversation(), request.tools or ())
    sample = renderer.sample(turns, tools)
    assert sample.input_ids[: len(prompt)] == prompt
    assert sum(sample.loss_mask[: len(prompt)]) == 0
