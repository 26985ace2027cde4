"""What a replica does for the models that share its weights: protocol in, engine, protocol out.

Knows nothing of Ray or HTTP, so it can be used and tested without them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from tuneloop.config import EngineName, VllmConfig
from tuneloop.errors import UserError
from tuneloop.models.chat.calls import Written
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.serving.answers import (
    Chunks,
    Said,
    ScoredToken,
    TextOffsets,
    TextPrompt,
    chat_logprobs,
    chat_response,
    completion_logprobs,
    completion_response,
    prompt_logprobs,
    tool_call,
)
from tuneloop.serving.asked import Asked, Route, detokenize, read_request, tokenize
from tuneloop.serving.loaded import LONG_TEXT_BYTES, LoadedModel, ServedModel, load
from tuneloop.serving.parsing import parse_detokenize, parse_tokenize
from tuneloop.serving.protocol import ChatRequest, CompletionRequest, ProtocolError
from tuneloop.serving.requests import (
    Activity,
    DecodeRequest,
    DecodeResult,
    InvalidRequest,
    QueueFull,
    TokenScore,
)
from tuneloop.serving.text import StreamedText

log = logging.getLogger("tuneloop.serving")

# Longer answers, too, are written down in another thread.
_LONG_ANSWER_TOKENS = 512
_QUEUE_WAIT_S = 0.05


class ModelServer:
    """Models with the same weights: their renderers and one engine, loaded in the background.

    Args:
        models: By the name requests call them; `path` is the same for all.
        max_batch_size: Sequences decoded together, whichever model they ask for.
        engine: What decodes; for vLLM, how it is run.
        waits: Return when the models are loaded. Raises ModelError then.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        max_batch_size: int,
        engine: EngineName | VllmConfig = "auto",
        waits: bool = False,
    ) -> None:
        self._loading: Future[dict[str, LoadedModel]] = ThreadPoolExecutor(1).submit(
            load, models, max_batch_size, engine
        )
        if waits:
            self._loading.result()

    def __del__(self) -> None:
        """End the engine; Ray Serve calls this when a replica ends."""
        if self._loading.done() and self._loading.exception() is None:
            next(iter(self._loading.result().values())).engine.close()

    def check_health(self) -> None:
        """Return if requests can be answered, or will be; Ray Serve replaces a replica else.

        Raises:
            TuneloopError: The engine has ended.
        """
        if self._loading.done() and self._loading.exception() is None:
            next(iter(self._loading.result().values())).engine.refuse_dead()

    async def ready(self) -> str:
        """Return when the models are loaded, with what is to be told of them; mostly nothing.

        Raises:
            ModelError: One of them cannot be loaded.
        """
        loaded = await asyncio.wrap_future(self._loading)
        return next(model.engine.notice for model in loaded.values())

    async def activity(self) -> Activity | None:
        """Return what the engine does and has done; None while the models load.

        Raises:
            ModelError: A model cannot be loaded.
        """
        if not self._loading.done():
            return None
        return next(iter(self._loading.result().values())).engine.activity()

    async def answer(
        self, route: Route, body: dict[str, Any], request_id: str = ""
    ) -> tuple[int, dict[str, Any]]:
        """Return status and JSON for one request.

        Args:
            request_id: What the log calls the request.
        """
        try:
            model = (await asyncio.wrap_future(self._loading))[body["model"]]
            if route == "tokenize":
                return 200, await tokenize(parse_tokenize(body), model)
            if route == "detokenize":
                return 200, await detokenize(parse_detokenize(body), model)
            asked = await read_request(route, body, model)
            generations = _Generations(model, asked.decoding)
            try:
                results = await asyncio.gather(*generations.tasks)
            finally:
                generations.cancel()
            # With log-probabilities an answer takes a while to write down, too.
            size = sum(len(r.token_ids) + len(r.prompt_scores or ()) for r in results)
            is_long = size > _LONG_ANSWER_TOKENS
            return 200, await model.read(
                LONG_TEXT_BYTES if is_long else 0, partial(_answer, asked, results)
            )
        except Exception as error:
            failure = _failure(error, route, body, request_id)
            return failure.status, failure.body()

    async def stream(
        self, route: Route, body: dict[str, Any], request_id: str = ""
    ) -> AsyncGenerator[tuple[int, dict[str, Any]] | str]:
        """Yield status and JSON, then, if the status is 200, server-sent events.

        Where the answer breaks off, status and JSON of the error are the last.
        """
        generations = None
        try:
            model = (await asyncio.wrap_future(self._loading))[body["model"]]
            asked = await read_request(route, body, model)
            prompt_scores = await _streamed_prompt_scores(asked)
            news: asyncio.Queue[_News] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def listener(index: int) -> Callable[[int, TokenScore | None], None]:
                def tell(token_id: int, score: TokenScore | None) -> None:
                    token = ScoredToken(token_id, score)
                    loop.call_soon_threadsafe(news.put_nowait, _News(index, token))

                return tell

            decoding = asked.decoding
            if prompt_scores:
                decoding = [replace(r, score_prompt=not r.params.max_tokens) for r in decoding]
            generations = _Generations(
                model, [replace(r, on_token=listener(i)) for i, r in enumerate(decoding)]
            )
            for index, task in enumerate(generations.tasks):
                task.add_done_callback(partial(_tell_end, news, _News(index)))
            yield 200, {}
            async for item in _events(asked, generations, news, prompt_scores):
                yield item
        except Exception as error:
            failure = _failure(error, route, body, request_id)
            yield failure.status, failure.body()
        finally:
            # Closed early: the caller has gone.
            if generations is not None:
                generations.cancel()


