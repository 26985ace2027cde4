"""The HTTP client against a real server."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tuneloop.errors import EndpointError
from tuneloop.models.client.client import Client, RequestError, retry_after_s
from tuneloop.records import Endpoint, Message, SamplingParams

pytestmark = pytest.mark.usefixtures("short_waits")

HELLO = [Message("system", "be kind"), Message("user", "hello there")]


def ask(
    endpoint: Endpoint, use: Callable[[Client], Coroutine[Any, Any, Any]], **options: Any
) -> Any:
    async def run() -> Any:
        async with Client(endpoint, **options) as client:
            return await use(client)

    return asyncio.run(run())


def test_tools_and_earlier_calls_are_sent(model_server):
    function = {"name": "temperature", "arguments": "{}"}
    calls = [{"id": "1", "type": "function", "function": function}]
    said = [HELLO[1], Message("assistant", "", json.dumps(calls), weight=0), Message("tool", "3")]
    tools = [{"type": "function", "function": {"name": "temperature"}}]
    endpoint = Endpoint(model_server.url, "parrot")
    ask(endpoint, lambda client: client.generate(said, SamplingParams(7), json.dumps(tools)))
    sent = model_server.requests[-1]
    assert sent["tools"] == tools
    assert sent["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "3"},
    ]
    ask(endpoint, lambda client: client.generate(HELLO, SamplingParams(7)))
    assert "tools" not in model_server.requests[-1]


def test_every_sampling_field_is_sent_and_the_answer_is_read(model_server):
    params = SamplingParams(7, temperature=0.5, top_p=0.9, seed=3, stop=("\n\n",), logprobs=True)
    completion = ask(
        Endpoint(model_server.url, "parrot"), lambda client: client.generate(HELLO, params)
    )
    assert completion.text == "HELLO THERE"
    assert completion.finish_reason == "stop"
    assert (completion.prompt_tokens, completion.completion_tokens) == (4, 2)
    assert completion.logprobs == [-0.5, -0.5]
    assert completion.latency_s > 0
    sent = model_server.requests[0]
    assert sent["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello there"},
    ]
    assert {key: sent[key] for key in ("max_tokens", "temperature", "top_p", "seed", "stop")} == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["\n\n"],
    }


def test_no_stop_strings_are_sent_as_null(model_server):
    ask(
        Endpoint(model_server.url + "/", "parrot"),
        lambda client: client.generate(HELLO, SamplingParams()),
    )
    assert model_server.requests[0]["stop"] is None


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503, 520, 529])
def test_failures_that_may_pass_are_retried(model_server, status):
    model_server.failures = [status, status]
    completion = ask(
        Endpoint(model_server.url, "parrot"),
        lambda client: client.generate(HELLO, SamplingParams()),
    )
    assert completion.text == "HELLO THERE"
    assert len(model_server.requests) == 3


@pytest.mark.parametrize("status", [408, 504, 524])
def test_a_gateway_that_waited_in_vain_may_have_to_be_paid(model_server, status):
    model_server.failures = [503, status]
    with pytest.raises(RequestError, match=f"HTTP {status}") as caught:
        ask(
            Endpoint(model_server.url, "parrot"),
            lambda client: client.generate(HELLO, SamplingParams()),
            asks_lost_again=False,
        )
    assert (caught.value.lost, caught.value.refused) == (True, False)
    assert len(model_server.requests) == 2


def test_retries_are_bounded_and_then_one_request_fails(model_server):
    model_server.failures = [500] * 10
    with pytest.raises(RequestError, match=r"HTTP 500: made to fail \(3 tries\)"):
        ask(
            Endpoint(model_server.url, "parrot"),
            lambda client: client.generate(HELLO, SamplingParams()),
            retries=2,
        )
    assert len(model_server.requests) == 3


def test_a_server_that_asks_for_patience_gets_it(model_server):
    model_server.failures, model_server.retry_after = [503], "1"
    started = time.monotonic()
    ask(
        Endpoint(model_server.url, "parrot"),
        lambda client: client.generate(HELLO, SamplingParams()),
    )
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize(
    "value",
    ["Sun, 06 Nov 1994 08:49:47 GMT", "Sunday, 06-Nov-94 08:49:47 GMT", "Sun Nov  6 08:49:47 1994"],
)
def test_a_date_to_come_back_at_is_read_in_every_form_of_the_standard(value):
    clock = {"date": "Sun, 06 Nov 1994 08:49:37 GMT"}
    assert retry_after_s(clock | {"retry-after": value}) == 10
    assert retry_after_s({"retry-after": value}) == 0, "the date is long past"


def test_seconds_to_wait_are_read_and_nonsense_is_not_obeyed():
    assert retry_after_s({"retry-after": " 120 "}) == 120
    for nonsense in ("", "-5", "soon", "1e9", "nan"):
        assert retry_after_s({"retry-after": nonsense}) == 0


def test_a_server_that_asks_for_a_longer_pause_than_one_waits_is_one_failure(model_server):
    model_server.failures, model_server.retry_after = [429], "86400"
    with pytest.raises(RequestError, match="come back in 86400 s"):
        ask(
            Endpoint(model_server.url, "parrot"),
            lambda client: client.generate(HELLO, SamplingParams()),
        )
    assert len(model_server.requests) == 1


@pytest.mark.parametrize("status", [501, 505])
def test_what_a_server_does_not_do_is_not_asked_again(model_server, status):
    model_server.failures = [status]
    with pytest.raises(RequestError, match=f"HTTP {status}"):
        ask(
            Endpoint(model_server.url, "parrot"),
            lambda client: client.generate(HELLO, SamplingParams()),
        )
    assert len(model_server.requests) == 1


def test_an_account_without_money_ends_the_run(model_server):
    model_server.failures = [402]
    with pytest.raises(EndpointError, match="no money left"):
        ask(
            Endpoint(model_server.url, "parrot"),
            lambda client: client.generate(HELLO, SamplingParams()),
        )
    assert len(model_server.requests) == 1


def test_an_answer_that_only_calls_needs_no_content(model_server):
    def text_of(message: object) -> str:
        model_server.answer = lambda body: {"message": message}
        endpoint = Endpoint(model_server.url, "parrot")
        return ask(endpoint, lambda client: client.generate(HELLO, SamplingParams())).text

    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    only_calls = {"role": "assistant", "tool_calls": [call]}
    assert text_of(only_calls) == '{"name": "f", "arguments": {"a": 1}}'
    for message in (None, {"role": "assistant"}):
        with pytest.raises(RequestError, match="not a chat completion"):
            text_of(message)


def test_an_answer_without_counted_tokens_is_an_answer(model_server):
    model_server.counts_tokens = False
    completion = ask(
        Endpoint(model_server.url, "parrot"),
        lambda client: client.generate(HELLO, SamplingParams()),
    )
    assert completion.text == "HELLO THERE"
    assert (completion.prompt_tokens, completion.completion_tokens) == (None, None)


def test_a_model_that_knows_the_limit_by_its_newer_name_only_gets_it(model_server):
    model_server.newest = True

    async def twice(client: Client) -> list[str]:
        return [(await client.generate(HELLO, SamplingParams(9))).text for _ in range(2)]

    assert ask(Endpoint(model_server.url, "parrot"), twice) == ["HELLO THERE"] * 2
    limits = [body.get("max_completion_tokens") for body in model_server.requests]
    assert limits == [None, 9, 9]


def test_a_bad_request_is_not_retried_and_keeps_the_servers_words(model_server):
    def reply(messages):
        raise ValueError("prompt of 600 tokens is longer than 512")

    model_server.reply = reply
    with pytest.raises(RequestError, match="HTTP 400: prompt of 600 tokens is longer than 512"):
        ask(
            Endpoint(model_server.url, "parrot"),
            lambda client: client.generate(HELLO, SamplingParams()),
        )
    assert len(model_server.requests) == 1


def test_slow_answers_time_out(model_server):
    model_server.delay_s = 2.0
    with pytest.raises(RequestError, match="no answer in time"):
        ask(
            Endpoint(model_server.url, "parrot"),
            lambda client: client.generate(HELLO, SamplingParams()),
            timeout_s=0.2,
            retries=1,
        )
    assert len(model_server.requests) == 2


def test_a_server_that_takes_no_connection_was_sent_nothing():
    with socket.socket() as full, socket.socket() as other, socket.socket() as third:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (other, third):
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(RequestError, match=r"no connection in time.*2 tries") as caught:
            ask(
                Endpoint(f"http://127.0.0.1:{full.getsockname()[1]}/v1", "parrot"),
                lambda client: client.generate(HELLO, SamplingParams(max_tokens=8)),
                asks_lost_again=False,
                timeout_s=0.2,
                retries=1,
            )
    assert (caught.value.lost, caught.value.refused) == (False, True)


def test_an_answer_that_comes_byte_by_byte_times_out_as_well():
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"\n")
            await asyncio.sleep(0.02)

    async def ask_it() -> None:
        async with await asyncio.start_server(trickle, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            async with Client(Endpoint(url, "parrot"), 0.3, asks_lost_again=False) as client:
                await client.generate(HELLO, SamplingParams(max_tokens=8))

    with pytest.raises(RequestError, match="no answer in time") as caught:
        asyncio.run(ask_it())
    assert caught.value.lost


def test_other_finish_reasons_are_no_answer(model_server):
    model_server.reply = lambda messages: ("", "content_filter")
    with pytest.raises(RequestError, match="content_filter"):
        ask(
            Endpoint(model_server.url, "parrot"),
            lambda client: client.generate(HELLO, SamplingParams()),
        )


def test_refused_connection_names_the_url_and_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointError) as caught:
            ask(Endpoint(url, "parrot"), lambda client: client.generate(HELLO, SamplingParams()))
    problem = caught.value.problems[0]
    assert problem.where == url
    assert problem.got
    assert "start it" in problem.remedy


def test_wrong_key_ends_the_run_at_once(model_server):
    model_server.api_key = "secret"
    with pytest.raises(EndpointError, match="refuses") as caught:
        ask(
            Endpoint(model_server.url, "parrot", "guess"),
            lambda client: client.generate(HELLO, SamplingParams()),
        )
    assert "wrong key" in caught.value.problems[0].got
    assert "guess" not in str(caught.value)
    assert len(model_server.requests) == 1
    good = Endpoint(model_server.url, "parrot", "secret")
    assert ask(good, lambda client: client.models()) == ["parrot"]


@pytest.mark.parametrize("use", ["check", "generate"])
def test_unknown_model_lists_what_is_served(model_server, use):
    model_server.models = ["base", "finetuned"]

    async def call(client: Client) -> Any:
        if use == "check":
            return await client.check()
        return await client.generate(HELLO, SamplingParams())

    with pytest.raises(EndpointError) as caught:
        ask(Endpoint(model_server.url, "parot"), call)
    problem = caught.value.problems[0]
    assert problem.got == "parot"
    assert problem.allowed == "base, finetuned"


def test_wrong_path_says_that_the_url_ends_in_v1(model_server):
    with pytest.raises(EndpointError, match="ends in /v1"):
        ask(
            Endpoint(model_server.url.removesuffix("/v1"), "parrot"),
            lambda client: client.generate(HELLO, SamplingParams()),
        )


def test_not_a_url_is_an_endpoint_error():
    with pytest.raises(EndpointError, match="not a URL"):
        ask(Endpoint("localhost:8000/v1", "parrot"), lambda client: client.check())


def test_loglikelihood_of_token_ids_sums_the_continuation_only(model_server):
    endpoint = Endpoint(model_server.url, "parrot")
    found = ask(endpoint, lambda client: client.loglikelihood([9, 9, 9], [1, 2, 3]))
    assert (found.logprob, found.num_tokens) == (-6.0, 3)
    unlikely = ask(endpoint, lambda client: client.loglikelihood([1], [2, 9]))
    assert unlikely.logprob == -11.0
    sent = model_server.requests[0]
    assert (sent["echo"], sent["logprobs"], sent["temperature"]) == (True, 1, 0.0)


def test_loglikelihood_of_text_counts_scored_tokens_and_bytes(model_server):
    endpoint = Endpoint(model_server.url, "parrot")
    # Tokens: "the", " ", "cat", " ", "é".
    found = ask(endpoint, lambda client: client.loglikelihood("the ", "cat é"))
    assert (found.logprob, found.num_tokens, found.num_bytes) == (-5.0, 3, 6)
    # Without context the first token is not scored, and its bytes are not counted.
    whole = ask(endpoint, lambda client: client.loglikelihood("", "the cat"))
    assert (whole.logprob, whole.num_tokens, whole.num_bytes) == (-4.0, 2, 4)
    # A token across the boundary belongs to the continuation.
    across = ask(endpoint, lambda client: client.loglikelihood("the c", "at"))
    assert (across.logprob, across.num_tokens, across.num_bytes) == (-3.0, 1, 3)
