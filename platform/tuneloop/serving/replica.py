"""What a replica does for the models that share its weights: protocol in, engine, protocol out.

Knows nothing of Ray or HTTP, so it can be used and tested without them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from tuneloop.config import EngineName, VllmConfig
from tuneloop.errors import ModelError, UserError
from tuneloop.models.chat.calls import CallReader, CallSyntax, Written
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.models.chat.tool_results import results_in_order
from tuneloop.models.export.layout import ADAPTER, recorded_renderer
from tuneloop.records import Message, Sample, SamplingParams
from tuneloop.serving import protocol
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
    event,
    tool_call,
)
from tuneloop.serving.openvino import environment as openvino
from tuneloop.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ProtocolError,
    TokenizeRequest,
)
from tuneloop.serving.ranking import AnswerTree
from tuneloop.serving.requests import (
    Activity,
    AnswerForm,
    DecodeRequest,
    DecodeResult,
    InvalidRequest,
    QueueFull,
    Ranking,
    TokenScore,
)
from tuneloop.serving.text import Decode, StreamedText

if TYPE_CHECKING:
    from tuneloop.serving.constraint import Constraint, Constraints
    from tuneloop.serving.engine import Engine
    from tuneloop.serving.requests import DecodeEngine

log = logging.getLogger("tuneloop.serving")

Route = Literal["chat", "completions", "tokenize", "detokenize"]
Result = TypeVar("Result")

# Texts and answers that take longer than some milliseconds are dealt with in another thread.
_LONG_TEXT_BYTES = 8192
_LONG_ANSWER_TOKENS = 512
_MANY_MESSAGES = 32
_READ_AT_ONCE = 16  # short prompts of one request, before others have a turn
_MIN_TEXT_LIMIT_BYTES = 2**16
_QUEUE_WAIT_S = 0.05
_NUM_TREES = 16
_SEED_STEP = 0x9E3779B97F4A7C15  # odd: no two of 2**63 choices share a seed


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
    """One name's renderer, and the engine it shares with the others.

    Args:
        reader: Reads long texts in a thread of its own, with a tokenizer of its own: neither may
            one wait for it that is used meanwhile.
        constraints: Compiles the forms of answers; None where the tokenizer is of no kind that
            this is known for.
        compiler: Does so in a thread of its own.
    """

    model: ServedModel
    renderer: Renderer
    engine: DecodeEngine
    adapter: str
    reader: ThreadPoolExecutor
    constraints: Constraints | None
    compiler: ThreadPoolExecutor

    def decode_request(
        self, request: ChatRequest | CompletionRequest, params: SamplingParams
    ) -> DecodeRequest:
        """Return what to ask the engine for, but for the prompt."""
        stop_ids = frozenset([*self.renderer.stop_ids, *(request.stop_token_ids or ())])
        return DecodeRequest(
            (), params, adapter=self.adapter, stop_ids=stop_ids, shaping=request.shaping()
        )

    @cached_property
    def second_renderer(self) -> Renderer:
        """The same renderer, for the reader's thread alone."""
        return _load_renderer(self.model)

    @cached_property
    def syntax(self) -> CallSyntax:
        """How the model's template writes tool calls."""
        return CallSyntax.of(self.renderer)

    @cached_property
    def decode_calls(self) -> Decode:
        """Ids to text with the special tokens that calls are written with."""
        kept = self.syntax.special_ids(self.renderer)
        return partial(self.renderer.decode_with, kept) if kept else self.renderer.decode

    @cached_property
    def max_text_bytes(self) -> int:
        """More bytes than a prompt of the model's length can have."""
        longest = max(len(name.encode()) for name in self.renderer.tokenizer.get_vocab())
        return max(_MIN_TEXT_LIMIT_BYTES, self.engine.max_length * longest)

    async def read(self, num_bytes: int, read: Callable[[Renderer], Result]) -> Result:
        """Return what a function makes of a text of so many bytes, without holding up others.

        Raises:
            InvalidRequest: No prompt of the model can be that long.
        """
        if num_bytes > self.max_text_bytes:
            raise InvalidRequest(
                f"the prompt has {num_bytes} bytes; the {self.engine.max_length} positions of the "
                f"model hold at most {self.max_text_bytes}",
                code="context_length_exceeded",
            )
        if num_bytes < _LONG_TEXT_BYTES:
            return read(self.renderer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.reader, lambda: read(self.second_renderer))

    async def constraint(self, form: AnswerForm) -> Constraint:
        """Return a form, compiled without holding up others.

        Raises:
            InvalidRequest: No answer can have the form.
        """
        if self.constraints is None:
            raise InvalidRequest("the model's tokenizer knows no forms", param=form.param)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.compiler, self.constraints.compile, form)

    async def ranking(self, request: ChatRequest, prompt_ids: Sequence[int]) -> Ranking | None:
        """Return the answers to choose from, if the request has some.

        Raises:
            RenderError: The template does not take one of the answers.
            InvalidRequest: Two of them have the same tokens.
        """
        if request.ranking is None:
            return None
        answers, tools = tuple(request.ranking.answers), request.offered_tools
        loop = asyncio.get_running_loop()
        tree = await loop.run_in_executor(self.reader, self._usual_tree, answers)
        # An answer has the same tokens behind every question, but for unusual templates.
        messages = [*request.conversation(), Message("assistant", answers[0])]
        settings = _template_settings(request, self.renderer)

        def render(renderer: Renderer) -> Sample:
            return renderer.with_settings(settings).sample(messages, tools)

        sample = await self.read(4 * len(prompt_ids), render)
        if sample.input_ids != [*prompt_ids, *tree.answers[0]]:
            make = partial(self._tree, answers, request.conversation(), tools, settings)
            tree = await loop.run_in_executor(self.reader, make)
        return Ranking(tree, request.ranking.coverage)

    @cached_property
    def _usual_tree(self) -> Callable[[tuple[str, ...]], AnswerTree]:
        question = [Message("user", "a")]
        return lru_cache(_NUM_TREES)(lambda answers: self._tree(answers, question, (), {}))

    def _tree(
        self,
        answers: Sequence[str],
        messages: Sequence[Message],
        tools: Sequence[Any],
        settings: Mapping[str, Any],
    ) -> AnswerTree:
        renderer = self.second_renderer.with_settings(settings)
        start = len(renderer.prompt_ids(messages, tools))
        turns = [[*messages, Message("assistant", text)] for text in answers]
        ids = [tuple(renderer.sample(one, tools).input_ids[start:]) for one in turns]
        first: dict[tuple[int, ...], str] = {}
        for text, one in zip(answers, ids, strict=True):
            if one in first:
                same = f"{first[one][:100]!r} and {text[:100]!r}"
                raise InvalidRequest(f"{same} are the same tokens", param="ranking")
            first[one] = text
        return AnswerTree(ids)


