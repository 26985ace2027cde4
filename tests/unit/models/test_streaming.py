"""Streamed answers: from the bytes of a real server, and when they end early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tuneloop.errors import EndpointError
from tuneloop.models.client.client import Client, Delta, RequestError
from tuneloop.models.client.streaming import event_lines, read_deltas
from tuneloop.records import Endpoint, Message, SamplingParams


def chunk(text: str | None = None, reason: str | None = None) -> str:
    delta = {} if text is None else {"content": text}
    return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": reason}]})


USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}'


def read(*lines: str) -> list[Delta]:
    async def feed() -> AsyncIterator[str]:
        for line in lines:
            yield line

    async def run() -> list[Delta]:
        return [delta async for delta in read_deltas(feed())]

    return asyncio.run(run())


def test_pieces_then_one_end() -> None:
    lines = [chunk(""), "", ": a comment", chunk("hé"), chunk("llo"), chunk(None, "length"), USAGE]
    expected = [Delta("hé"), Delta("llo"), Delta("", "length", 5, 2)]
    assert read(*lines, "data: [DONE]", "data: never read") == expected


def test_without_usage_the_counts_are_unknown() -> None:
    assert read(chunk("a", "stop"), "data: [DONE]") == [Delta("a"), Delta("", "stop")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([chunk("four"), "data: [DONE]"], "broke off after 4 characters"),
        ([chunk("four")], "broke off after 4 characters"),
        ([], "broke off after 0 characters"),
        (['data: {"error": {"message": "out of memory"}}'], "broke off: out of memory"),
        (["data: {not json"], "not a piece of a chat completion"),
        (['data: {"choices": [{"text": "x"}]}'], "not a piece of a chat completion"),
    ],
)
def test_an_answer_without_an_end_is_an_error(lines: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(*lines)


def test_a_line_of_events_ends_at_a_newline_alone() -> None:
    text = "a\u2028b\x85c\u2029é"
    events = f'data: {{"x": "{text}"}}\r\n\ndata: [DONE]'.encode()

    async def run() -> list[str]:
        async def pieces() -> AsyncIterator[bytes]:
            for place in range(len(events)):
                yield events[place : place + 1]

        return [line async for line in event_lines(pieces())]

    assert asyncio.run(run()) == [f'data: {{"x": "{text}"}}', "", "data: [DONE]"]


def stream(url: str, model: str = "parrot", key: str = "") -> list[Delta]:
    async def run() -> list[Delta]:
        async with Client(Endpoint(url, model, key)) as client:
            messages = [Message("user", "hello there")]
            return [d async for d in client.stream(messages, SamplingParams(9, seed=4))]

    return asyncio.run(run())


def test_a_real_server_streams_and_gets_every_sampling_field(model_server: Any) -> None:
    deltas = stream(model_server.url)
    assert [delta.text for delta in deltas] == ["HELLO ", "THERE", ""]
    assert deltas[-1] == Delta("", "stop", 2, 2)
    sent = model_server.requests[0]
    assert (sent["max_tokens"], sent["temperature"], sent["top_p"], sent["seed"]) == (9, 0, 1, 4)
    assert sent["stream"] is True


def test_refusals_are_told_apart(model_server: Any) -> None:
    with pytest.raises(EndpointError, match="does not serve this model"):
        stream(model_server.url, "nobody")
    model_server.failures = [500]
    with pytest.raises(RequestError, match="HTTP 500: made to fail"):
        stream(model_server.url)
    model_server.api_key = "secret"
    with pytest.raises(EndpointError, match="refuses a request without key"):
        stream(model_server.url)
    assert stream(model_server.url, key="secret")[-1].finish_reason == "stop"
    with pytest.raises(EndpointError, match="does not answer"):
        stream("http://127.0.0.1:9/v1")
