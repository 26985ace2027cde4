"""What a replica does for the models that share its weights: protocol in, engine, protocol out.

Knows nothing of Ray or HTTP, so it can be used and tested without them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneloop.errors import ModelError, Problem, UserError
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.models.export.layout import ADAPTER, recorded_renderer
from tuneloop.serving import protocol
from tuneloop.serving.protocol import ChatRequest, CompletionRequest, ProtocolError
from tuneloop.serving.requests import DecodeRequest, DecodeResult, InvalidRequest, QueueFull
from tuneloop.serving.text import StreamedText

if TYPE_CHECKING:
    from tuneloop.serving.engine import Engine

log = logging.getLogger("tuneloop.serving")

Route = Literal["chat", "completions"]


@dataclass(frozen=True)
class ServedModel:
    """A model to serve.

    Args:
        path: Hugging Face directory with the weights.
        chat_template: As in `model.chat_template`.
        adapter: A model artifact's directory, whose `adapter/` is put on the weights and whose
            tokenizer and template are used. None: the weights as they are.
    """

    path: Path
    chat_template: str = "auto"
    adapter: Path | None = None

    @property
    def folder(self) -> Path:
        """Where tokenizer and template are."""
        return self.adapter or self.path


@dataclass(frozen=True)
class _Loaded:
    """One name's renderer, and the engine it shares with the others."""

    renderer: Renderer
    engine: Engine
    adapter: str

    def submit(self, request: DecodeRequest) -> Future[DecodeResult]:
        """Queue a request for this model."""
        stop_ids = frozenset(self.renderer.stop_ids)
        return self.engine.submit(replace(request, adapter=self.adapter, stop_ids=stop_ids))


