"""The HTTP side: addresses, keys, bounds, errors in OpenAI's shape, and metrics.

Knows nothing of Ray: behind a name is whatever answers like `ModelServer`, so that the whole
protocol can be used and tested in one process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException

from tuneloop.serving.answers import event, model_card, model_list
from tuneloop.serving.asked import Route
from tuneloop.serving.keys import Holder, Keyring
from tuneloop.serving.parsing import unknown_model
from tuneloop.serving.protocol import (
    MAX_BODY_BYTES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    ProtocolError,
    TokenizeRequest,
)
from tuneloop.serving.requests import Activity
from tuneloop.serving.responses import (
    ResponsesRequest,
    parse_responses,
    response_events,
    response_of,
)

# Status and JSON, then, if the status is 200, server-sent events; those of an error may follow.
Stream = AsyncGenerator[tuple[int, dict[str, Any]] | str]
log = logging.getLogger("tuneloop.serving")

RETRY_AFTER_S = 1  # a slot is free after some steps of the engine
_STATE_TIMEOUT_S = 2.0
_CLIENT_GONE = 499  # nginx's word
_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_OPENAPI_REF = "#/components/schemas/{model}"


class Backend(Protocol):
    """What answers for the models that share their weights; see `replica.ModelServer`."""

    async def activity(self) -> Activity | None:
        """Return what the engine does and has done; None while the models load."""

    async def answer(
        self, route: Route, body: dict[str, Any], request_id: str
    ) -> tuple[int, dict[str, Any]]:
        """Return status and JSON for one request."""

    def stream(self, route: Route, body: dict[str, Any], request_id: str) -> Stream:
        """Yield status and JSON, then, if the status is 200, server-sent events."""


def build_api(models: Mapping[str, Backend], keys: Keyring | None = None) -> FastAPI:
    """Return the HTTP application.

    Args:
        models: What answers, by the name that requests call; several names may share one.
        keys: One of which clients have to send; without any: nothing.
    """
    api = FastAPI(title="tuneloop", version="1")
    side = _HttpSide(models, keys or Keyring({}))
    api.add_exception_handler(ProtocolError, _on_protocol_error)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(Exception, _on_failure)
    _add_open_routes(api, side)
    _add_routes(api, side)
    api.openapi = lambda: _openapi(api)  # type: ignore[method-assign]
    return api


class _HttpSide:
    """What the routes share."""

    def __init__(self, models: Mapping[str, Backend], keys: Keyring) -> None:
        self.models = models
        self.keys = keys
        self.created = int(time.time())
        self.metrics = _Metrics()

    async def authorize(
        self,
        request: Request,
        _: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        """Note whose key the request has; one without is refused where keys are asked for."""
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        request.state.holder = self.keys.holder(key.encode("latin-1"))

    def served(self, request: Request) -> list[str]:
        """Return the names that the request's key may ask."""
        holder: Holder = request.state.holder
        return holder.served(list(self.models))

    async def answer(self, route: Route, request: Request) -> Response:
        """Answer one request for a model."""
        return await self._ask(request, route, await _read_body(request))

    async def respond(self, request: Request) -> Response:
        """Answer one request of the Responses protocol, as a chat."""
        wanted = parse_responses(await _read_body(request))
        return await self._ask(request, "chat", wanted.chat_body(), wanted)

    async def _ask(
        self,
        request: Request,
        route: Route,
        body: dict[str, Any],
        wanted: ResponsesRequest | None = None,
    ) -> Response:
        """Return the answer to a body.

        Args:
            wanted: What of the Responses protocol the body was made of.
        """
        backend, asked = self._admit(request, route, body)
        try:
            if body.get("stream") is True and route in ("chat", "completions"):
                items = backend.stream(route, body, asked.request_id)
                status, answer = await _first(items)
                if status == 200:
                    events = _events(items, asked)
                    events = response_events(wanted, events) if wanted else events
                    return StreamingResponse(events, media_type="text/event-stream")
            else:
                status, answer = await backend.answer(route, body, asked.request_id)
            answer = response_of(wanted, answer) if wanted else answer
        except asyncio.CancelledError:
            asked.ended(_CLIENT_GONE)
            raise
        except Exception as error:
            asked.ended(error.status if isinstance(error, ProtocolError) else 500)
            raise
        asked.ended(status)
        return _json(answer, status)

    def _admit(
        self, request: Request, route: Route, body: dict[str, Any]
    ) -> tuple[Backend, _Asked]:
        """Return what answers a request.

        Raises:
            ProtocolError: The model is not there, or the key may not ask it, or not yet.
        """
        name = body.get("model")
        backend = self.models.get(name) if isinstance(name, str) else None
        if not isinstance(name, str) or backend is None:
            raise unknown_model(name, self.served(request))
        holder: Holder = request.state.holder
        asked = _Asked(self.metrics, name, route, request)
        try:
            holder.refuse_other(name, list(self.models))
            holder.count()
        except ProtocolError as error:
            asked.ended(error.status)
            raise
        return backend, asked

    async def activities(self) -> dict[str, Activity | BaseException | None]:
        """Return what each engine does, by the first of its names.

        None where it does not answer, an error where it cannot.
        """
        engines: dict[int, tuple[str, Backend]] = {}
        for name, backend in self.models.items():
            engines.setdefault(id(backend), (name, backend))

        async def ask(backend: Backend) -> Activity | None:
            try:
                return await asyncio.wait_for(backend.activity(), _STATE_TIMEOUT_S)
            except TimeoutError:
                return None

        answers = await asyncio.gather(
            *(ask(backend) for _, backend in engines.values()), return_exceptions=True
        )
        return {name: answer for (name, _), answer in zip(engines.values(), answers, strict=True)}


