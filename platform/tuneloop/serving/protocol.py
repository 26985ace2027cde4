"""OpenAI's HTTP protocol: what may be asked, and the shape of the answers.

Two rules hold throughout. A field that is left out takes the default OpenAI documents, never one
of the model's `generation_config`. A field whose effect is not implemented is refused, unless it
has the value that means "no effect".

`return_token_ids: true` (the same extension as vLLM's) adds `token_ids` and `prompt_token_ids`.

Source: https://platform.openai.com/docs/api-reference/chat and .../completions.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message, SamplingParams
from tuneloop.serving.requests import DecodeResult, TokenScore
from tuneloop.serving.text import Detokenizer

# Fields of the protocol that are not implemented, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "store": (False,),
}
# Fields about the caller, not about the answer.
_IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of `max_tokens` for completions


class ProtocolError(Exception):
    """An answer that is not 200.

    Args:
        status: HTTP status.
        param: The field that is wrong.
        code: Short machine-readable reason.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """Return the JSON that goes with the status."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _TextPart(_Body):
    type: Literal["text"]
    text: str


class _Function(_Body):
    name: str
    arguments: str


class _ToolCall(_Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class _ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_TextPart] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None

    def message(self) -> Message:
        """Return the turn, with text parts joined."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in parts)
        return Message.of(self.model_dump() | {"content": text})


class _StreamOptions(_Body):
    include_usage: bool = False


class _Sampling(_Body):
    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)

    def params(self, max_tokens: int, logprobs: bool) -> SamplingParams:
        """Return the sampling parameters, with OpenAI's defaults for what was left out."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed % 2**63,
            stop=self.stop_strings,
            logprobs=logprobs,
        )


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[_ChatMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def conversation(self) -> list[Message]:
        """Return the messages with text parts joined."""
        return [message.message() for message in self.messages]


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


_Asked = TypeVar("_Asked", ChatRequest, CompletionRequest)


class TextPrompt(NamedTuple):
    """One prompt of a completion request, as text and as token ids."""

    text: str
    token_ids: Sequence[int]


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Return a validated chat request.

    Raises:
        ProtocolError: 400, with the first field that is wrong.
    """
    request = _parse(ChatRequest, body)
    if request.top_logprobs and not request.logprobs:
        raise ProtocolError(400, "`top_logprobs` needs `logprobs: true`", "top_logprobs")
    if request.max_tokens == 0:
        raise ProtocolError(400, "`max_tokens` must be at least 1", "max_tokens")
    for index, message in enumerate(request.messages):
        if message.content is None and not message.tool_calls:
            raise ProtocolError(400, f"`messages.{index}.content` is missing", "messages")
    return request


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """Return a validated completion request.

    Raises:
        ProtocolError: 400, with the first field that is wrong.
    """
    request = _parse(CompletionRequest, body)
    if not request.prompts():
        raise ProtocolError(400, "`prompt` is an empty list", "prompt")
    if request.max_tokens == 0 and not request.echo:
        raise ProtocolError(400, "`max_tokens: 0` needs `echo: true`", "max_tokens")
    if request.stream:
        if len(request.prompts()) > 1:
            raise ProtocolError(400, "`stream` takes one prompt", "stream")
        if request.echo:
            raise ProtocolError(400, "`stream` excludes `echo`", "stream")
    return request


def _parse(kind: type[_Asked], body: dict[str, Any]) -> _Asked:
    asked = {}
    for name, value in body.items():
        if name in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[name]:
                raise ProtocolError(
                    400, f"`{name}` is not supported", name, "unsupported_parameter"
                )
        elif name not in _IGNORED:
            asked[name] = value
    try:
        request = kind.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        # Unions report each alternative as a further part of the location; the field is first.
        param = ".".join(str(part) for part in first["loc"][:1])
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            message = f"unknown field `{param}`"
        else:
            where = ".".join(str(part) for part in first["loc"])
            message = f"`{where}`: {first['msg']}, got {first['input']!r:.100}"
        raise ProtocolError(400, message, param) from error
    if request.stream_options is not None and not request.stream:
        raise ProtocolError(400, "`stream_options` needs `stream: true`", "stream_options")
    if request.stream and (request.logprobs not in (None, False) or request.return_token_ids):
        raise ProtocolError(400, "`stream` excludes `logprobs` and `return_token_ids`", "stream")
    return request


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    """Return the answer to GET /v1/models."""
    return {"object": "list", "data": [model_card(name, created) for name in names]}


def model_card(name: str, created: int) -> dict[str, Any]:
    """Return the answer to GET /v1/models/NAME."""
    return {"id": name, "object": "model", "created": created, "owned_by": "tuneloop"}


def unknown_model(name: object, served: Sequence[str]) -> ProtocolError:
    """Return the 404 that lists what is served."""
    message = f"the model `{name}` is not served here; served: {', '.join(served)}"
    return ProtocolError(404, message, "model", "model_not_found")