class ModelServer:
    """Models with the same weights: their renderers and one engine, loaded in the background.

    Args:
        models: By the name requests call them; `path` is the same for all.
        max_batch_size: Sequences decoded together, whichever model they ask for.
    """

    def __init__(self, models: Mapping[str, ServedModel], max_batch_size: int) -> None:
        self._loading: Future[dict[str, _Loaded]] = ThreadPoolExecutor(1).submit(
            _load, models, max_batch_size
        )

    async def ready(self) -> str:
        """Return when the models are loaded, with what is to be told of them; mostly nothing.

        Raises:
            ModelError: One of them cannot be loaded.
        """
        loaded = await asyncio.wrap_future(self._loading)
        return next(model.engine.notice for model in loaded.values())

    async def answer(self, route: Route, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and JSON for one request."""
        try:
            model = (await asyncio.wrap_future(self._loading))[body["model"]]
            renderer = model.renderer
            if route == "chat":
                chat = protocol.parse_chat(body)
                asked = _chat(chat, model)
                [result] = await _decode(model, [asked])
                return 200, protocol.chat_response(chat, asked.prompt_ids, result, renderer)
            completion = protocol.parse_completion(body)
            texts, requests = _completions(completion, renderer)
            results = await _decode(model, requests)
            ids = [request.prompt_ids for request in requests]
            prompts = list(map(protocol.TextPrompt, texts, ids))
            return 200, protocol.completion_response(completion, prompts, results, renderer)
        except Exception as error:
            failure = _failure(error, route)
            return failure.status, failure.body()

    async def stream(
        self, route: Route, body: dict[str, Any]
    ) -> AsyncIterator[tuple[int, dict[str, Any]] | str]:
        """Yield status and JSON, then, if the status is 200, server-sent events."""
        started, future = False, None
        try:
            model = (await asyncio.wrap_future(self._loading))[body["model"]]
            request: ChatRequest | CompletionRequest
            if route == "chat":
                request = protocol.parse_chat(body)
                asked = _chat(request, model)
            else:
                request = protocol.parse_completion(body)
                [asked] = _completions(request, model.renderer)[1]
            loop = asyncio.get_running_loop()
            tokens: asyncio.Queue[int | None] = asyncio.Queue()

            def send(token: int | None) -> None:
                loop.call_soon_threadsafe(tokens.put_nowait, token)

            future = model.submit(replace(asked, on_token=send))
            future.add_done_callback(lambda _: send(None))
            started = True
            yield 200, {}
            chunks = protocol.Chunks(request)
            text = StreamedText(model.renderer, request.stop_strings)
            yield chunks.first()
            while (token := await tokens.get()) is not None:
                delta = text.push(token)
                if delta:
                    yield chunks.text(delta)
            result = future.result()
            rest = text.finish(result.text)
            if rest:
                yield chunks.text(rest)
            for item in chunks.last(result):
                yield item
        except Exception as error:
            failure = _failure(error, route)
            if started:
                yield protocol.event(failure.body())
            else:
                yield failure.status, failure.body()
        finally:
            # Closed early: the caller has gone.
            if future is not None:
                future.cancel()


def _load(models: Mapping[str, ServedModel], max_batch_size: int) -> dict[str, _Loaded]:
    # The replica alone needs PyTorch; who only describes it, or passes requests on, does not.
    from transformers.utils import logging as transformers_logging

    from tuneloop.serving.engine import Engine

    transformers_logging.disable_progress_bar()
    renderers = {name: _load_renderer(model) for name, model in models.items()}
    first = next(iter(models))
    engine = Engine.load(
        models[first].path,
        # The same weights have the same tokenizer; templates, and so stop tokens, may differ.
        decode=renderers[first].decode,
        stop_ids=renderers[first].stop_ids,
        max_batch_size=max_batch_size,
        adapters={n: m.adapter / ADAPTER for n, m in models.items() if m.adapter is not None},
    )
    return {
        name: _Loaded(renderers[name], engine, name if model.adapter else "")
        for name, model in models.items()
    }


def _load_renderer(model: ServedModel) -> Renderer:
    """Return a model's renderer; one that renders otherwise than in training is refused."""
    renderer = Renderer.load(model.folder, model.chat_template)
    recorded = recorded_renderer(model.folder)
    if model.chat_template == "auto" and recorded not in (None, renderer.hash):
        raise ModelError(
            Problem(
                "the model's tokenizer or template renders otherwise than when it was trained",
                where=str(model.folder),
                got=renderer.hash,
                allowed=str(recorded),
                remedy="put back the directory's own files, or train again",
            )
        )
    return renderer


def _chat(request: ChatRequest, model: _Loaded) -> DecodeRequest:
    ids = model.renderer.prompt_ids(request.conversation(), request.tools or ())
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is None:
        # OpenAI's default is no bound; the model's positions are one.
        max_tokens = max(1, model.engine.max_length - len(ids))
    params = request.params(max_tokens, logprobs=bool(request.logprobs))
    return DecodeRequest(ids, params, num_top=request.top_logprobs or 0)


def _completions(
    request: CompletionRequest, renderer: Renderer
) -> tuple[list[str], list[DecodeRequest]]:
    """Return each prompt's text and what to ask the engine for it."""
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = protocol.DEFAULT_COMPLETION_TOKENS
    texts, requests = [], []
    for prompt in request.prompts():
        if isinstance(prompt, str):
            text, ids = prompt, renderer.text_ids(prompt)
        else:
            text, ids = renderer.decode(prompt) if request.echo else "", prompt
        texts.append(text)
        params = request.params(max_tokens, logprobs=request.logprobs is not None)
        scored = bool(request.echo) and (request.logprobs is not None or max_tokens == 0)
        requests.append(DecodeRequest(ids, params, request.logprobs or 0, scored))
    return texts, requests


async def _decode(model: _Loaded, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
    """Return all results; if one fails or the caller goes away, the others are dropped."""
    futures: list[Future[DecodeResult]] = []
    try:
        for request in requests:
            futures.append(model.submit(request))
        return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
    finally:
        for future in futures:
            future.cancel()


def _failure(error: Exception, route: Route) -> ProtocolError:
    """Return the error that the client gets."""
    field = "messages" if route == "chat" else "prompt"
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, RenderError):
        return ProtocolError(400, str(error), field, "invalid_messages")
    if isinstance(error, InvalidRequest):
        return ProtocolError(400, str(error), field, error.code)
    if isinstance(error, QueueFull):
        return ProtocolError(503, str(error), code="queue_full")
    if isinstance(error, UserError):
        return ProtocolError(500, str(error), code="model_not_loaded")
    log.error("a request failed", exc_info=error)
    return ProtocolError(500, f"{type(error).__name__}: {error}")
