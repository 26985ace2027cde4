"""The HTTP side with a real engine, in this process: what one client does to the others."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from fuzzing import fuzzed
from tuneloop.models.chat.renderer import Renderer
from tuneloop.serving.answers import event
from tuneloop.serving.api import build_api
from tuneloop.serving.keys import ApiKey, Keyring, hash_of
from tuneloop.serving.loaded import ServedModel
from tuneloop.serving.protocol import MAX_BODY_BYTES
from tuneloop.serving.replica import ModelServer
from tuneloop.serving.requests import QueueFull

CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "What is it?"}],
    "max_tokens": 4,
    "temperature": 0,
}


TEXT: dict[str, Any] = {"model": "m", "prompt": "Return the", "max_tokens": 4, "temperature": 0}


CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def api(server: ModelServer) -> FastAPI:
    return build_api({"m": server})


def with_client(api: FastAPI, use: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await use(client)

    return asyncio.run(run())


def ask(api: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    return with_client(api, lambda client: client.request(method, path, **options))


def post(api: FastAPI, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = ask(api, "POST", path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks_of(api: FastAPI, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = ask(api, "POST", path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(item) for item in events[:-1]]


def test_addresses_and_their_keys(server: ModelServer) -> None:
    api = build_api({"m": server}, Keyring({}).with_secret("ann", "sécret"))
    for path in ("/health", "/openapi.json", "/docs"):
        assert ask(api, "GET", path).status_code == 200
    for path in ("/v1/models", "/v1/models/m", "/metrics"):
        response = ask(api, "GET", path)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        key = {"authorization": "Bearer sécret".encode()}
        assert ask(api, "GET", path, headers=key).status_code == 200


def test_a_key_asks_its_own_models_as_often_as_it_may(
    server: ModelServer, caplog: pytest.LogCaptureFixture
) -> None:
    key = ApiKey(sha256=hash_of(b"k"), models=["m"], requests_per_minute=2)
    api = build_api({"m": server, "other": server}, Keyring({"demo": key}))
    headers = {"authorization": "Bearer k", "x-request-id": "abc"}

    async def use(client: httpx.AsyncClient) -> None:
        listed = await client.get("/v1/models", headers=headers)
        assert [one["id"] for one in listed.json()["data"]] == ["m"]
        other = await client.post(CHATS, json=CHAT | {"model": "other"}, headers=headers)
        assert (other.status_code, other.json()["error"]["code"]) == (403, "model_not_found")
        missing = await client.post(CHATS, json=CHAT | {"model": "x"}, headers=headers)
        assert missing.json()["error"]["message"].endswith("served: m")
        for _ in range(2):
            assert (await client.post(CHATS, json=CHAT, headers=headers)).status_code == 200
        late = await client.post(CHATS, json=CHAT, headers=headers)
        assert (late.status_code, late.json()["error"]["type"]) == (429, "rate_limit_error")
        assert 50 <= int(late.headers["retry-after"]) <= 60

    with caplog.at_level(logging.INFO, "tuneloop.serving"):
        with_client(api, use)
    assert "request 'abc' of demo: chat of m answered 429" in caplog.text


def test_ready_when_the_models_are_loaded(
    api: FastAPI, server: ModelServer, tmp_path: Path
) -> None:
    asyncio.run(server.ready())
    assert ask(api, "GET", "/ready").status_code == 200
    broken = ModelServer({"m": ServedModel(tmp_path)}, 4)
    with pytest.raises(Exception, match="cannot load"):
        asyncio.run(broken.ready())
    response = ask(build_api({"m": broken}), "GET", "/ready")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_loaded")
    # The engines of other models are measured all the same.
    both = build_api({"m": broken, "other": server})
    assert 'tuneloop_engine_running{engine="other"} ' in ask(both, "GET", "/metrics").text


def test_bodies_are_described_by_their_models(api: FastAPI) -> None:
    schema = ask(api, "GET", "/openapi.json").json()
    body = schema["paths"][CHATS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "n", "logit_bias", "stream_options"} <= set(fields)
    references = {
        part.split('"')[0] for part in json.dumps(schema).split("#/components/schemas/")[1:]
    }
    assert references <= set(schema["components"]["schemas"])
    assert not any("422" in o["responses"] for p in schema["paths"].values() for o in p.values())


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", "/v1/embeddings", b"{}", 404, None),
        ("DELETE", "/v1/models", b"", 405, None),
        ("POST", CHATS, b"{", 400, None),
        ("POST", CHATS, b"[" * 100_000 + b"]" * 100_000, 400, None),
        ("POST", CHATS, b'{"model": "\\ud83d", "messages": []}', 400, None),
        ("POST", CHATS, b'{"model": "m", "messages": "\xff"}', 400, None),
        ("POST", CHATS, b'{"model": "m", "temperature": NaN}', 400, None),
        ("POST", CHATS, b" " * (MAX_BODY_BYTES + 1), 413, "request_too_large"),
        ("POST", CHATS, b'{"model": "x"}', 404, "model_not_found"),
        ("POST", TEXTS, b'{"model": "x", "stream": true}', 404, "model_not_found"),
        ("POST", "/v1/responses", b'{"model": "x", "input": "a"}', 404, "model_not_found"),
        ("POST", "/tokenize", b'{"model": "x"}', 404, "model_not_found"),
        ("POST", "/detokenize", b'{"model": "x"}', 404, "model_not_found"),
        ("GET", "/v1/models/x", b"", 404, "model_not_found"),
        ("POST", CHATS, b'{"messages": []}', 400, None),
        ("POST", CHATS, b'{"model": null, "messages": []}', 400, None),
        ("POST", CHATS, b'{"model": 3, "messages": []}', 400, None),
    ],
)  # fmt: skip
def test_refusals_are_in_openais_shape(
    api: FastAPI, method: str, path: str, content: bytes, status: int, code: str | None
) -> None:
    response = ask(api, method, path, content=content)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert 0 < len(error["message"]) < 500


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({str(number): 1 for number in range(999)}, None, None),
        ({"prompt": "a" * 3_000_000}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * 600}, "prompt", "context_length_exceeded"),
        ({"prompt": [[1]] * 5000}, "prompt", None),
        ({"prompt": [10**30], "echo": True}, "prompt", None),
        ({"max_tokens": 10**30}, "max_tokens", None),
        ({"stop": "z" * 200_000}, "stop", None),
        ({"stop": ["z"] * 100}, "stop", None),
        ({"logit_bias": {"9999": 1}}, "logit_bias", None),
        ({"logit_bias": {"x": 1}}, "logit_bias", None),
        ({"stop_token_ids": [9999]}, "stop_token_ids", None),
        ({"stop_token_ids": [9999], "stream": True}, "stop_token_ids", None),
    ],
)
def test_what_would_cost_the_others_is_refused(
    api: FastAPI, more: dict[str, Any], param: str | None, code: str | None
) -> None:
    response = ask(api, "POST", TEXTS, json=TEXT | more)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert 0 < len(error["message"]) < 500


LONG = "a" * 3_000_000


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


ASKED: dict[str, Any] = {"model": "m", "input": "a"}


NO_FORM = {"type": "json_schema", "name": "x", "schema": {"type": 3}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHATS, {}, "model"),
        (CHATS, {"model": "x"}, "model"),
        ("/v1/responses", {"input": "a"}, "model"),
        (CHATS, CHAT | {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        (CHATS, CHAT | {"logit_bias": {"9999": 1}}, "logit_bias"),
        (CHATS, CHAT | {"tools": [TOOL]}, "tools"),
        (CHATS, CHAT | {"messages": [dict.fromkeys(map(str, range(999)), 1)]}, "messages"),
        ("/tokenize", {"model": "m", "prompt": LONG}, "prompt"),
        ("/tokenize", {"model": "m", "messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/detokenize", {"model": "m", "tokens": [9999]}, "tokens"),
        ("/v1/responses", ASKED | {"input": LONG}, "input"),
        ("/v1/responses", ASKED | {"input": LONG, "stream": True}, "input"),
        ("/v1/responses", ASKED | {"reasoning": {"effort": "high"}}, "reasoning"),
        ("/v1/responses", ASKED | {"text": {"format": NO_FORM}}, "text"),
    ],
)
def test_an_error_names_the_field_that_is_wrong(
    api: FastAPI, path: str, body: dict[str, Any], param: str
) -> None:
    response = ask(api, "POST", path, json=body)
    error = response.json()["error"]
    assert (response.status_code // 100, error["param"]) == (4, param), error
    if not body:
        assert error["message"].startswith("`model` is missing")


def test_a_full_queue_says_when_to_come_again(
    api: FastAPI, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(request: Any) -> Any:
        raise QueueFull("4 requests wait already")

    asyncio.run(server.ready())
    monkeypatch.setattr(server._loading.result()["m"].engine, "submit", full)
    for stream in (False, True):
        response = ask(api, "POST", CHATS, json=CHAT | {"stream": stream})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "rate_limit_exceeded"


def test_more_prompts_than_the_queue_holds_are_answered(
    api: FastAPI, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(server.ready())
    monkeypatch.setattr(server._loading.result()["m"].engine, "max_waiting", 2)
    prompts = [[1 + number] for number in range(40)]
    choices = post(api, TEXTS, TEXT | {"prompt": prompts, "max_tokens": 1})["choices"]
    assert [choice["index"] for choice in choices] == list(range(40))


def test_an_answer_is_taken_back_as_history(api: FastAPI) -> None:
    first = post(api, CHATS, CHAT)["choices"][0]["message"]
    sent_back = first | {"tool_calls": None, "annotations": [], "audio": None}
    messages = [
        {"role": "developer", "content": "Be brief.", "name": "me"},
        *CHAT["messages"],
        sent_back,
        {"role": "user", "content": [{"type": "text", "text": "Again"}], "name": "bob"},
    ]
    more = {
        "n": 1,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "best_of": None,
    }
    post(api, CHATS, CHAT | {"messages": messages} | more)


def test_an_assistant_may_open_a_conversation(api: FastAPI, renderer: Renderer) -> None:
    messages = [{"role": "assistant", "content": "Hello, how can I help?"}, *CHAT["messages"]]
    got = post(api, CHATS, CHAT | {"messages": messages, "return_token_ids": True})
    text = renderer.tokenizer.decode(got["prompt_token_ids"])
    assert text == renderer.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_a_control_token_in_a_users_text_is_text(api: FastAPI, renderer: Renderer) -> None:
    def encoded(content: str) -> list[int]:
        messages = [{"role": "user", "content": content}]
        return post(api, "/tokenize", {"model": "m", "messages": messages})["tokens"]

    stop = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded("a").count(stop) == encoded("<|im_end|>").count(stop) == 1


def test_system_is_what_developers_say(api: FastAPI, renderer: Renderer) -> None:
    ids = [
        post(api, "/tokenize", {"model": "m", "messages": [{"role": role, "content": "Be brief."}]})
        for role in ("developer", "system", "user")
    ]
    assert ids[0] == ids[1] != ids[2]


def test_tokenize_and_detokenize(api: FastAPI, renderer: Renderer) -> None:
    text = "naïve 🎉 " * 2000  # long enough for the thread that reads long texts
    got = post(api, "/tokenize", {"model": "m", "prompt": text})
    assert got["tokens"] == renderer.text_ids(text)
    assert (got["count"], got["max_model_len"]) == (len(got["tokens"]), 512)
    assert post(api, "/detokenize", {"model": "m", "tokens": got["tokens"]}) == {"prompt": text}
    assert (
        ask(api, "POST", "/detokenize", json={"model": "m", "tokens": [99999]}).status_code == 400
    )
    both = {"model": "m", "prompt": "a", "messages": CHAT["messages"]}
    assert ask(api, "POST", "/tokenize", json=both).status_code == 400


def test_the_request_id_is_in_the_log(api: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tuneloop.serving"):
        ask(api, "POST", CHATS, json=CHAT, headers={"X-Request-Id": "abc-7"})
    assert any("abc-7" in message and "200" in message for message in caplog.messages)


def test_metrics_count(server: ModelServer) -> None:
    api = build_api({"m": server})
    post(api, TEXTS, TEXT)
    chunks_of(api, CHATS, CHAT)
    ask(api, "POST", TEXTS, json=TEXT | {"prompt": []})
    text = ask(api, "GET", "/metrics").text
    for line in (
        'tuneloop_requests_total{model="m",route="completions",status="200"} 1.0',
        'tuneloop_requests_total{model="m",route="completions",status="400"} 1.0',
        'tuneloop_request_seconds_count{model="m",route="chat"} 1.0',
        'tuneloop_time_to_first_token_seconds_count{model="m"} 1.0',
        'tuneloop_engine_running{engine="m"} ',
    ):
        assert line in text
    assert 'tuneloop_engine_generated_tokens{engine="m"} 0.0' not in text


def test_a_stream_that_breaks_off_is_counted_as_failed(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> AsyncGenerator[str]:
        yield event({"choices": []})
        raise RuntimeError("out of memory")

    monkeypatch.setattr("tuneloop.serving.replica._events", broken)
    api = build_api({"m": server})
    response = ask(api, "POST", CHATS, json=CHAT | {"stream": True})
    last = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["message"] == "RuntimeError: out of memory"
    text = ask(api, "GET", "/metrics").text
    assert 'tuneloop_requests_total{model="m",route="chat",status="500"} 1.0' in text
    assert 'status="200"' not in text
    assert "tuneloop_time_to_first_token_seconds_count{" not in text


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"prompt": ["yes", "no"]}])
def test_the_time_to_the_first_token_is_that_of_a_text(api: FastAPI, more: dict[str, Any]) -> None:
    # It is measured at the second event, however many choices there are.
    chunks = chunks_of(api, TEXTS, TEXT | {"logit_bias": {"40": 100}} | more)
    assert [bool(chunk["choices"][0]["text"]) for chunk in chunks[:2]] == [False, True]


@pytest.mark.parametrize("num_top", [0, 2])
def test_several_choices_and_prompts_whole_and_streamed(api: FastAPI, num_top: int) -> None:
    body = TEXT | {"prompt": ["Return the", "Open"], "n": 3, "temperature": 1, "seed": 5,
                   "max_tokens": 12, "logprobs": num_top}  # fmt: skip
    whole = post(api, TEXTS, body)
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    for prompt in (0, 3):
        assert len({choice["text"] for choice in whole["choices"][prompt : prompt + 3]}) == 3
    # The first choice is that of a request for one, and each prompt's tokens count once.
    one = post(api, TEXTS, body | {"n": 1, "prompt": "Return the"})
    assert one["choices"][0]["text"] == whole["choices"][0]["text"]
    other = post(api, TEXTS, body | {"n": 1, "prompt": "Open"})["usage"]["prompt_tokens"]
    assert whole["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"] + other

    chunks = chunks_of(api, TEXTS, body | {"stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for field, values in choice["logprobs"].items():
            sent = [chunk["logprobs"][field] for chunk in mine if chunk["logprobs"]]
            sent = list(itertools.chain(*sent))
            if field == "top_logprobs":
                sent, values = [list(map(sorted, each)) for each in (sent, values)]
            # Rounding depends on what else is in the batch.
            assert sent == (pytest.approx(values) if field == "token_logprobs" else values)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_echoes_its_prompts(api: FastAPI, logprobs: int | None) -> None:
    body = TEXT | {"prompt": ["Return the", "é🎉"], "n": 2, "echo": True, "logprobs": logprobs}
    whole = post(api, TEXTS, body)["choices"]
    told: list[dict[str, Any]] = [{"text": "", "logprobs": {}} for _ in whole]
    for chunk in chunks_of(api, TEXTS, body):
        for choice in chunk["choices"]:
            own = told[choice["index"]]
            own["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                own["logprobs"].setdefault(name, []).extend(values)
    assert [one["text"] for one in told] == [one["text"] for one in whole]
    assert whole[2]["text"].startswith("é🎉")
    for one, streamed in zip(whole, told, strict=True):
        if logprobs is None:
            assert streamed["logprobs"] == {}
            continue
        assert streamed["logprobs"].keys() == one["logprobs"].keys()
        for name in ("tokens", "text_offset"):
            assert streamed["logprobs"][name] == one["logprobs"][name]
        first, *others = streamed["logprobs"]["token_logprobs"]
        assert first is None
        assert others == pytest.approx(one["logprobs"]["token_logprobs"][1:], abs=1e-4)


def test_offsets_are_places_in_the_text_also_behind_control_tokens(api: FastAPI) -> None:
    prompt = "<|im_start|>user\nyes<|im_end|>\n"
    body = TEXT | {"prompt": prompt, "echo": True, "logprobs": 0, "logit_bias": {"1": 100}}
    for asked in (body | {"max_tokens": 0}, body):
        choice = post(api, TEXTS, asked)["choices"][0]
        assert choice["text"].startswith(prompt)
        tokens, offsets = (choice["logprobs"][name] for name in ("tokens", "text_offset"))
        at = 0
        for token, offset in zip(tokens, offsets, strict=True):
            assert offset == at
            # One that is written is left out of the text, as in every answer.
            at += len(token) if at < len(prompt) else 0
        assert at == len(choice["text"])


def test_a_stream_that_only_echoes(api: FastAPI) -> None:
    body = TEXT | {"echo": True, "logprobs": 1, "max_tokens": 0}
    chunks = [chunk["choices"][0] for chunk in chunks_of(api, TEXTS, body)]
    assert "".join(one["text"] for one in chunks) == "Return the"
    assert len(chunks[1]["logprobs"]["tokens"]) > 1
    assert chunks[-1]["finish_reason"] == "length"


def test_the_best_of_several_candidates(api: FastAPI) -> None:
    body = TEXT | {"prompt": ["Return the", "yes"], "temperature": 1, "seed": 3, "logprobs": 0}
    candidates = post(api, TEXTS, body | {"n": 6})
    best = post(api, TEXTS, body | {"n": 2, "best_of": 6})
    for number in range(2):
        ranked = sorted(
            candidates["choices"][6 * number : 6 * number + 6],
            key=lambda one: -sum(one["logprobs"]["token_logprobs"]) / 4,
        )
        given = best["choices"][2 * number : 2 * number + 2]
        assert [one["text"] for one in given] == [one["text"] for one in ranked[:2]]
    assert [one["index"] for one in best["choices"]] == [0, 1, 2, 3]
    assert best["usage"] == candidates["usage"]  # all that was written
    without = post(api, TEXTS, body | {"best_of": 6, "logprobs": None})["choices"]
    assert [one["text"] for one in without] == [best["choices"][i]["text"] for i in (0, 2)]
    assert without[0]["logprobs"] is None


def test_settings_of_the_chat_template(server: ModelServer, renderer: Renderer) -> None:
    """They are rendered, also for the ranking; names that it does not read are refused."""
    api = build_api({"m": server, "thinking": server})

    def prompt(**more: Any) -> str:
        body = {"model": "thinking", "messages": CHAT["messages"], **more}
        tokens = post(api, "/tokenize", body)["tokens"]
        return str(renderer.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    assert "<think>" not in prompt()
    assert prompt() == prompt(chat_template_kwargs={"enable_thinking": True})
    off = {"enable_thinking": False}
    assert prompt(chat_template_kwargs=off) == prompt() + "<think>\n\n</think>\n\n"
    assert "Today: 1 May" in prompt(chat_template_kwargs={"date_string": "1 May"})
    # A control token in a setting is text.
    end = renderer.tokenizer.eos_token_id
    asked = {"model": "thinking", "messages": CHAT["messages"]}
    count = [
        post(api, "/tokenize", asked | {"chat_template_kwargs": {"date_string": text}})["tokens"]
        for text in ("1 May", "1 <|im_end|> May")
    ]
    assert [ids.count(end) for ids in count] == [2, 2]

    chat = CHAT | {"model": "thinking", "return_token_ids": True}
    plain, kwargs, effort = (
        post(api, CHATS, chat | more)["prompt_token_ids"]
        for more in ({}, {"chat_template_kwargs": off}, {"reasoning_effort": "none"})
    )
    assert kwargs == effort != plain
    ranking = {"answers": ["yes", "no"], "coverage": 1}
    logprobs = [
        post(api, CHATS, chat | more | {"ranking": ranking})["choices"][0]["ranking"]["answers"]
        for more in ({}, {"chat_template_kwargs": off})
    ]
    assert logprobs[0] != logprobs[1]
    post(api, CHATS, CHAT | {"reasoning_effort": "none"})  # this one never thinks
    for more, param, told in (
        ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs", "`thinking`"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "`messages`"),
        ({"chat_template_kwargs": {"eos_token": ""}}, "chat_template_kwargs", "`eos_token`"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "`enable_thinking`"),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "reasoning_effort",
            "differ",
        ),
    ):
        response = ask(api, "POST", CHATS, json=chat | more)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert told in error["message"]


def test_log_probabilities_of_a_streamed_chat(api: FastAPI) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 16, "stop": ["e"]}
    expected = post(api, CHATS, body)["choices"][0]
    chunks = [chunk["choices"][0] for chunk in chunks_of(api, CHATS, body)]
    sent = list(itertools.chain(*(c["logprobs"]["content"] for c in chunks if c["logprobs"])))
    content = expected["logprobs"]["content"]
    assert [item["bytes"] for item in sent] == [item["bytes"] for item in content]
    assert [len(item["top_logprobs"]) for item in sent] == [2] * len(content)
    assert [item["logprob"] for item in sent] == pytest.approx([c["logprob"] for c in content])


def test_stop_token_ids_end_an_answer(api: FastAPI) -> None:
    body = TEXT | {"max_tokens": 12, "return_token_ids": True, "temperature": 1, "seed": 3}
    ids = post(api, TEXTS, body)["choices"][0]["token_ids"]
    stop = next(token for index, token in enumerate(ids) if index and token not in ids[:index])
    got = post(api, TEXTS, body | {"stop_token_ids": [stop]})["choices"][0]
    assert (got["token_ids"], got["finish_reason"]) == (ids[: ids.index(stop)], "stop")


def test_a_seed_gives_the_same_text_whatever_else_is_asked(api: FastAPI) -> None:
    """Alone and in a crowd of other lengths, whose products are rounded otherwise."""
    asked = [
        TEXT | {"temperature": 1.3, "seed": seed, "max_tokens": 24, **more}
        for seed in range(4)
        for more in ({}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"presence_penalty": 1})
    ]
    crowd = [
        TEXT | {"prompt": f"Open {n} " * (n % 7), "max_tokens": 3 + n % 9} for n in range(1, 30)
    ]

    async def together(client: httpx.AsyncClient) -> list[str]:
        mixed = [body for pair in zip(asked, crowd, strict=False) for body in pair]
        answers = await asyncio.gather(*(client.post(TEXTS, json=body) for body in mixed))
        return [answer.json()["choices"][0]["text"] for answer in answers[::2]]

    alone = [post(api, TEXTS, body)["choices"][0]["text"] for body in asked]
    assert with_client(api, together) == alone


def test_a_long_text_is_read_beside_the_others(
    api: FastAPI, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one request's prompt is being read, which takes as long as it takes, others go on."""
    import threading

    asyncio.run(server.ready())
    loaded = server._loading.result()["m"]
    reading, go_on = threading.Event(), threading.Event()
    original = type(loaded).second_renderer.func  # type: ignore[attr-defined]

    class Slow:
        def __init__(self, renderer: Renderer) -> None:
            self.renderer = renderer

    def text_ids(self: Any, text: str) -> list[int]:
        if isinstance(self, Slow):
            reading.set()
            assert go_on.wait(60)
            return self.renderer.text_ids(text)
        return real(self, text)

    real = Renderer.text_ids
    monkeypatch.setitem(vars(loaded), "second_renderer", Slow(original(loaded)))
    monkeypatch.setattr(Renderer, "text_ids", text_ids)

    async def both(client: httpx.AsyncClient) -> tuple[int, int]:
        long = asyncio.create_task(client.post(TEXTS, json=TEXT | {"prompt": "Return " * 2000}))
        while not reading.is_set():
            await asyncio.sleep(0.01)
        quick = await client.post(TEXTS, json=TEXT)
        go_on.set()
        return (await long).status_code, quick.status_code

    assert with_client(api, both) == (400, 200)


