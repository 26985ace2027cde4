"""A real HTTP peer for the client and the evaluation: small, deterministic, made to misbehave."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

EVENTS = "text/event-stream"
Reply = tuple[str, str]


def echo(messages: list[dict[str, str]]) -> Reply:
    return messages[-1]["content"].upper(), "stop"


def chunks(text: str, reason: str, usage: dict[str, int]) -> Iterator[str]:
    deltas: list[tuple[dict[str, str], str | None]] = [
        ({"content": word}, None) for word in re.findall(r"\S+\s*", text)
    ]
    for delta, end in [*deltas, ({}, reason)]:
        yield f"data: {json.dumps({'choices': [{'delta': delta, 'finish_reason': end}]})}\n\n"
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


@dataclass
class ModelServer:
    """An OpenAI-compatible server whose answers a test chooses.

    `failures` holds statuses that the next requests get instead of an answer; `requests` every
    body that arrived; `answer` makes the content, and more of the choice, from the whole body, in
    place of `reply`; `most_in_flight` the largest number of requests at one time. Without
    `counts_tokens` no answer has `usage`; with `newest` the limit is `max_completion_tokens`.
    """

    url: str = ""
    models: list[str] = field(default_factory=lambda: ["parrot"])
    reply: Callable[[list[dict[str, str]]], Reply] = echo
    api_key: str = ""
    failures: list[int] = field(default_factory=list)
    retry_after: str = ""
    answer: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    counts_tokens: bool = True
    newest: bool = False
    delay_s: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def app(self) -> Any:
        app = FastAPI()

        def error(status: int, message: str) -> JSONResponse:
            headers = {"retry-after": self.retry_after} if self.retry_after else {}
            return JSONResponse({"error": {"message": message}}, status, headers)

        async def refuse(request: Request, body: dict[str, Any]) -> JSONResponse | None:
            self.requests.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await asyncio.sleep(self.delay_s)
            finally:
                self.in_flight -= 1
            if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
                return error(401, "wrong key")
            if self.failures:
                return error(self.failures.pop(0), "made to fail")
            if body["model"] not in self.models:
                return error(404, f"no model {body['model']}")
            return None

        @app.get("/v1/models")
        async def models(request: Request) -> Any:
            if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
                return error(401, "wrong key")
            return {"object": "list", "data": [{"id": name} for name in self.models]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            body = await request.json()
            if (refusal := await refuse(request, body)) is not None:
                return refusal
            if self.newest and "max_tokens" in body:
                return error(400, "Unsupported parameter: use 'max_completion_tokens' instead")
            try:
                made = self.answer(body) if self.answer else {}
                text, reason = made.pop("content", ""), "stop"
                if not self.answer:
                    text, reason = self.reply(body["messages"])
            except ValueError as problem:
                return error(400, str(problem))
            tokens = text.split()
            if body["stream"]:
                num_prompt = sum(len(m["content"].split()) for m in body["messages"])
                usage = {"prompt_tokens": num_prompt, "completion_tokens": len(tokens)}
                return StreamingResponse(chunks(text, reason, usage), media_type=EVENTS)
            logprobs = {"content": [{"token": t, "logprob": -0.5} for t in tokens]}
            num_prompt = sum(len(m["content"].split()) for m in body["messages"])
            usage = {"prompt_tokens": num_prompt, "completion_tokens": len(tokens)}
            return {
                "choices": [
                    {
                        "message": {"role": "assistant", "content": text},
                        "finish_reason": reason,
                        "logprobs": logprobs if body.get("logprobs") else None,
                        **made,
                    }
                ],
            } | ({"usage": usage} if self.counts_tokens else {})

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Any:
            tokens = [len(word) for word in (await request.json())["prompt"].split()]
            return {"tokens": tokens, "count": len(tokens), "max_model_len": 512}

        @app.post("/v1/completions")
        async def completions(request: Request) -> Any:
            # Its language model: a token's log-probability is minus its length (or minus its id),
            # and it would itself have written any token shorter than four characters (ids < 4).
            body = await request.json()
            if (refusal := await refuse(request, body)) is not None:
                return refusal
            prompt = body["prompt"]
            tokens = re.findall(r"\S+|\s+", prompt) if isinstance(prompt, str) else prompt
            sizes = [len(t) if isinstance(t, str) else t for t in tokens]
            chosen: list[float | None] = [None, *(-float(size) for size in sizes[1:]), -1.0]
            best = [None, *({"x": max(-float(s), -3.0)} for s in sizes[1:]), {"x": -1.0}]
            offsets, position = [], 0
            for token in tokens:
                offsets.append(position)
                position += len(token) if isinstance(token, str) else 1
            return {
                "choices": [
                    {
                        "text": "",
                        "logprobs": {
                            "tokens": [*map(str, tokens), "!"],
                            "token_logprobs": chosen,
                            "top_logprobs": best,
                            "text_offset": [*offsets, position],
                        },
                    }
                ],
                "usage": {"prompt_tokens": len(tokens), "completion_tokens": 1},
            }

        return app


@pytest.fixture
def model_server() -> Iterator[ModelServer]:
    """A server on 127.0.0.1 for the length of one test."""
    import uvicorn

    server = ModelServer()
    runner = uvicorn.Server(
        uvicorn.Config(server.app(), host="127.0.0.1", port=0, log_level="error")
    )
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not runner.started:
        assert time.monotonic() < deadline, "the test's server does not start"
        time.sleep(0.01)
    server.url = f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}/v1"
    yield server
    # Requests that nobody waits for any more are not waited for here either.
    runner.should_exit = runner.force_exit = True
    thread.join(20)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop.models.client.client._FIRST_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    from torch import distributed

    from tuneloop.compat.deepspeed import import_deepspeed

    # The tests that do what a GPU does find it bound to the CPU, whichever runs first.
    deepspeed = import_deepspeed(use_gpu=False)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        # As Ray Train sets them in its workers.
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            patch.setenv(name, value)
        yield
    # DeepSpeed keeps groups of its own, which whoever trains next in this process must not find.
    running = deepspeed.comm if deepspeed.comm.is_initialized() else distributed
    running.destroy_process_group()
