"""OpenAI's HTTP protocol: the shape of the answers, whole and streamed."""

from __future__ import annotations

import json
import math
import statistics
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from pydantic_core import to_json

from tuneloop.models.chat.calls import Call
from tuneloop.models.chat.renderer import Renderer
from tuneloop.serving.protocol import ChatRequest, CompletionRequest
from tuneloop.serving.requests import DecodeResult, TokenScore
from tuneloop.serving.text import Decode, Detokenizer


class TextPrompt(NamedTuple):
    """One prompt of a completion request, as text and as token ids."""

    text: str
    token_ids: Sequence[int]


def completion_decode(request: CompletionRequest, prompt: TextPrompt, renderer: Renderer) -> Decode:
    """Return what makes the text of an answer, which goes on from its prompt."""
    # A form is one of the answer alone.
    if request.has_form:
        return renderer.decode
    return partial(renderer.decode_behind, prompt.token_ids)


class Said(NamedTuple):
    """What an answer says: its text, and its calls as OpenAI has them."""

    content: str
    tool_calls: Sequence[dict[str, Any]] = ()

    def finish_reason(self, result: DecodeResult) -> str:
        """Return why the answer ended, as OpenAI has it."""
        return (
            "tool_calls"
            if self.tool_calls and result.finish_reason == "stop"
            else (result.finish_reason)
        )


def tool_call(call: Call, call_id: str) -> dict[str, Any]:
    """Return a call as OpenAI has it."""
    # Half a surrogate pair, which a model may write as an escape, stays one: it is no text.
    name, arguments = (
        text.encode(errors="backslashreplace").decode()
        for text in (call.name, json.dumps(call.arguments, ensure_ascii=False))
    )
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


class ScoredToken(NamedTuple):
    """A generated token with its score, if scores were asked for."""

    token_id: int
    score: TokenScore | None


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    """Return the answer to GET /v1/models."""
    return {"object": "list", "data": [model_card(name, created) for name in names]}


def model_card(name: str, created: int) -> dict[str, Any]:
    """Return the answer to GET /v1/models/NAME."""
    return {"id": name, "object": "model", "created": created, "owned_by": "tuneloop"}


def chat_response(
    request: ChatRequest,
    prompt_ids: Sequence[int],
    results: Sequence[DecodeResult],
    said: Sequence[Said],
    renderer: Renderer,
) -> dict[str, Any]:
    """Return the answer to a chat request; one choice for each result.

    Args:
        said: What each result says.
    """
    choices = []
    for index, (result, (content, calls)) in enumerate(zip(results, said, strict=True)):
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        tokens = list(map(ScoredToken, result.token_ids, result.scores or ()))
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(tokens, renderer) if request.logprobs else None,
            "finish_reason": said[index].finish_reason(result),
        }
        if request.return_token_ids:
            choice["token_ids"] = result.token_ids
        if request.ranking is not None:
            texts = request.ranking.answers
            # The text as it was given: a tokenizer may not keep all of it.
            choice["message"]["content"] = texts[result.ranked[0].place]
            choice["ranking"] = {
                "answers": [
                    {"text": texts[one.place], "logprob": one.logprob} for one in result.ranked
                ],
                "coverage": result.coverage,
            }
        choices.append(choice)
    response = _envelope("chat.completion", request.model)
    response |= {"choices": choices, "usage": usage(results, len(results))}
    if request.return_token_ids:
        response["prompt_token_ids"] = list(prompt_ids)
    return response


