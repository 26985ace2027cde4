"""OpenAI's HTTP protocol: what may be asked.

Two rules hold throughout. A field that is left out takes the default OpenAI documents, never one
of the model's `generation_config`. A field whose effect is not implemented is refused, unless it
has a value that means "no effect"; null always does.

Extensions, named as in vLLM: `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`,
`structured_outputs`, `chat_template_kwargs`, and `return_token_ids`, which adds `token_ids` and
`prompt_token_ids`. Our own: `ranking`.

Source: https://platform.openai.com/docs/api-reference/chat and .../completions.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tuneloop.models.chat.tool_results import results_in_order
from tuneloop.records import Message, SamplingParams
from tuneloop.serving.requests import AnswerForm, Shaping

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

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of `max_tokens` for completions

# Bounds on one request, so that reading it costs the others nothing they would notice.
MAX_BODY_BYTES = 4 * 2**20
MAX_FIELDS = 100
MAX_MESSAGES = 2048
MAX_PARTS = 1024
MAX_CHOICES = 128  # of one prompt; OpenAI's bound
MAX_ANSWERS = 4096  # of one request: prompts times choices
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
MAX_BIASES = 1024
MAX_RANKED = 1000
MAX_CHOICE_CHARACTERS = 1000
MAX_INTEGER = 2**31


class ProtocolError(Exception):
    """An answer that is not 200.

    Args:
        status: HTTP status.
        param: The field that is wrong.
        code: Short machine-readable reason.
        retry_after_s: When to ask again, where that is known.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """Return the JSON that goes with the status."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Error(BaseModel):
    """What is wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field that is wrong.")
    code: str | None = Field(description="Short machine-readable reason.")


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: Error


class StrictBody(BaseModel):
    """A JSON object of which every field is known and has exactly its type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(StrictBody):
    """A part of a message; images and sound are not understood."""

    type: Literal["text"]
    text: str


class Function(StrictBody):
    """What a tool call asks for; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(StrictBody):
    """One call of a tool, in the assistant's turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(StrictBody):
    """One turn; the model's template decides what of it the model sees."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = (
        None
    )
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None

    def message(self) -> Message:
        """Return the turn with its text parts joined."""
        content = self.content
        if content is None:
            content = self.refusal or ""
        elif not isinstance(content, str):
            content = "".join(part.text for part in content)
        return Message.of(self.model_dump() | {"content": content})


class FunctionName(StrictBody):
    """The function that has to be called."""

    name: str = Field(max_length=MAX_CHOICE_CHARACTERS)


class NamedToolChoice(StrictBody):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class StreamOptions(StrictBody):
    """What a stream tells beside the text."""

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class JsonSchema(StrictBody):
    """A JSON Schema under its name. It always holds, whatever `strict` says."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictBody):
    """The form of the answer: any text, any JSON object, or JSON under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` belongs to the type json_schema, and only to it")
        return self


_Choice = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARACTERS)]


class StructuredOutputs(StrictBody):
    """The form of the answer, in one of these ways."""

    json_: dict[str, Any] | None = Field(None, alias="json", description="A JSON Schema.")
    regex: str | None = Field(None, description="The whole answer matches it.")
    choice: list[_Choice] | None = Field(
        None, min_length=1, max_length=MAX_RANKED, description="One of these texts."
    )
    grammar: str | None = Field(None, description="In Lark or GBNF.")

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of `json`, `regex`, `choice` and `grammar`")
        return self


class RankingRequest(StrictBody):
    """Texts of which the most probable, as a whole with its end, is the answer."""

    answers: list[_Choice] = Field(min_length=1, max_length=MAX_RANKED)
    coverage: float = Field(
        0.0,
        ge=0,
        le=1,
        description="List as many answers as have this share of the probability of all.",
    )


# Lists fail at their first wrong item: a long list may have a million of them.
_Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]
_Tools = Annotated[list[dict[str, Any]], Field(max_length=MAX_PARTS, fail_fast=True)]
_StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
_TokenId = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


_TemplateSettings = Annotated[dict[str, Any], Field(max_length=MAX_FIELDS)]
# OpenAI's names; which of them a template knows is its own matter.
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class _Sampling(StrictBody):
    model: str
    max_tokens: int | None = Field(None, ge=0, le=MAX_INTEGER)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Answers to each prompt.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INTEGER, description="0 and -1: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_BIASES, description="By token id."
    )
    seed: int | None = None
    stop: _StopString | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS)] | None = (
        None
    )
    stop_token_ids: list[_TokenId] | None = Field(None, max_length=MAX_STOP_STRINGS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"{key[:100]!r} is not a token id")
        return bias

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """Answers that are written to each prompt, of which the best are given."""
        return self.num_choices

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

    def form(self) -> AnswerForm | None:
        """Return the form that the answer has to have, if any is asked for."""
        asked, other = self.response_format, self.structured_outputs
        if asked is not None and asked.type != "text":
            schema = asked.json_schema.schema_ if asked.json_schema else {"type": "object"}
            return AnswerForm("json", json.dumps(schema), "response_format")
        if other is None:
            return None
        param = "structured_outputs"
        if other.json_ is not None:
            return AnswerForm("json", json.dumps(other.json_), param)
        if other.choice is not None:
            return AnswerForm("choice", json.dumps(other.choice), param)
        if other.regex is not None:
            return AnswerForm("regex", other.regex, param)
        return AnswerForm("grammar", other.grammar or "", param)

    def shaping(self) -> Shaping:
        """Return what changes the logits."""
        return Shaping(
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
        )


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: _Messages
    tools: _Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        None, description="`none`: the model is not told of the tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INTEGER)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    ranking: RankingRequest | None = None
    chat_template_kwargs: _TemplateSettings | None = Field(
        None, description="Values of names that the model's chat template reads."
    )
    reasoning_effort: Effort | None = Field(
        None, description="Where the template reads it; `none` also where it can be told not to."
    )

    def conversation(self) -> list[Message]:
        """Return the messages with text parts joined, and results in the order of their calls."""
        return results_in_order([message.message() for message in self.messages])

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def may_call(self) -> bool:
        """Whether calls are looked for in the answer; a form or a ranking excludes them."""
        return bool(self.offered_tools) and self.ranking is None and self.form() is None

    @property
    def demanded_tools(self) -> list[dict[str, Any]]:
        """The tools of which one has to be called; none where the model may answer otherwise."""
        if self.tool_choice == "required":
            return self.tools or []
        if isinstance(self.tool_choice, NamedToolChoice):
            wanted = self.tool_choice.function.name
            return [tool for tool in self.tools or () if _tool_name(tool) == wanted]
        return []


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[int], Field(fail_fast=True)]
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[int], Field(fail_fast=True)]], Field(fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="Answers written; the `n` likeliest are given."
    )

    @property
    def num_candidates(self) -> int:
        return max(self.num_choices, self.best_of or 1)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class TokenizeRequest(StrictBody):
    """POST /tokenize: either a text or a conversation, which is rendered by the template."""

    model: str
    prompt: str | None = None
    messages: _Messages | None = None
    tools: _Tools | None = None
    chat_template_kwargs: _TemplateSettings | None = None


class DetokenizeRequest(StrictBody):
    """POST /detokenize."""

    model: str
    tokens: Annotated[list[_TokenId], Field(fail_fast=True)]


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


def _tool_name(tool: Mapping[str, Any]) -> object:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None


def _refuse_tool_choice(request: ChatRequest) -> None:
    """Fail for a call that has to be made and cannot be."""
    names = [_tool_name(tool) for tool in request.tools or ()]
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
