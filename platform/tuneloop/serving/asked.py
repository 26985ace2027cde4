"""An HTTP request as it is read: validated, its prompts as token ids, what the engine is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from tuneloop.models.chat.calls import CallReader
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.tool_results import results_in_order
from tuneloop.records import SamplingParams
from tuneloop.serving.answers import Said, TextPrompt, completion_decode, tool_call
from tuneloop.serving.loaded import LONG_TEXT_BYTES, LoadedModel, template_settings
from tuneloop.serving.parsing import parse_chat, parse_completion
from tuneloop.serving.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tuneloop.serving.requests import AnswerForm, DecodeRequest, DecodeResult, InvalidRequest
from tuneloop.serving.text import Decode

Route = Literal["chat", "completions", "tokenize", "detokenize"]
_MANY_MESSAGES = 32
_TAG_TOKENS = 16  # the tag that a prompt may end with has no more
_READ_AT_ONCE = 16  # short prompts of one request, before others have a turn
_SEED_STEP = 0x9E3779B97F4A7C15  # odd: no two of 2**63 choices share a seed


@dataclass(frozen=True)
class Asked:
    """An HTTP request that has been read.

    Args:
        prompts: Each prompt, once.
        decoding: What the engine is asked for: each prompt as often as there are choices.
    """

    model: LoadedModel
    request: ChatRequest | CompletionRequest
    prompts: list[TextPrompt]
    decoding: list[DecodeRequest]

    def call_reader(self) -> CallReader | None:
        """Return what tells an answer's calls from its content, where it may have some."""
        request = self.request
        if not isinstance(request, ChatRequest) or not request.may_call:
            return None
        most = 1 if request.parallel_tool_calls is False else None
        renderer, ids = self.model.renderer, self.prompts[0].token_ids[-_TAG_TOKENS:]
        # An answer that is bound to calls has no thoughts.
        end = "" if request.demanded_tools else renderer.decode_with(renderer.special_names, ids)
        return CallReader(self.model.syntax, request.offered_tools, most, end)

    def said(self, result: DecodeResult) -> Said:
        """Return what an answer says."""
        reader = self.call_reader()
        if reader is None:
            return Said(result.text)
        content, calls = reader.finish(result.text)
        return Said(content, [tool_call(one, self.model.syntax.new_id()) for one in calls])


async def read_request(route: Route, body: dict[str, Any], model: LoadedModel) -> Asked:
    """Return a request with its prompts as token ids.

    Raises:
        ProtocolError: The request is wrong.
        RenderError: The model's template does not take the messages.
    """
    request: ChatRequest | CompletionRequest
    if route == "chat":
        request = parse_chat(body)
        prompts = [await _chat_prompt(request, model)]
        num_top, wants_logprobs = request.top_logprobs or 0, bool(request.logprobs)
        max_tokens = request.max_completion_tokens or request.max_tokens
        if max_tokens is None:
            # OpenAI's default is no bound; the model's positions are one.
            max_tokens = max(1, model.engine.max_length - len(prompts[0].token_ids))
    else:
        request = parse_completion(body)
        prompts = await _completion_prompts(request, model)
        num_top, wants_logprobs = request.logprobs or 0, request.logprobs is not None
        max_tokens = request.max_tokens
        if max_tokens is None:
            max_tokens = DEFAULT_COMPLETION_TOKENS
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
        replace(
            asked,
            prompt_ids=prompt.token_ids,
            params=_choice_params(asked.params, index),
            decode=_decode(request, model, prompt),
        )
        for prompt in prompts
        for index in range(request.num_candidates)
    ]
    return Asked(model, request, prompts, decoding)


def _decode(
    request: ChatRequest | CompletionRequest, model: LoadedModel, prompt: TextPrompt
) -> Decode:
    """Return what makes the text of an answer: one with its calls, or one that goes on."""
    if isinstance(request, ChatRequest):
        return model.decode_calls if request.may_call else model.renderer.decode
    return completion_decode(request, prompt, model.renderer)


def _choice_params(params: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of one of several choices; the first has the seed that was given."""
    return replace(params, seed=(params.seed + index * _SEED_STEP) % 2**63) if index else params


async def _chat_prompt(request: ChatRequest | TokenizeRequest, model: LoadedModel) -> TextPrompt:
    messages = results_in_order([message.message() for message in request.messages or ()])
    tools = request.offered_tools if isinstance(request, ChatRequest) else request.tools or ()
    settings = template_settings(request, model.renderer)
    said = [text for m in messages for text in (m.content, m.tool_calls, m.reasoning_content)]
    size = sum(len(text.encode()) for text in [*said, *map(str, tools), str(settings)])
    # Each turn costs a rendering of all before it.
    is_long = len(messages) > _MANY_MESSAGES

    def read(renderer: Renderer) -> list[int]:
        return renderer.with_settings(settings).prompt_ids(messages, tools)

    return TextPrompt("", await model.read(max(size, is_long * LONG_TEXT_BYTES), read))


async def _completion_prompts(request: CompletionRequest, model: LoadedModel) -> list[TextPrompt]:
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


async def _text(ids: Sequence[int], model: LoadedModel) -> str:
    """Return the text of ids.

    Raises:
        InvalidRequest: An id is outside the vocabulary.
    """
    size = model.engine.vocab_size
    if any(not 0 <= token < size for token in ids):
        raise InvalidRequest(f"a token id is outside the vocabulary of {size}")
    return await model.read(min(len(ids), LONG_TEXT_BYTES), partial(Renderer.decode, ids=ids))


async def tokenize(request: TokenizeRequest, model: LoadedModel) -> dict[str, Any]:
    """Return the ids of a text, or of a conversation as it would be asked."""
    if request.prompt is None:
        ids = (await _chat_prompt(request, model)).token_ids
    else:
        read = partial(Renderer.text_ids, text=request.prompt)
        ids = await model.read(len(request.prompt.encode()), read)
    return {"count": len(ids), "max_model_len": model.engine.max_length, "tokens": list(ids)}


async def detokenize(request: DetokenizeRequest, model: LoadedModel) -> dict[str, Any]:
    """Return the text of ids."""
    return {"prompt": await _text(request.tokens, model)}
