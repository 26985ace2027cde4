"""OpenAI's Responses protocol, told in that of chat completions and back.

Nothing is stored: a conversation is sent whole, as `input`. What has no meaning here is refused.

Source: https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tuneloop.serving.answers import json_text
from tuneloop.serving.parsing import parse_body
from tuneloop.serving.protocol import (
    MAX_FIELDS,
    MAX_INTEGER,
    MAX_MESSAGES,
    MAX_PARTS,
    Effort,
    ProtocolError,
    StreamOptions,
    StrictBody,
)

# Fields that are not implemented, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "include": ([],),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "service_tier": ("auto", "default"),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
# What the fields of a chat are called here.
_OWN_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
    "response_format": "text",
}
# About the caller, how soon the answer comes, what is kept, or tools of OpenAI's own.
_IGNORED = frozenset(
    {
        "max_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "store",
        "user",
    }
)


class _InputText(StrictBody):
    """A part of a message."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


def _text(content: str | list[_InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class _InputMessage(StrictBody):
    """One turn, also one that was answered here."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_InputText], Field(max_length=MAX_PARTS, fail_fast=True)]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class _InputCall(StrictBody):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class _InputResult(StrictBody):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[_InputText], Field(max_length=MAX_PARTS, fail_fast=True)]
    id: str | None = None
    status: str | None = None


class _Tool(StrictBody):
    """A function that may be called."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _NamedTool(StrictBody):
    """The function that has to be called."""

    type: Literal["function"]
    name: str


class _Format(StrictBody):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class _Reasoning(StrictBody):
    """How long the model may think; no summary of it is written."""

    effort: Effort | None = None
    summary: None = None
    generate_summary: None = None


class _Text(StrictBody):
    """How the answer is written."""

    format: _Format = _Format()
    verbosity: Literal["medium"] | None = None


_Item = _InputMessage | _InputCall | _InputResult


class ResponsesRequest(StrictBody):
    """POST /v1/responses."""

    model: str
    input: str | Annotated[list[_Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INTEGER)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: Annotated[list[_Tool], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: _Text = _Text()
    reasoning: _Reasoning = _Reasoning()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_FIELDS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_body(self) -> dict[str, Any]:
        """Return the same request for POST /v1/chat/completions."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        if self.tools:
            shown = {"type", "strict"}
            body["tools"] = [
                {"type": "function", "function": one.model_dump(exclude=shown, exclude_none=True)}
                for one in self.tools
            ]
        choice = self.tool_choice
        if isinstance(choice, _NamedTool):
            body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice is not None:
            body["tool_choice"] = choice
        form = self.text.format
        if form.type == "json_schema":
            schema = {"name": form.name, "schema": form.schema_ or {}}
            body["response_format"] = {"type": form.type, "json_schema": schema}
        elif form.type == "json_object":
            body["response_format"] = {"type": form.type}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, _InputMessage):
                messages.append({"role": item.role, "content": _text(item.content)})
            elif isinstance(item, _InputResult):
                said = _text(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": said})
            else:
                # What was said and called in one turn stands in several items.
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
        return messages


def parse_responses(body: dict[str, Any]) -> ResponsesRequest:
    """Return a validated request.

    Raises:
        ProtocolError: 400, with the first field that is wrong.
    """
    if isinstance(items := body.get("input"), list):
        body = {**body, "input": list(map(_without_null, items))}
    request = parse_body(ResponsesRequest, body, _NEUTRAL, _IGNORED)
    form = request.text.format
    if (form.type == "json_schema") != (form.schema_ is not None):
        raise ProtocolError(400, "`text.format.schema` belongs to the type json_schema", "text")
    return request


def _without_null(item: object) -> object:
    """Return an item without the fields that say nothing, which clients send back as they come."""
    if not isinstance(item, dict):
        return item
    return {name: value for name, value in item.items() if value is not None}


class _Answer:
    """A response while it is made."""

    def __init__(self, request: ResponsesRequest) -> None:
        tools = [one.model_dump(exclude_none=True) for one in request.tools or ()]
        choice = request.tool_choice
        shown = choice.model_dump() if isinstance(choice, _NamedTool) else choice
        self.output: list[dict[str, Any]] = []
        self._fields: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": request.model,
            "error": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": request.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": shown or "auto",
            "tools": [{"parameters": None, "strict": None, **tool} for tool in tools],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
        }

    def told(
        self, reason: str | None = None, usage: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the response as far as it is.

        Args:
            reason: Why the answer ended; None: it has not.
        """
        status = {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
        cut = {"reason": "max_output_tokens"} if reason == "length" else None
        counted = usage and {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        end = {"status": status, "incomplete_details": cut, "output": list(self.output)}
        return self._fields | end | {"usage": counted or None}


def _message(text: str, status: str, message_id: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    told = {"id": message_id, "type": "message", "role": "assistant", "status": status}
    return told | {"content": content if status != "in_progress" else []}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _function_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": _new_id("fc"),
        "type": "function_call",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
        "status": "completed",
    }


def response_of(request: ResponsesRequest, chat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer of POST /v1/chat/completions as a response; its error as one of ours."""
    if "error" in chat:
        return {"error": _own_error(chat["error"])}
    answer, choice = _Answer(request), chat["choices"][0]
    reason, message = choice["finish_reason"], choice["message"]
    if message["content"] or not message.get("tool_calls"):
        status = "incomplete" if reason == "length" else "completed"
        answer.output.append(_message(message["content"] or "", status, _new_id("msg")))
    answer.output += map(_function_call, message.get("tool_calls") or ())
    return answer.told(reason, chat["usage"])


def _own_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """Return the error of a chat, which names a field of the request that was made of ours."""
    return {**error, "param": _OWN_NAMES.get(error["param"], error["param"])}


async def response_events(
    request: ResponsesRequest, chunks: AsyncGenerator[Any]
) -> AsyncGenerator[str]:
    """Yield the events of a streamed chat as those of a response."""
    events = _Events(request)
    for item in events.opening():
        yield item
    try:
        async for chunk in chunks:
            for line in str(chunk).split("\n"):
                data = line.removeprefix("data: ")
                if data != line and data != "[DONE]":
                    for item in events.after(json.loads(data)):
                        yield item
        for item in events.ending():
            yield item
    finally:
        await chunks.aclose()


class _Events:
    """Counts and writes the events of one response."""

    def __init__(self, request: ResponsesRequest) -> None:
        self._answer = _Answer(request)
        self._number = 0
        self._text = ""
        self._message_id = ""
        self._reason: str | None = None
        self._usage: Mapping[str, Any] | None = None
        self._has_failed = False

    def opening(self) -> list[str]:
        """Return the events before anything is written."""
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._answer.told()) for kind in kinds]

    def after(self, chunk: Mapping[str, Any]) -> list[str]:
        """Return the events of one chunk."""
        if "error" in chunk:
            self._has_failed = True
            error = _own_error(chunk["error"])
            code, message = error.get("code") or error["type"], error["message"]
            return [self._event("error", code=code, message=message, param=error.get("param"))]
        self._usage = chunk.get("usage") or self._usage
        events: list[str] = []
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if delta.get("content"):
                events += self._write(delta["content"])
            for call in delta.get("tool_calls") or ():
                events += [*self._close_message("completed"), *self._call(call)]
            self._reason = choice["finish_reason"] or self._reason
        return events

    def ending(self) -> list[str]:
        """Return the events behind everything that was written."""
        if self._has_failed:
            return []
        is_empty = not self._message_id and not self._answer.output
        events = self._write("") if is_empty else []
        events += self._close_message("incomplete" if self._reason == "length" else "completed")
        kind = "response.incomplete" if self._reason == "length" else "response.completed"
        response = self._answer.told(self._reason or "stop", self._usage)
        return [*events, self._event(kind, response=response)]

    def _write(self, text: str) -> list[str]:
        events = []
        if not self._message_id:
            self._message_id = _new_id("msg")
            item = _message("", "in_progress", self._message_id)
            events.append(self._of_item("response.output_item.added", item=item))
            part = {"type": "output_text", "text": "", "annotations": []}
            events.append(self._of_part("response.content_part.added", part=part))
        self._text += text
        if text:
            events.append(self._of_part("response.output_text.delta", delta=text, logprobs=[]))
        return events

    def _close_message(self, status: str) -> list[str]:
        if not self._message_id:
            return []
        item = _message(self._text, status, self._message_id)
        events = [
            self._of_part("response.output_text.done", text=self._text, logprobs=[]),
            self._of_part("response.content_part.done", part=item["content"][0]),
            self._of_item("response.output_item.done", item=item),
        ]
        self._answer.output.append(item)
        self._message_id = self._text = ""
        return events

    def _call(self, call: Mapping[str, Any]) -> list[str]:
        item = _function_call(call)
        name, arguments = item["name"], item["arguments"]
        begun = item | {"arguments": "", "status": "in_progress"}
        told = {"item_id": item["id"]}
        kind = "response.function_call_arguments"
        events = [
            self._of_item("response.output_item.added", item=begun),
            self._of_item(f"{kind}.delta", delta=arguments, **told),
            self._of_item(f"{kind}.done", arguments=arguments, name=name, **told),
            self._of_item("response.output_item.done", item=item),
        ]
        self._answer.output.append(item)
        return events

    def _of_part(self, kind: str, **fields: Any) -> str:
        return self._of_item(kind, item_id=self._message_id, content_index=0, **fields)

    def _of_item(self, kind: str, **fields: Any) -> str:
        return self._event(kind, output_index=len(self._answer.output), **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json_text(data)}\n\n"