def chat_response(
    request: ChatRequest, prompt_ids: Sequence[int], answer: DecodeResult, renderer: Renderer
) -> dict[str, Any]:
    """Return the answer to a chat request."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": _chat_logprobs(answer, renderer) if request.logprobs else None,
        "finish_reason": answer.finish_reason,
    }
    response = envelope("chat.completion", request.model)
    response |= {"choices": [choice], "usage": usage([answer])}
    if request.return_token_ids:
        choice["token_ids"] = answer.token_ids
        response["prompt_token_ids"] = list(prompt_ids)
    return response


def completion_response(
    request: CompletionRequest,
    prompts: Sequence[TextPrompt],
    answers: Sequence[DecodeResult],
    renderer: Renderer,
) -> dict[str, Any]:
    """Return the answer to a completion request."""
    choices = []
    for index, ((text, ids), answer) in enumerate(zip(prompts, answers, strict=True)):
        choice: dict[str, Any] = {
            "index": index,
            "text": text + answer.text if request.echo else answer.text,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        if request.logprobs is not None:
            choice["logprobs"] = _legacy_logprobs(request, ids, answer, renderer)
        if request.return_token_ids:
            choice |= {"token_ids": answer.token_ids, "prompt_token_ids": list(ids)}
        choices.append(choice)
    response = envelope("text_completion", request.model)
    return response | {"choices": choices, "usage": usage(answers)}


def envelope(kind: str, model: str) -> dict[str, Any]:
    """Return the fields every answer begins with."""
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(answers: Sequence[DecodeResult]) -> dict[str, int]:
    """Return the tokens of some answers; a stop token counts as completion token."""
    prompt = sum(answer.prompt_tokens or 0 for answer in answers)
    completion = sum(answer.completion_tokens or 0 for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def event(data: dict[str, Any] | None) -> str:
    """Return one server-sent event; None is the last."""
    text = "[DONE]" if data is None else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n"


class Chunks:
    """The events of one streamed answer."""

    def __init__(self, request: ChatRequest | CompletionRequest) -> None:
        self._is_chat = isinstance(request, ChatRequest)
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        self._envelope = envelope(kind, request.model)
        self._with_usage = bool(request.stream_options and request.stream_options.include_usage)

    def first(self) -> str:
        """Return the event that opens the answer."""
        return self._event({"role": "assistant", "content": ""} if self._is_chat else "", None)

    def text(self, delta: str) -> str:
        """Return the event that adds text."""
        return self._event({"content": delta} if self._is_chat else delta, None)

    def last(self, answer: DecodeResult) -> list[str]:
        """Return the events that close the answer."""
        events = [self._event({} if self._is_chat else "", answer.finish_reason)]
        if self._with_usage:
            events.append(event(self._envelope | {"choices": [], "usage": usage([answer])}))
        return [*events, event(None)]

    def _event(self, delta: dict[str, str] | str, reason: str | None) -> str:
        choice = {
            "index": 0,
            "delta" if self._is_chat else "text": delta,
            "logprobs": None,
            "finish_reason": reason,
        }
        return event(self._envelope | {"choices": [choice]})


def _token_text(token_id: int, renderer: Renderer) -> str:
    return str(renderer.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))


def _chat_logprobs(answer: DecodeResult, renderer: Renderer) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = _token_text(token_id, renderer)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    content = []
    for token_id, score in zip(answer.token_ids, answer.scores or [], strict=True):
        top = [entry(other, logprob) for other, logprob in score.top]
        content.append(entry(token_id, score.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _legacy_logprobs(
    request: CompletionRequest, prompt_ids: Sequence[int], answer: DecodeResult, renderer: Renderer
) -> dict[str, Any]:
    """Return the parallel lists of the completions protocol; with echo, the prompt's first."""
    ids = list(answer.token_ids)
    scores: list[TokenScore | None] = list(answer.scores or [])
    if request.echo:
        ids = [*prompt_ids, *ids]
        scores = [None, *(answer.prompt_scores or []), *scores]
    detokenizer, offsets, end = Detokenizer(renderer), [], 0
    for token_id in ids:
        offsets.append(end)
        end += len(detokenizer.push(token_id))
    top: list[dict[str, float] | None] = []
    for token_id, score in zip(ids, scores, strict=True):
        if score is None:
            top.append(None)
            continue
        listed: dict[str, float] = {}
        # Different ids may have the same text; the likelier one is listed.
        for other, logprob in score.top if request.logprobs else ():
            listed.setdefault(_token_text(other, renderer), logprob)
        listed.setdefault(_token_text(token_id, renderer), score.logprob)
        top.append(listed)
    return {
        "tokens": [_token_text(token_id, renderer) for token_id in ids],
        "token_logprobs": [None if score is None else score.logprob for score in scores],
        "top_logprobs": top,
        "text_offset": offsets,
    }