def test_no_request_makes_the_server_fail(api: FastAPI) -> None:
    """Requests made from the server's own schema, right and wrong ones.

    TUNELOOP_FUZZ_REQUESTS=10000 makes it thorough.
    """
    number = int(os.environ.get("TUNELOOP_FUZZ_REQUESTS", "400"))
    schema = ask(api, "GET", "/openapi.json").json()
    chooser = random.Random(int(os.environ.get("TUNELOOP_FUZZ_SEED", "0")))
    requests = [fuzzed(schema, chooser) for _ in range(number)]
    statuses: dict[int, int] = {}

    async def send(client: httpx.AsyncClient) -> None:
        waiting = iter(requests)

        async def work() -> None:
            for method, path, content in waiting:
                response = await client.request(method, path, content=content)
                status = response.status_code
                statuses[status] = statuses.get(status, 0) + 1
                assert status < 500, (path, content[:2000], response.text)
                if status >= 400:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                elif "event-stream" in response.headers["content-type"]:
                    assert response.text.endswith("data: [DONE]\n\n"), (content, response.text)

        await asyncio.gather(*(work() for _ in range(16)))

    started = time.perf_counter()
    with_client(api, send)
    print(f"{number} requests in {time.perf_counter() - started:.1f} s: {statuses}")
    assert statuses[200] > number // 10
    assert statuses[400] > number // 10
