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
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tuneloop.models.chat.tool_results import results_in_order
from tuneloop.records import Message, SamplingParams
from tuneloop.serving.requests import AnswerForm, Shaping

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

    @property
    def has_form(self) -> bool:
        """Whether the answer has to have a form."""
        asked = self.response_format
        return self.structured_outputs is not None or (asked is not None and asked.type != "text")

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
            return [tool for tool in self.tools or () if tool_name(tool) == wanted]
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


def tool_name(tool: Mapping[str, Any]) -> object:
    """Return the name of a tool, in whichever of the two layouts it is."""
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None