async def _streamed_prompt_scores(asked: Asked) -> list[Sequence[TokenScore]]:
    """Return the scores of each prompt of a stream that echoes them; mostly nothing.

    They stand in the stream before the answer, so the prompt is read for them first.
    """
    request = asked.request
    if request.logprobs is None or not any(one.score_prompt for one in asked.decoding):
        return []
    scoring = [
        replace(one, params=replace(one.params, max_tokens=0), constraint=None)
        for one in asked.decoding[:: request.num_choices]
    ]
    generations = _Generations(asked.model, scoring)
    try:
        results = await asyncio.gather(*generations.tasks)
    finally:
        generations.cancel()
    return [result.prompt_scores or [] for result in results]


class _News(NamedTuple):
    """A token of one choice, or None: the choice has ended."""

    choice: int
    token: ScoredToken | None = None


def _tell_end(news: asyncio.Queue[_News], ended: _News, _: asyncio.Task[DecodeResult]) -> None:
    news.put_nowait(ended)


class _Generations:
    """The generations of one HTTP request: in the engine at most a batch of them at a time.

    So a request of 2,000 prompts is answered, and leaves room in the queue for others.

    Raises:
        InvalidRequest: One of them can never be answered.
        QueueFull: The engine does not take the first.
    """

    def __init__(self, model: LoadedModel, requests: Sequence[DecodeRequest]) -> None:
        for request in requests:
            model.engine.check(request)
        self._engine = model.engine
        self._turns = asyncio.Semaphore(model.engine.max_batch_size)
        self._first = model.engine.submit(requests[0])
        self.tasks = [
            asyncio.create_task(self._generate(request, None if index else self._first))
            for index, request in enumerate(requests)
        ]

    async def _generate(
        self, request: DecodeRequest, future: Future[DecodeResult] | None
    ) -> DecodeResult:
        async with self._turns:
            while future is None:
                try:
                    future = self._engine.submit(request)
                except QueueFull:
                    await asyncio.sleep(_QUEUE_WAIT_S)
            return await asyncio.wrap_future(future)

    def cancel(self) -> None:
        """Drop what has not ended."""
        for task in self.tasks:
            task.cancel()
        self._first.cancel()  # its task may not have begun to wait for it


