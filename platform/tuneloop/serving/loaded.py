"""A model as a replica has it loaded: its renderer, the engine it shares, forms and rankings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tuneloop.config import EngineName, VllmConfig
from tuneloop.errors import ModelError
from tuneloop.models.chat.calls import CallSyntax
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.export.layout import ADAPTER, recorded_renderer
from tuneloop.records import Message, Sample, SamplingParams
from tuneloop.serving.openvino import environment as openvino
from tuneloop.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from tuneloop.serving.ranking import AnswerTree
from tuneloop.serving.requests import AnswerForm, DecodeRequest, InvalidRequest, Ranking
from tuneloop.serving.text import Decode

if TYPE_CHECKING:
    from tuneloop.serving.constraint import Constraint, Constraints
    from tuneloop.serving.engine import Engine
    from tuneloop.serving.requests import DecodeEngine

log = logging.getLogger("tuneloop.serving")
Result = TypeVar("Result")

# Texts that take longer than some milliseconds are dealt with in another thread.
LONG_TEXT_BYTES = 8192
_MIN_TEXT_LIMIT_BYTES = 2**16
_NUM_TREES = 16


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
class LoadedModel:
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
        """Return what to ask the engine for, but for the prompt.

        Raises:
            InvalidRequest: It is to stop at a token that the model does not have.
        """
        size = self.engine.vocab_size
        if any(token >= size for token in request.stop_token_ids or ()):
            raise InvalidRequest(
                f"`stop_token_ids` has a token id outside the vocabulary of {size}",
                param="stop_token_ids",
            )
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
        if num_bytes < LONG_TEXT_BYTES:
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
        settings = template_settings(request, self.renderer)

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


def load(
    models: Mapping[str, ServedModel], max_batch_size: int, kind: EngineName | VllmConfig
) -> dict[str, LoadedModel]:
    """Return models of the same weights with one engine, by name; see `ModelServer`.

    Raises:
        ModelError: One of them cannot be loaded.
    """
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
        name: LoadedModel(
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
    # Reads the whole tokenizer, for which no stream is to wait.
    _ = renderer.unsettled_ids
    return renderer


def template_settings(request: ChatRequest | TokenizeRequest, renderer: Renderer) -> dict[str, Any]:
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
