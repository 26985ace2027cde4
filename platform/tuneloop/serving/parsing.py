"""Reading a body of OpenAI's protocol: what asks for nothing is left out, what is wrong is told."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from tuneloop.serving.protocol import (
    MAX_ANSWERS,
    MAX_FIELDS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ProtocolError,
    RankingRequest,
    StrictBody,
    TokenizeRequest,
    tool_name,
)

# Fields of the protocol that are not implemented, with the values that ask for nothing.
# A request that has a field of that name takes it as its own.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "suffix": ("",),
    "store": (False,),
    "web_search_options": (),
    # Of other servers, sent by clients that know those.
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "priority": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
# Fields about the caller, or about how soon the answer comes, not about the answer.
_IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "user",
    }
)
# The same, of a message. Our own answers have them, and clients send those back as history.
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "tool_calls": ([],),
    "reasoning_content": ("",),
}

_Asked = TypeVar("_Asked", bound=StrictBody)


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Return a validated chat request.

    Raises:
        ProtocolError: 400, with the first field that is wrong.
    """
    request = _parse(ChatRequest, _without_neutral(ChatRequest, body))
    if request.top_logprobs and not request.logprobs:
        raise ProtocolError(400, "`top_logprobs` needs `logprobs: true`", "top_logprobs")
    if request.max_tokens == 0:
        raise ProtocolError(400, "`max_tokens` must be at least 1", "max_tokens")
    _refuse_two_forms(request)
    if request.ranking is not None:
        _refuse_beside_ranking(request, request.ranking)
    _refuse_stream_options(request)
    _refuse_without_content(request.messages)
    _refuse_tool_choice(request)
    return request


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """Return a validated completion request.

    Raises:
        ProtocolError: 400, with the first field that is wrong.
    """
    request = _parse(CompletionRequest, _without_neutral(CompletionRequest, body))
    num_prompts = len(request.prompts())
    if not num_prompts:
        raise ProtocolError(400, "`prompt` is an empty list", "prompt")
    if request.best_of is not None and request.best_of < request.num_choices:
        message = f"`best_of` is {request.best_of}, less than `n`: {request.num_choices}"
        raise ProtocolError(400, message, "best_of")
    if num_prompts * request.num_candidates > MAX_ANSWERS:
        raise ProtocolError(
            400,
            f"{num_prompts} prompts with {request.num_candidates} answers each are more than the "
            f"{MAX_ANSWERS} answers of one request",
            "prompt",
        )
    if request.max_tokens == 0 and not request.echo:
        raise ProtocolError(400, "`max_tokens: 0` needs `echo: true`", "max_tokens")
    _refuse_two_forms(request)
    _refuse_stream_options(request)
    if request.stream and request.num_candidates > request.num_choices:
        raise ProtocolError(400, "`stream` excludes `best_of`", "stream")
    return request


def parse_tokenize(body: dict[str, Any]) -> TokenizeRequest:
    """Return a validated request for token ids.

    Raises:
        ProtocolError: 400, with the first field that is wrong.
    """
    request = _parse(TokenizeRequest, _without_neutral(TokenizeRequest, body))
    if (request.prompt is None) == (request.messages is None):
        raise ProtocolError(400, "give either `prompt` or `messages`", "prompt")
    if request.chat_template_kwargs and request.messages is None:
        message = "`chat_template_kwargs` belongs to `messages`"
        raise ProtocolError(400, message, "chat_template_kwargs")
    _refuse_without_content(request.messages or ())
    return request


def parse_detokenize(body: dict[str, Any]) -> DetokenizeRequest:
    """Return a validated request for the text of token ids.

    Raises:
        ProtocolError: 400, with the first field that is wrong.
    """
    return _parse(DetokenizeRequest, body)


def parse_body(
    kind: type[_Asked],
    body: dict[str, Any],
    neutral: Mapping[str, tuple[Any, ...]],
    ignored: Collection[str],
) -> _Asked:
    """Return a validated body.

    Args:
        neutral: Fields that are not implemented, with the values that ask for nothing.
        ignored: Fields about the caller.

    Raises:
        ProtocolError: 400, with the first field that is wrong.
    """
    return _parse(kind, _asked_fields(kind, body, neutral, ignored))


def _asked_fields(
    kind: type[StrictBody],
    body: dict[str, Any],
    neutral: Mapping[str, tuple[Any, ...]],
    ignored: Collection[str],
) -> dict[str, Any]:
    """Return a body without the fields that ask for nothing."""
    _refuse_many_fields(body)
    asked = {}
    for name, value in body.items():
        if value is None or name in ignored:
            continue
        if name in kind.model_fields or name not in neutral:
            asked[name] = value
        elif value not in neutral[name]:
            raise _unsupported(name, value, neutral[name])
    return asked


def _unsupported(name: str, value: object, neutral: tuple[Any, ...]) -> ProtocolError:
    allowed = f"; {json.dumps(neutral[0])} is taken" if neutral else ""
    message = f"`{name}` is not supported, got {_shown(value)}{allowed}"
    return ProtocolError(400, message, name, "unsupported_parameter")