@dataclass(frozen=True)
class _Asked:
    """An HTTP request that has been read.

    Args:
        prompts: Each prompt, once.
        decoding: What the engine is asked for: each prompt as often as there are choices.
    """

    model: _Loaded
    request: ChatRequest | CompletionRequest
    prompts: list[TextPrompt]
    decoding: list[DecodeRequest]

    @property
    def decode(self) -> Decode:
        """Ids to the text in which content and calls are told apart."""
        request, model = self.request, self.model
        may_call = isinstance(request, ChatRequest) and request.may_call
        return model.decode_calls if may_call else model.renderer.decode

    def text(self, result: DecodeResult) -> str:
        """Return the text of an answer up to a stop string."""
        if self.decode == self.model.renderer.decode:
            return result.text
        text = self.decode(result.token_ids)
        ends = [text.find(stop) for stop in self.request.stop_strings if stop in text]
        return text[: min(ends, default=len(text))]

    def call_reader(self) -> CallReader | None:
        """Return what tells an answer's calls from its content, where it may have some."""
        request = self.request
        if not isinstance(request, ChatRequest) or not request.may_call:
            return None
        most = 1 if request.parallel_tool_calls is False else None
        return CallReader(self.model.syntax, request.offered_tools, most)

    def said(self, result: DecodeResult) -> Said:
        """Return what an answer says."""
        reader = self.call_reader()
        if reader is None:
            return Said(result.text)
        content, calls = reader.finish(self.text(result))
        return Said(content, [tool_call(one, self.model.syntax.new_id()) for one in calls])


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
        self._loading: Future[dict[str, _Loaded]] = ThreadPoolExecutor(1).submit(
            _load, models, max_batch_size, engine
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
                return 200, await _tokenize(protocol.parse_tokenize(body), model)
            if route == "detokenize":
                return 200, await _detokenize(protocol.parse_detokenize(body), model)
            asked = await _read(route, body, model)
            generations = _Generations(model, asked.decoding)
            try:
                results = await asyncio.gather(*generations.tasks)
            finally:
                generations.cancel()
            # With log-probabilities an answer takes a while to write down, too.
            size = sum(len(r.token_ids) + len(r.prompt_scores or ()) for r in results)
            is_long = size > _LONG_ANSWER_TOKENS
            return 200, await model.read(
                _LONG_TEXT_BYTES if is_long else 0, partial(_answer, asked, results)
            )
        except Exception as error:
            failure = _failure(error, route, body, request_id)
            return failure.status, failure.body()

    async def stream(
        self, route: Route, body: dict[str, Any], request_id: str = ""
    ) -> AsyncGenerator[tuple[int, dict[str, Any]] | str]:
        """Yield status and JSON, then, if the status is 200, server-sent events."""
        started, generations = False, None
        try:
            model = (await asyncio.wrap_future(self._loading))[body["model"]]
            asked = await _read(route, body, model)
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
            started = True
            yield 200, {}
            async for item in _events(asked, generations, news, prompt_scores):
                yield item
        except Exception as error:
            failure = _failure(error, route, body, request_id)
            if started:
                yield event(failure.body())
            else:
                yield failure.status, failure.body()
        finally:
            # Closed early: the caller has gone.
            if generations is not None:
                generations.cancel()


async def _streamed_prompt_scores(asked: _Asked) -> list[Sequence[TokenScore]]:
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

    def __init__(self, model: _Loaded, requests: Sequence[DecodeRequest]) -> None:
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

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked
        self._request, self._renderer = asked.request, asked.model.renderer
        self._text = StreamedText(asked.decode, asked.request.stop_strings)
        self._reader = asked.call_reader()
        self.calls: list[dict[str, Any]] = []
        self._tokens: list[ScoredToken] = []
        self._offsets = TextOffsets(self._renderer)
        self._wants_logprobs = asked.decoding[0].params.logprobs

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
        self._offsets = TextOffsets(renderer)
        tokens = list(map(ScoredToken, prompt.token_ids, [None, *scores]))
        num_top = self._request.logprobs or 0
        return completion_logprobs(tokens, num_top, renderer, self._offsets)

    def finish(self, result: DecodeResult) -> Said:
        """Return what is left to send of the whole answer."""
        text = self._text.finish(self._asked.text(result))
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
    asked: _Asked,
    generations: _Generations,
    news: asyncio.Queue[_News],
    prompt_scores: Sequence[Sequence[TokenScore]],
) -> AsyncIterator[str]:
    """Yield the events of a streamed answer.

    Args:
        prompt_scores: Those of each prompt that is echoed with its log-probabilities.
    """
    chunks = Chunks(asked.request)
    choices = [_Choice(asked) for _ in generations.tasks]
    echoes = isinstance(asked.request, CompletionRequest) and asked.request.echo
    for index, choice in enumerate(choices):
        yield chunks.first(index)
        number = index // asked.request.num_choices
        prompt, logprobs = asked.prompts[number], None
        if prompt_scores:
            is_long = len(prompt.token_ids) > _LONG_ANSWER_TOKENS
            write = partial(choice.echo, prompt, prompt_scores[number])
            logprobs = await asked.model.read(_LONG_TEXT_BYTES if is_long else 0, write)
        if echoes:
            yield chunks.text(prompt.text, index, logprobs)
    num_open = len(choices)
    while num_open:
        index, token = await news.get()
        choice = choices[index]
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