class _Metrics:
    """Counters of this process, in Prometheus' words."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tuneloop_requests", "Requests answered.", ["model", "route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "tuneloop_request_seconds", "From request to the end of its answer.",
            ["model", "route"], buckets=_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "tuneloop_time_to_first_token_seconds", "From request to the first text of a stream.",
            ["model"], buckets=_BUCKETS_S, registry=self.registry,
        )  # fmt: skip

    def text(self, activities: Mapping[str, object]) -> bytes:
        """Return all of them with those of the engines, which count for themselves."""
        engines = CollectorRegistry()
        for name in Activity.__dataclass_fields__:
            gauge = Gauge(
                f"tuneloop_engine_{name}", _ENGINE_METRICS[name], ["engine"], registry=engines
            )
            for engine, activity in activities.items():
                if isinstance(activity, Activity):
                    gauge.labels(engine).set(getattr(activity, name))
        return generate_latest(self.registry) + generate_latest(engines)


_ENGINE_METRICS = {
    "running": "Sequences in prefill or decode.",
    "waiting": "Requests that wait for a slot.",
    "prompt_tokens": "Prompt tokens since the start.",
    "generated_tokens": "Tokens written since the start.",
}


class _Asked:
    """One request, for log and metrics."""

    def __init__(self, metrics: _Metrics, model: str, route: Route, request: Request) -> None:
        self._metrics, self._model, self._route = metrics, model, route
        self.request_id = request.headers.get("x-request-id", "")[:200]
        self._holder = request.state.holder.name
        self._started = time.perf_counter()

    def wrote(self) -> None:
        """Note that the first text is on its way."""
        seconds = time.perf_counter() - self._started
        self._metrics.first_token.labels(self._model).observe(seconds)

    def ended(self, status: int) -> None:
        """Note how it ended."""
        seconds = time.perf_counter() - self._started
        self._metrics.requests.labels(self._model, self._route, str(status)).inc()
        self._metrics.seconds.labels(self._model, self._route).observe(seconds)
        level = logging.WARNING if status >= 500 else logging.INFO
        log.log(
            level, "request %r%s: %s of %s answered %d in %.3f s",
            self.request_id, f" of {self._holder}" * bool(self._holder),
            self._route, self._model, status, seconds,
        )  # fmt: skip


async def _first(items: Stream) -> tuple[int, dict[str, Any]]:
    first = await anext(items)
    assert not isinstance(first, str)
    return first


async def _events(items: Stream, asked: _Asked) -> AsyncGenerator[str]:
    """Pass events on; one that breaks off ends with an error event."""
    status, num_events = 200, 0
    try:
        async for item in items:
            if not isinstance(item, str):
                status, body = item
                yield event(body)
                continue
            num_events += 1
            if num_events == 2:  # the first opens the answer
                asked.wrote()
            yield item
    except ProtocolError as error:
        status = error.status
        yield event(error.body())
    except (GeneratorExit, asyncio.CancelledError):
        status = _CLIENT_GONE
        raise
    finally:
        await items.aclose()
        asked.ended(status)


async def _read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request.

    Raises:
        ProtocolError: It is too large, or not a JSON object.
    """
    too_large = ProtocolError(
        413, f"the body has more than {MAX_BODY_BYTES} bytes", code="request_too_large"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 15 or int(declared) > MAX_BODY_BYTES):
        raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise too_large
    try:
        # Stricter than the standard library's: no deep nesting, no half surrogates, no NaN.
        body = from_json(bytes(data), allow_inf_nan=False)
    except ValueError as error:
        raise ProtocolError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError(400, "the body is not a JSON object")
    return body