def _without_neutral(kind: type[StrictBody], body: dict[str, Any]) -> dict[str, Any]:
    """Return a body without the fields, and fields of messages, that ask for nothing."""
    asked = _asked_fields(kind, body, _NEUTRAL, _IGNORED)
    messages = asked.get("messages")
    if isinstance(messages, list):
        asked["messages"] = [_message_without_neutral(message) for message in messages]
    return asked


def _message_without_neutral(message: object) -> Any:
    if not isinstance(message, dict):
        return message
    _refuse_many_fields(message, "messages")
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        _refuse_many_fields(part, "messages")
    return {
        name: value
        for name, value in message.items()
        if value is not None and value not in _NEUTRAL_IN_MESSAGE.get(name, ())
    }


def _refuse_many_fields(value: object, param: str | None = None) -> None:
    """Fail for an object of very many fields, each of which would be reported as unknown."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        message = f"an object has {len(value)} fields; {MAX_FIELDS} are allowed"
        raise ProtocolError(400, message, param)


def _parse(kind: type[_Asked], asked: dict[str, Any]) -> _Asked:
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        # Of a union's alternatives the one that fits furthest is meant. Each is a further part of
        # the location, which is no field of the request.
        of_first = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
        first = max(of_first, key=lambda e: len(e["loc"]))
        param = ".".join(str(part) for part in first["loc"][:1])
        where = ".".join(str(part) for part in first["loc"] if not _ALTERNATIVE.match(str(part)))
        if first["type"] == "extra_forbidden":
            message = f"unknown field `{where[:100]}`"
        elif first["type"] == "missing":
            message = f"`{where}` is missing"
        else:
            message = f"`{where[:100]}`: {first['msg']}, got {_shown(first['input'])}"
        raise ProtocolError(400, message, param[:100]) from error


_ALTERNATIVE = re.compile(
    r"(str|int|float|bool|NamedToolChoice)$|(constrained-|list\[|literal\[|nullable|function-)"
)


def _shown(value: object) -> str:
    """Return the beginning of a value, without writing all of a long one."""
    if isinstance(value, str):
        value = value[:100]
    elif isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    return f"{value!r:.100}"


def _refuse_stream_options(request: ChatRequest | CompletionRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise ProtocolError(400, "`stream_options` needs `stream: true`", "stream_options")
    if request.stream and request.return_token_ids:
        raise ProtocolError(400, "`stream` excludes `return_token_ids`", "stream")


def _refuse_two_forms(request: ChatRequest | CompletionRequest) -> None:
    if request.form() is not None and request.response_format and request.structured_outputs:
        param = "structured_outputs"
        raise ProtocolError(400, "`response_format` excludes `structured_outputs`", param)


def _refuse_beside_ranking(request: ChatRequest, ranking: RankingRequest) -> None:
    """Fail for what has no meaning where the answer is one of those given."""
    others = {
        "stream": request.stream,
        "n": request.num_choices > 1,
        "logprobs": request.logprobs,
        "stop": request.stop_strings,
        "response_format": request.form() is not None,
    }
    if beside := next((name for name, asked in others.items() if asked), None):
        raise ProtocolError(400, f"`ranking` excludes `{beside}`", "ranking")
    if len(set(ranking.answers)) < len(ranking.answers):
        raise ProtocolError(400, "`ranking.answers` has a text twice", "ranking")


def _refuse_tool_choice(request: ChatRequest) -> None:
    """Fail for a call that has to be made and cannot be."""
    names = [tool_name(tool) for tool in request.tools or ()]
    wrong = next((i for i, name in enumerate(names) if not isinstance(name, str) or not name), None)
    if wrong is not None:
        where = f"tools.{wrong}.function.name"
        raise ProtocolError(400, f"`{where}` is missing or no text", "tools")
    if request.tool_choice in (None, "none", "auto"):
        return
    param = "tool_choice"
    if not request.demanded_tools:
        wanted = request.tool_choice
        shown = wanted if isinstance(wanted, str) else f"{wanted.function.name[:100]!r}"
        given = ", ".join(map(str, names[:20])) or "none"
        message = f"`tool_choice` is {shown}, which is none of `tools` (given: {given})"
        raise ProtocolError(400, message, param)
    beside = "ranking" if request.ranking else "response_format" if request.form() else ""
    if beside:
        raise ProtocolError(400, f"`tool_choice` excludes `{beside}`", param)


def _refuse_without_content(messages: Sequence[ChatMessage]) -> None:
    for index, message in enumerate(messages):
        said = message.content, message.refusal, message.tool_calls
        if said == (None, None, None):
            where = f"messages.{index}.content"
            raise ProtocolError(400, f"`{where}` is missing", "messages")


def unknown_model(name: object, served: Sequence[str]) -> ProtocolError:
    """Return the error that lists what is served: 404, or 400 where no name was given."""
    listed = f"served: {', '.join(served)}"
    if name is None:
        return ProtocolError(400, f"`model` is missing; {listed}", "model")
    if not isinstance(name, str):
        message = f"`model`: a name is expected, got {_shown(name)}; {listed}"
        return ProtocolError(400, message, "model")
    message = f"the model `{name[:100]}` is not served here; {listed}"
    return ProtocolError(404, message, "model", "model_not_found")