def _load(
    models: Mapping[str, ServedModel], max_batch_size: int, kind: EngineName | VllmConfig
) -> dict[str, _Loaded]:
    # The replica alone needs these; who only describes it, or passes requests on, does not.
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    renderers = {name: _load_renderer(model) for name, model in models.items()}
    first = next(iter(models))
    # The same weights have the same tokenizer; templates, and so stop tokens, may differ.
    decode, stop_ids = renderers[first].decode, renderers[first].stop_ids
    adapters = {n: m.adapter / ADAPTER for n, m in models.items() if m.adapter is not None}
    engine: DecodeEngine
    if isinstance(kind, VllmConfig):
        from tuneloop.serving.vllm.engine import ServedWeights, VllmEngine

        weights = ServedWeights(models[first].path, adapters)
        engine = VllmEngine(weights, kind, decode, stop_ids, max_batch_size)
    else:
        engine = _own_engine(
            kind,
            models[first].path,
            decode=decode,
            stop_ids=stop_ids,
            max_batch_size=max_batch_size,
            adapters=adapters,
        )
    reader = ThreadPoolExecutor(1, "tuneloop-reader")
    compiler = ThreadPoolExecutor(1, "tuneloop-compiler")
    return {
        name: _Loaded(
            model,
            renderers[name],
            engine,
            name if model.adapter else "",
            reader,
            _load_constraints(renderers[name], engine.vocab_size),
            compiler,
        )
        for name, model in models.items()
    }