def completion_response(
    request: CompletionRequest,
    prompts: Sequence[TextPrompt],
    results: Sequence[DecodeResult],
    renderer: Renderer,
) -> dict[str, Any]:
    """Return the answer to a completion request: the choices of the first prompt come first.

    Args:
        results: All candidates of the first prompt, then those of the next.
    """
    choices = []
    for index, result in enumerate(_best(results, request)):
        prompt = prompts[index // request.num_choices]
        choice: dict[str, Any] = {
            "index": index,
            "text": prompt.text + result.text if request.echo else result.text,
            "logprobs": None,
            "finish_reason": result.finish_reason,
        }
        if request.logprobs is not None:
            num_top, start = request.logprobs, len(prompt.text) if request.echo else 0
            tokens = list(map(ScoredToken, result.token_ids, result.scores or ()))
            offsets = TextOffsets(renderer, completion_decode(request, prompt, renderer), start)
            told = completion_logprobs(tokens, num_top, renderer, offsets)
            if request.echo:
                before = prompt_logprobs(prompt, result.prompt_scores or (), num_top, renderer)
                told = {name: before[name] + values for name, values in told.items()}
            choice["logprobs"] = told
        if request.return_token_ids:
            choice |= {"token_ids": result.token_ids, "prompt_token_ids": list(prompt.token_ids)}
        choices.append(choice)
    response = _envelope("text_completion", request.model)
    return response | {"choices": choices, "usage": usage(results, request.num_candidates)}


def _best(results: Sequence[DecodeResult], request: CompletionRequest) -> list[DecodeResult]:
    """Return of each prompt's candidates those with the highest log-probability per token."""
    size, kept = request.num_candidates, request.num_choices
    if size == kept:
        return list(results)

    def per_token(result: DecodeResult) -> float:
        # An answer without a token has no such number, and comes last.
        logprobs = result.logprobs
        return statistics.fmean(logprobs) if logprobs else -math.inf

    starts = range(0, len(results), size)
    groups = [results[start : start + size] for start in starts]
    return [one for group in groups for one in sorted(group, key=per_token, reverse=True)[:kept]]


def _envelope(kind: str, model: str) -> dict[str, Any]:
    """Return the fields every answer begins with."""
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(results: Sequence[DecodeResult], num_choices: int = 1) -> dict[str, int]:
    """Return the tokens of some results; a stop token counts as completion token.

    Args:
        num_choices: Results of each prompt, whose tokens count once.
    """
    prompt = sum(result.prompt_tokens or 0 for result in results[::num_choices])
    completion = sum(result.completion_tokens or 0 for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def event(data: dict[str, Any] | None) -> str:
    """Return one server-sent event; None is the last."""
    text = "[DONE]" if data is None else json_text(data)
    return f"data: {text}\n\n"


def json_text(data: Mapping[str, Any]) -> str:
    """Return JSON on one line, with null for what is no number."""
    return to_json(data, inf_nan_mode="null").decode()


class Chunks:
    """The events of one streamed answer, which may have several choices."""

    def __init__(self, request: ChatRequest | CompletionRequest) -> None:
        self._is_chat = isinstance(request, ChatRequest)
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        self._envelope = _envelope(kind, request.model)
        self._num_choices = request.num_choices
        self._with_usage = bool(request.stream_options and request.stream_options.include_usage)

    def first(self, index: int = 0) -> str:
        """Return the event that opens a choice."""
        delta = {"role": "assistant", "content": ""} if self._is_chat else ""
        return self._event(index, delta)

    def text(self, delta: str, index: int = 0, logprobs: dict[str, Any] | None = None) -> str:
        """Return the event that adds text to a choice.

        Args:
            logprobs: Those of the tokens since the event before.
        """
        return self._event(index, {"content": delta} if self._is_chat else delta, logprobs)

    def call(self, call: Mapping[str, Any], number: int, index: int = 0) -> str:
        """Return the event that adds a whole call to a choice.

        Args:
            number: Of the choice's calls before it.
        """
        return self._event(index, {"tool_calls": [{"index": number, **call}]})

    def end(self, reason: str, index: int = 0) -> str:
        """Return the event that ends a choice."""
        return self._event(index, {} if self._is_chat else "", reason=reason)

    def last(self, results: Sequence[DecodeResult]) -> list[str]:
        """Return the events behind all choices."""
        events = []
        if self._with_usage:
            counted = usage(results, self._num_choices)
            events.append(event(self._envelope | {"choices": [], "usage": counted}))
        return [*events, event(None)]

    def _event(
        self,
        index: int,
        delta: dict[str, Any] | str,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> str:
        choice = {
            "index": index,
            "delta" if self._is_chat else "text": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        return event(self._envelope | {"choices": [choice]})


def _token_text(token_id: int, renderer: Renderer) -> str:
    return renderer.token_bytes(token_id).decode(errors="replace")


def chat_logprobs(tokens: Sequence[ScoredToken], renderer: Renderer) -> dict[str, Any]:
    """Return the log-probabilities of a chat's tokens.

    A token may be a part of a character: `bytes` joined are the text, `token` joined may not be.
    """

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = renderer.token_bytes(token_id)
        token = _token_text(token_id, renderer)
        return {"token": token, "logprob": logprob, "bytes": list(data)}

    content = []
    for token_id, score in tokens:
        if score is not None:
            top = [entry(other, logprob) for other, logprob in score.top]
            content.append(entry(token_id, score.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


class TextOffsets:
    """Where each token begins in a text; one that goes on with a character, where that begins.

    Args:
        decode: Ids to this text.
        start: Where the first begins.
    """

    def __init__(self, renderer: Renderer, decode: Decode, start: int = 0) -> None:
        self._renderer, self._detokenizer = renderer, Detokenizer(decode)
        self._start = self._end = start
        self._num_held = 0

    def next(self, token_id: int) -> int:
        """Return where the next token begins."""
        first = self._renderer.token_bytes(token_id)[:1]
        # A character that no token goes on with is a sign of replacement of its own.
        if not (self._num_held and b"\x80" <= first < b"\xc0"):
            self._start = self._end + self._num_held
        piece = self._detokenizer.push(token_id)
        self._end += len(piece)
        self._num_held = 0 if piece else len(self._detokenizer.held)
        return self._start


def prompt_logprobs(
    prompt: TextPrompt, scores: Sequence[TokenScore], num_top: int, renderer: Renderer
) -> dict[str, Any]:
    """Return the parallel lists of a prompt that is echoed.

    Args:
        scores: Of its tokens but the first.
    """
    # Ids were given, and special tokens are left out; or a text, which stays as it is.
    kept = {index for index, name in renderer.special_names.items() if name in prompt.text}
    offsets = TextOffsets(renderer, partial(renderer.decode_with, kept))
    tokens = list(map(ScoredToken, prompt.token_ids, [None, *scores]))
    return completion_logprobs(tokens, num_top, renderer, offsets)


def completion_logprobs(
    tokens: Sequence[ScoredToken], num_top: int, renderer: Renderer, offsets: TextOffsets
) -> dict[str, Any]:
    """Return the parallel lists of the completions protocol.

    Args:
        num_top: How many of the likeliest tokens to list beside each.
    """
    top: list[dict[str, float] | None] = []
    for token_id, score in tokens:
        if score is None:
            top.append(None)
            continue
        listed: dict[str, float] = {}
        # Different ids may have the same text; the likelier one is listed.
        for other, logprob in score.top if num_top else ():
            listed.setdefault(_token_text(other, renderer), logprob)
        listed.setdefault(_token_text(token_id, renderer), score.logprob)
        top.append(listed)
    return {
        "tokens": [_token_text(token_id, renderer) for token_id, _ in tokens],
        "token_logprobs": [None if score is None else score.logprob for _, score in tokens],
        "top_logprobs": top,
        "text_offset": [offsets.next(token_id) for token_id, _ in tokens],
    }