class _Choice:
    """What of one choice has been written and not yet sent."""

    def __init__(self, asked: Asked, decoding: DecodeRequest) -> None:
        self._asked = asked
        self._decode = decoding.decode or asked.model.renderer.decode
        self._request, self._renderer = asked.request, asked.model.renderer
        unsettled = self._renderer.unsettled_ids
        self._text = StreamedText(self._decode, asked.request.stop_strings, unsettled)
        self._reader = asked.call_reader()
        self.calls: list[dict[str, Any]] = []
        self._tokens: list[ScoredToken] = []
        self._offsets = TextOffsets(self._renderer, self._decode)
        self._wants_logprobs = decoding.params.logprobs

    def push(self, token: ScoredToken) -> Said:
        """Return what can be sent after this token."""
        if self._wants_logprobs:
            self._tokens.append(token)
        text = self._text.push(token.token_id)
        return self._said(Written(text, ()) if self._reader is None else self._reader.push(text))

    def echo(
        self, prompt: TextPrompt, scores: Sequence[TokenScore], renderer: Renderer
    ) -> dict[str, Any]:
        """Return the log-probabilities of the prompt's tokens."""
        assert isinstance(self._request, CompletionRequest)
        self._offsets = TextOffsets(self._renderer, self._decode, len(prompt.text))
        return prompt_logprobs(prompt, scores, self._request.logprobs or 0, renderer)

    def finish(self, result: DecodeResult) -> Said:
        """Return what is left to send of the whole answer."""
        text = self._text.finish(result.text)
        return self._said(Written(text, ()) if self._reader is None else self._reader.finish(text))

    def _said(self, written: Written) -> Said:
        syntax = self._asked.model.syntax
        calls = [tool_call(call, syntax.new_id()) for call in written.calls]
        self.calls += calls
        return Said(written.content, calls)

    def logprobs(self) -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens since the last call, if any are to be sent."""
        tokens, self._tokens = self._tokens, []
        if not tokens:
            return None
        if isinstance(self._request, ChatRequest):
            return chat_logprobs(tokens, self._renderer)
        num_top = self._request.logprobs or 0
        return completion_logprobs(tokens, num_top, self._renderer, self._offsets)


async def _events(
    asked: Asked,
    generations: _Generations,
    news: asyncio.Queue[_News],
    prompt_scores: Sequence[Sequence[TokenScore]],
) -> AsyncIterator[str]:
    """Yield the events of a streamed answer.

    Args:
        prompt_scores: Those of each prompt that is echoed with its log-probabilities.
    """
    chunks = Chunks(asked.request)
    choices = [_Choice(asked, decoding) for decoding in asked.decoding]
    echoes = isinstance(asked.request, CompletionRequest) and asked.request.echo
    unopened, num_open = set(range(len(choices))), len(choices)
    while num_open:
        index, token = await news.get()
        choice = choices[index]
        # Not before there is something to tell: the second event of all is the first text.
        if index in unopened:
            unopened.remove(index)
            yield chunks.first(index)
            number = index // asked.request.num_choices
            prompt, logprobs = asked.prompts[number], None
            if prompt_scores:
                is_long = len(prompt.token_ids) > _LONG_ANSWER_TOKENS
                write = partial(choice.echo, prompt, prompt_scores[number])
                logprobs = await asked.model.read(LONG_TEXT_BYTES if is_long else 0, write)
            if echoes:
                yield chunks.text(prompt.text, index, logprobs)
        if token is not None:
            for item in _told(chunks, index, choice, choice.push(token)):
                yield item
            continue
        num_open -= 1
        result = generations.tasks[index].result()
        for item in _told(chunks, index, choice, choice.finish(result)):
            yield item
        if logprobs := choice.logprobs():
            yield chunks.text("", index, logprobs)
        yield chunks.end(Said("", choice.calls).finish_reason(result), index)
    for item in chunks.last([task.result() for task in generations.tasks]):
        yield item


def _told(chunks: Chunks, index: int, choice: _Choice, said: Said) -> Iterator[str]:
    """Yield the events of what can be sent of a choice."""
    if said.content:
        yield chunks.text(said.content, index, choice.logprobs())
    first = len(choice.calls) - len(said.tool_calls)
    for number, call in enumerate(said.tool_calls, first):
        yield chunks.call(call, number, index)


def _answer(asked: Asked, results: Sequence[DecodeResult], renderer: Renderer) -> dict[str, Any]:
    if isinstance(asked.request, ChatRequest):
        said = [asked.said(result) for result in results]
        return chat_response(asked.request, asked.prompts[0].token_ids, results, said, renderer)
    return completion_response(asked.request, asked.prompts, results, renderer)


def _failure(
    error: Exception, route: Route, body: Mapping[str, Any], request_id: str
) -> ProtocolError:
    """Return the error that the client gets."""
    if isinstance(error, ProtocolError):
        return error
    # Where the prompt stands.
    is_chat = route == "chat" or body.get("messages") is not None
    field = "messages" if is_chat else "tokens" if route == "detokenize" else "prompt"
    if isinstance(error, RenderError):
        field = "tools" if error.is_of_tools else field
        return ProtocolError(400, str(error), field, "invalid_messages")
    if isinstance(error, InvalidRequest):
        return ProtocolError(400, str(error), error.param or field, error.code)
    if isinstance(error, QueueFull):
        message = f"{error}; try again later"
        return ProtocolError(429, message, code="rate_limit_exceeded")
    if isinstance(error, UserError):
        return ProtocolError(500, str(error), code="model_not_loaded")
    log.error("request %r failed", request_id, exc_info=error)
    return ProtocolError(500, f"{type(error).__name__}: {error}")