def _own_engine(kind: EngineName, path: Path, **options: Any) -> Engine:
    """Return our engine on OpenVINO, or on PyTorch where `auto` finds that OpenVINO cannot."""
    import torch

    from tuneloop.serving.engine import Engine
    from tuneloop.serving.room import weight_bytes

    if kind == "openvino":
        openvino.require()
    is_tried = (
        kind == "auto"
        and not torch.cuda.is_available()
        and openvino.suits(weight_bytes(path), sum(map(weight_bytes, options["adapters"].values())))
    )
    if kind == "openvino" or is_tried:
        from tuneloop.serving.openvino.engine import OpenVinoEngine

        try:
            return OpenVinoEngine.load(path, **options)
        except ModelError as error:
            if kind == "openvino":
                raise
            problem = error.problems[0]
            log.info("PyTorch computes, for %s: %s", problem.what, problem.got)
    return Engine.load(path, **options)


def _load_constraints(renderer: Renderer, vocab_size: int) -> Constraints | None:
    from tuneloop.serving.constraint import Constraints

    try:
        return Constraints(renderer, vocab_size)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of llguidance is no Exception
        log.warning("answers in a given form are not served: %s", error)
        return None


def _load_renderer(model: ServedModel) -> Renderer:
    """Return a model's renderer; one that renders otherwise than in training is refused."""
    renderer = Renderer.load(model.folder, model.chat_template)
    recorded = recorded_renderer(model.folder)
    if model.chat_template == "auto" and recorded not in (None, renderer.hash):
        raise ModelError.of(
            "the model's tokenizer or template renders otherwise than when it was trained",
            where=str(model.folder),
            got=renderer.hash,
            allowed=str(recorded),
            remedy="put back the directory's own files, or train again",
        )
    return renderer


async def _read(route: Route, body: dict[str, Any], model: _Loaded) -> _Asked:
    """Return a request with its prompts as token ids.

    Raises:
        ProtocolError: The request is wrong.
        RenderError: The model's template does not take the messages.
    """
    request: ChatRequest | CompletionRequest
    if route == "chat":
        request = protocol.parse_chat(body)
        prompts = [await _chat_prompt(request, model)]
        num_top, wants_logprobs = request.top_logprobs or 0, bool(request.logprobs)
        max_tokens = request.max_completion_tokens or request.max_tokens
        if max_tokens is None:
            # OpenAI's default is no bound; the model's positions are one.
            max_tokens = max(1, model.engine.max_length - len(prompts[0].token_ids))
    else:
        request = protocol.parse_completion(body)
        prompts = await _completion_prompts(request, model)
        num_top, wants_logprobs = request.logprobs or 0, request.logprobs is not None
        max_tokens = request.max_tokens
        if max_tokens is None:
            max_tokens = protocol.DEFAULT_COMPLETION_TOKENS
    form = request.form()
    if isinstance(request, ChatRequest) and (tools := request.demanded_tools):
        is_parallel = request.tool_choice == "required" and request.parallel_tool_calls is not False
        grammar = model.syntax.grammar(tools, is_parallel, model.renderer)
        form = AnswerForm("lark", grammar, "tool_choice")
    constraint = None if form is None else await model.constraint(form)
    ranking = None
    if isinstance(request, ChatRequest):
        ranking = await model.ranking(request, prompts[0].token_ids)
    if ranking is not None:
        max_tokens = ranking.tree.longest
    # Candidates are told apart by their log-probabilities, whether those are asked for or not.
    scores_answer = wants_logprobs or request.num_candidates > request.num_choices
    asked = replace(
        model.decode_request(request, request.params(max_tokens, scores_answer)),
        num_top=num_top,
        constraint=constraint,
        ranking=ranking,
        score_prompt=route == "completions"
        and bool(getattr(request, "echo", False))
        and (wants_logprobs or max_tokens == 0),
    )
    decoding = [
        replace(asked, prompt_ids=prompt.token_ids, params=_choice_params(asked.params, index))
        for prompt in prompts
        for index in range(request.num_candidates)
    ]
    return _Asked(model, request, prompts, decoding)