def _json(content: dict[str, Any], status: int = 200, retry_after_s: int | None = None) -> Response:
    wait_s = retry_after_s or RETRY_AFTER_S
    headers = {"Retry-After": str(wait_s)} if status in (429, 503) else None
    data = to_json(content, inf_nan_mode="null")
    return Response(data, status, headers, media_type="application/json")


async def _on_protocol_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProtocolError)
    return _json(error.body(), error.status, error.retry_after_s)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path[:200]} here"
    answer = _json(ProtocolError(error.status_code, message).body(), error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _on_failure(request: Request, error: Exception) -> Response:
    return _json(ProtocolError(500, f"{type(error).__name__}: {error}").body(), 500)


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is wrong."},
    401: {"model": ErrorBody, "description": "The key is missing or wrong."},
    403: {"model": ErrorBody, "description": "The key may not ask this model."},
    404: {"model": ErrorBody, "description": "The model is not served here."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    429: {"model": ErrorBody, "description": "Too many requests wait; see Retry-After."},
    500: {"model": ErrorBody, "description": "The model failed."},
}


def _add_open_routes(api: FastAPI, side: _HttpSide) -> None:
    """Add the addresses that need no key."""

    @api.get("/health")
    async def health() -> dict[str, str]:
        """Whether the address answers."""
        return {"status": "ok"}

    @api.get("/ready", responses={503: {"model": ErrorBody}})
    async def ready() -> Response:
        """Whether every model is loaded."""
        activities = await side.activities()
        for error in activities.values():
            if isinstance(error, BaseException):
                raise ProtocolError(503, str(error), code="model_not_loaded") from error
        loading = [name for name, activity in activities.items() if activity is None]
        if loading:
            message = f"still loading: {', '.join(loading)}"
            raise ProtocolError(503, message, code="model_not_loaded")
        return JSONResponse({"status": "ready"})


def _add_routes(api: FastAPI, side: _HttpSide) -> None:
    """Add the addresses that need the key, if there is one."""
    keyed = [Depends(side.authorize)]
    refused: dict[int | str, dict[str, Any]] = {401: _ERRORS[401]}
    post = partial(api.post, dependencies=keyed, responses=_ERRORS)

    @api.get("/v1/models", dependencies=keyed, responses=refused)
    async def models(request: Request) -> JSONResponse:
        """The models that the key may ask."""
        return JSONResponse(model_list(side.served(request), side.created))

    @api.get("/v1/models/{name:path}", dependencies=keyed, responses=refused | {404: _ERRORS[404]})
    async def model(name: str, request: Request) -> JSONResponse:
        """One model."""
        served = side.served(request)
        if name not in served:
            raise unknown_model(name, served)
        return JSONResponse(model_card(name, side.created))

    @api.get("/metrics", dependencies=keyed, responses=refused, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        text = side.metrics.text(await side.activities())
        return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """The answer to a conversation, whole or as server-sent events."""
        return await side.answer("chat", request)

    @post("/v1/responses", openapi_extra=_body_of(ResponsesRequest))
    async def responses(request: Request) -> Response:
        """The answer to a conversation in OpenAI's newer protocol; nothing is stored."""
        return await side.respond(request)

    @post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """How texts or token ids go on, whole or as server-sent events."""
        return await side.answer("completions", request)

    @post("/tokenize", openapi_extra=_body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text, or of a conversation as the model reads it."""
        return await side.answer("tokenize", request)

    @post("/detokenize", openapi_extra=_body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, without special tokens."""
        return await side.answer("detokenize", request)


# Bodies are validated where the model is, once; here they are only described.
_BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest,
    ResponsesRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


def _body_of(kind: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _OPENAPI_REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _openapi(api: FastAPI) -> dict[str, Any]:
    if not api.openapi_schema:
        schema = get_openapi(title=api.title, version=api.version, routes=api.routes)
        _, bodies = models_json_schema(
            [(kind, "validation") for kind in _BODIES], ref_template=_OPENAPI_REF
        )
        schemas = schema["components"]["schemas"]
        schemas |= bodies["$defs"]
        # FastAPI's word for what is answered with 400 or 404 here.
        for operation in (o for path in schema["paths"].values() for o in path.values()):
            operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        api.openapi_schema = schema
    return api.openapi_schema