def _choice_params(params: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of one of several choices; the first has the seed that was given."""
    return replace(params, seed=(params.seed + index * _SEED_STEP) % 2**63) if index else params


async def _chat_prompt(request: ChatRequest | TokenizeRequest, model: _Loaded) -> TextPrompt:
    messages = results_in_order([message.message() for message in request.messages or ()])
    tools = request.offered_tools if isinstance(request, ChatRequest) else request.tools or ()
    settings = _template_settings(request, model.renderer)
    said = [text for m in messages for text in (m.content, m.tool_calls, m.reasoning_content)]
    size = sum(len(text.encode()) for text in [*said, *map(str, tools), str(settings)])
    # Each turn costs a rendering of all before it.
    is_long = len(messages) > _MANY_MESSAGES

    def read(renderer: Renderer) -> list[int]:
        return renderer.with_settings(settings).prompt_ids(messages, tools)

    return TextPrompt("", await model.read(max(size, is_long * _LONG_TEXT_BYTES), read))


def _template_settings(
    request: ChatRequest | TokenizeRequest, renderer: Renderer
) -> dict[str, Any]:
    """Return what a request tells the chat template beside the conversation.

    Raises:
        InvalidRequest: The template does not read it.
    """
    settings = dict(request.chat_template_kwargs or {})
    names = renderer.setting_names
    if unread := sorted(settings.keys() - names):
        raise _unread(unread[0], "chat_template_kwargs", names)
    effort = request.reasoning_effort if isinstance(request, ChatRequest) else None
    if effort is None:
        return settings
    param = "reasoning_effort"
    implied: dict[str, Any] = {param: effort} if param in names else {}
    if not implied and effort == "none" and "enable_thinking" in names:
        implied = {"enable_thinking": False}
    if not implied and (effort != "none" or renderer.opens_thinking):
        raise _unread(param, param, names)
    for name, value in implied.items():
        if settings.get(name, value) != value:
            raise InvalidRequest(f"`{param}` and `chat_template_kwargs.{name}` differ", None, param)
    return settings | implied


def _unread(name: str, param: str, names: Collection[str]) -> InvalidRequest:
    read = ", ".join(f"`{one}`" for one in sorted(names)) or "nothing of the kind"
    message = f"the model's chat template does not read `{name[:100]}`; it reads {read}"
    return InvalidRequest(message, "unsupported_parameter", param)


async def _completion_prompts(request: CompletionRequest, model: _Loaded) -> list[TextPrompt]:
    prompts = []
    for index, prompt in enumerate(request.prompts()):
        if index % _READ_AT_ONCE == _READ_AT_ONCE - 1:
            await asyncio.sleep(0)
        if isinstance(prompt, str):
            read = partial(Renderer.text_ids, text=prompt)
            prompts.append(TextPrompt(prompt, await model.read(len(prompt.encode()), read)))
            continue
        text = ""
        if request.echo:
            text = await _text(prompt, model)
        prompts.append(TextPrompt(text, prompt))
    return prompts


async def _text(ids: Sequence[int], model: _Loaded) -> str:
    """Return the text of ids.

    Raises:
        InvalidRequest: An id is outside the vocabulary.
    """
    size = model.engine.vocab_size
    if any(not 0 <= token < size for token in ids):
        raise InvalidRequest(f"a token id is outside the vocabulary of {size}")
    return await model.read(min(len(ids), _LONG_TEXT_BYTES), partial(Renderer.decode, ids=ids))


def _answer(asked: _Asked, results: Sequence[DecodeResult], renderer: Renderer) -> dict[str, Any]:
    if isinstance(asked.request, ChatRequest):
        said = [asked.said(result) for result in results]
        return chat_response(asked.request, asked.prompts[0].token_ids, results, said, renderer)
    return completion_response(asked.request, asked.prompts, results, renderer)


async def _tokenize(request: TokenizeRequest, model: _Loaded) -> dict[str, Any]:
    """Return the ids of a text, or of a conversation as it would be asked."""
    if request.prompt is None:
        ids = (await _chat_prompt(request, model)).token_ids
    else:
        read = partial(Renderer.text_ids, text=request.prompt)
        ids = await model.read(len(request.prompt.encode()), read)
    return {"count": len(ids), "max_model_len": model.engine.max_length, "tokens": list(ids)}


async def _detokenize(request: DetokenizeRequest, model: _Loaded) -> dict[str, Any]:
    return {"prompt": await _text(request.tokens, model)}


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
