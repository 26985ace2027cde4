"""The one way to ask a model: an OpenAI-compatible HTTP client.

Evaluation knows nothing else, so our own servers and any other compatible endpoint are scored
alike. Two kinds of failure are told apart:

- The endpoint is unusable (refused connection, wrong key, unknown model): `EndpointError`, which
  ends the run.
- One request failed, after bounded retries where trying again can help: `RequestError`, which
  costs that one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx

from tuneloop.errors import ConfigError, EndpointError
from tuneloop.models.client.streaming import (
    FINISH_REASONS,
    Delta,
    RequestError,
    event_lines,
    read_deltas,
)
from tuneloop.records import Completion, Endpoint, Message, SamplingParams, call_text

__all__ = [
    "Client",
    "Delta",
    "Likelihood",
    "RequestError",
    "api_key_of",
    "ask_each",
    "chat_request",
]
_log = logging.getLogger("tuneloop.models")
T = TypeVar("T")
# Besides these, every 5xx but "not implemented": gateways answer with codes of their own.
_RETRIED = frozenset({408, 425, 429})
_NEVER_RETRIED = frozenset({501, 505})
# Gateways that waited in vain for a server say so; it may have written an answer by then.
_TIMEOUTS = frozenset({408, 504, 524})
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
# A server that asks for a longer pause than this is not waited for.
_LONGEST_RETRY_AFTER_S = 600.0


@dataclass(frozen=True)
class Likelihood:
    """How probable a model finds a continuation.

    Args:
        logprob: Sum over the scored tokens, natural log.
        num_tokens: Tokens scored. The very first token of a text has no context and is not.
        num_bytes: UTF-8 bytes of the scored text; None when token ids were asked for.
    """

    logprob: float
    num_tokens: int
    num_bytes: int | None


class Client:
    """Asks one model at one OpenAI-compatible endpoint.

    Use it as an async context manager; one client serves any number of concurrent requests.

    Args:
        endpoint: Where to ask, and for which model.
        timeout_s: Longest wait for one answer, in seconds.
        retries: Further tries after a failure that may pass (timeouts, 408, 425, 429, 5xx).
        asks_lost_again: Whether that holds where the server may have written an answer that did
            not arrive (timeouts, broken connections). A caller that counts what it pays for asks
            again itself.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        timeout_s: float = 1200.0,
        retries: int = 3,
        asks_lost_again: bool = True,
    ) -> None:
        self.endpoint = endpoint
        self.retries = retries
        self._asks_lost_again = asks_lost_again
        self._counts_completion_tokens = False
        connect_s = min(10.0, timeout_s)
        self._longest_s = connect_s + timeout_s
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        host = urlsplit(endpoint.url).hostname or ""
        self._http = httpx.AsyncClient(
            headers=headers,
            # No pool limit: the caller bounds the requests in flight, and a second, lower bound
            # here would count queueing time as the server's latency.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            timeout=httpx.Timeout(timeout_s, connect=connect_s, pool=None),
            # A proxy set for the internet must not swallow requests to this machine.
            trust_env=host not in {"127.0.0.1", "::1", "localhost"},
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Return the names of the models the endpoint serves.

        Raises:
            EndpointError: No connection, or the endpoint refuses.
            RequestError: The endpoint does not list its models.
        """
        answer = await self._send("GET", "/models", None, retries=0)
        try:
            return [str(item["id"]) for item in answer["data"]]
        except (KeyError, TypeError) as error:
            raise RequestError(f"{self.endpoint.url}/models answered {answer!r:.200}") from error

    async def check(self) -> None:
        """Return when the endpoint answers and serves the model.

        Endpoints that do not list their models are taken at their word.

        Raises:
            EndpointError: No connection, the key is refused, or the model is not served.
        """
        try:
            served = await self.models()
        except RequestError as error:
            _log.info("%s does not list its models: %s", self.endpoint.url, error)
            return
        if self.endpoint.model not in served:
            raise self._unknown_model(served)

    async def generate(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        tools: str = "",
        form: Mapping[str, Any] = MappingProxyType({}),
    ) -> Completion:
        """Return the model's answer to a conversation; every sampling field is sent.

        Calls that the endpoint tells apart from the text follow it, one on each line.

        Args:
            tools: JSON of the tools that may be called, in OpenAI's layout; empty for none.
            form: Further fields of the request, such as `response_format`.

        Raises:
            EndpointError: The endpoint is unusable.
            RequestError: This request got no usable answer.
        """
        body = chat_request(self.endpoint.model, messages, params) | {"stream": False} | dict(form)
        if tools:
            body["tools"] = json.loads(tools)
        if self._counts_completion_tokens:
            body["max_completion_tokens"] = body.pop("max_tokens")
        started = time.perf_counter()
        try:
            answer = await self._send("POST", "/chat/completions", body, self.retries)
        except RequestError as error:
            # Some models know the limit by its newer name only, and say so.
            if "max_tokens" not in body or "max_completion_tokens" not in str(error):
                raise
            self._counts_completion_tokens = True
            body["max_completion_tokens"] = body.pop("max_tokens")
            answer = await self._send("POST", "/chat/completions", body, self.retries)
        latency_s = time.perf_counter() - started
        try:
            choice, usage = answer["choices"][0], _Usage.of(answer)
            reason = choice["finish_reason"]
            message = choice["message"]
            calls = [call_text(call) for call in message.get("tool_calls") or ()]
            # Some servers leave out the content of an answer that only calls.
            content = message.get("content") if calls else message["content"]
            text = "\n".join(filter(None, [content, *calls]))
            logprobs = (
                [float(item["logprob"]) for item in choice["logprobs"]["content"]]
                if params.logprobs
                else None
            )
            probabilities = _probabilities(choice.get("ranking"))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise RequestError(f"not a chat completion: {answer!r:.300}") from error
        if reason not in FINISH_REASONS:
            raise RequestError(f"the answer ended with finish_reason {reason!r}")
        return Completion(
            text=text,
            finish_reason=FINISH_REASONS[reason],
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            latency_s=latency_s,
            # An extension some servers offer; absent elsewhere.
            token_ids=[int(token) for token in choice.get("token_ids") or ()],
            logprobs=logprobs,
            probabilities=probabilities,
        )

    async def complete(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Return how the model continues token ids; for servers that return token ids.

        Raises:
            EndpointError: The endpoint is unusable.
            RequestError: This request got no usable answer.
        """
        body = {
            "model": self.endpoint.model,
            "prompt": list(prompt_ids),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "logprobs": 0 if params.logprobs else None,
            "return_token_ids": True,
        }
        answer = await self._send("POST", "/completions", body, self.retries)
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            return Completion(
                text=choice["text"],
                finish_reason=FINISH_REASONS[choice["finish_reason"]],
                prompt_tokens=int(usage["prompt_tokens"]),
                completion_tokens=int(usage["completion_tokens"]),
                token_ids=[int(token) for token in choice["token_ids"]],
                logprobs=choice["logprobs"]["token_logprobs"] if params.logprobs else None,
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RequestError(f"not a completion with token ids: {answer!r:.300}") from error

    async def stream(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> AsyncIterator[Delta]:
        """Yield the model's answer as it is written; the last piece says how it ended.

        Nothing is tried again: what was shown cannot be taken back.

        Raises:
            EndpointError: The endpoint is unusable.
            RequestError: The request is refused, or the stream breaks off before its end.
        """
        body = chat_request(self.endpoint.model, messages, params)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._http.stream(
                "POST", self._url("/chat/completions"), json=body
            ) as response:
                if response.status_code != 200:
                    await response.aread()
                    await self._raise_if_unusable(response, "/chat/completions")
                    raise RequestError(f"HTTP {response.status_code}: {_reason(response)}")
                async for delta in read_deltas(event_lines(response.aiter_bytes())):
                    yield delta
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise self._unusable("not a URL to ask", str(error)) from error
        except httpx.ConnectError as error:
            raise self._unusable(
                "the model server does not answer", str(error), "start it, or correct the URL"
            ) from error
        except httpx.TransportError as error:
            raise RequestError(f"the answer broke off: {type(error).__name__} {error}") from error

    async def loglikelihood(
        self, context: str | Sequence[int], continuation: str | Sequence[int]
    ) -> Likelihood:
        """Return how probable a continuation is after a context.

        Args:
            context: Text, or token ids. Empty: the continuation's first token is not scored.
            continuation: Text or token ids, like the context. In text, a token that straddles
                the boundary counts as continuation.

        Raises:
            EndpointError: The endpoint is unusable.
            RequestError: This request got no usable answer.
        """
        prompt: str | list[int]
        if isinstance(context, str) and isinstance(continuation, str):
            prompt = context + continuation
        elif not isinstance(context, str) and not isinstance(continuation, str):
            prompt = [*context, *continuation]
        else:
            raise TypeError("context and continuation must both be text or both be token ids")
        body = {
            "model": self.endpoint.model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "echo": True,
            "logprobs": 1,
            "stream": False,
        }
        answer = await self._send("POST", "/completions", body, self.retries)
        try:
            report = answer["choices"][0]["logprobs"]
            chosen = report["token_logprobs"]
            if isinstance(prompt, str):
                num_prompt = int(answer["usage"]["prompt_tokens"])
                positions, num_bytes = _text_positions(report, num_prompt, str(context), prompt)
            else:
                positions, num_bytes = range(len(context), len(prompt)), None
            scored = [position for position in positions if chosen[position] is not None]
            return Likelihood(
                logprob=float(sum(chosen[position] for position in scored)),
                num_tokens=len(scored),
                num_bytes=num_bytes,
            )
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
            raise RequestError(f"no prompt log-probabilities: {answer!r:.300}") from error

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None, retries: int
    ) -> dict[str, Any]:
        failure = ""
        for attempt in range(retries + 1):
            wait_s = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.75, 1.25)
            refused: httpx.TransportError | None = None
            is_lost = is_unsent = False
            try:
                # What is sent byte by byte, to keep the connection, never times out by itself.
                async with asyncio.timeout(self._longest_s):
                    response = await self._http.request(method, self._url(path), json=body)
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise self._unusable("not a URL to ask", str(error)) from error
            except httpx.ConnectError as error:
                failure, refused = f"no connection: {error}", error
            except httpx.ConnectTimeout:
                failure, is_unsent = "no connection in time", True
            except (httpx.TimeoutException, TimeoutError) as error:
                failure, is_lost = f"no answer in time ({type(error).__name__})", True
            except httpx.TransportError as error:
                failure, is_lost = f"{type(error).__name__}: {error}", True
            else:
                if response.status_code == 200:
                    return self._json(response)
                await self._raise_if_unusable(response, path)
                failure = f"HTTP {response.status_code}: {_reason(response)}"
                is_lost = response.status_code in _TIMEOUTS
                if not _may_pass(response.status_code):
                    raise RequestError(failure, refused=True)
                asked_s = retry_after_s(response.headers)
                if asked_s > _LONGEST_RETRY_AFTER_S:
                    raise RequestError(f"{failure}; it asks to come back in {asked_s:.0f} s", True)
                wait_s = max(wait_s, asked_s)
            if is_lost and not self._asks_lost_again:
                raise RequestError(failure, lost=True)
            if attempt < retries:
                _log.debug("%s %s: %s; again in %.1f s", method, path, failure, wait_s)
                await asyncio.sleep(wait_s)
            elif refused is not None:
                raise self._unusable(
                    "the model server does not answer",
                    str(refused),
                    "start it, or correct the URL",
                ) from refused
        tries = f" ({retries + 1} tries)" if retries else ""
        is_refused = is_unsent or (failure.startswith("HTTP ") and not is_lost)
        raise RequestError(f"{failure}{tries}", is_refused, is_lost)

    def _url(self, path: str) -> str:
        return self.endpoint.url.rstrip("/") + path

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError as error:
            raise RequestError(f"the answer is not JSON: {response.text[:200]!r}") from error
        if not isinstance(answer, dict):
            raise RequestError(f"the answer is not a JSON object: {answer!r:.200}")
        return answer

    async def _raise_if_unusable(self, response: httpx.Response, path: str) -> None:
        """Raise `EndpointError` for answers that every further request would get as well."""
        code = response.status_code
        got = f"HTTP {code}: {_reason(response)}"
        if code == 402 or (code == 429 and "insufficient_quota" in response.text):
            raise self._unusable("the account has no money left", got, "pay, or use another key")
        if code in (401, 403):
            key = "the key that was sent" if self.endpoint.api_key else "a request without key"
            raise self._unusable(
                f"the model server refuses {key}", got, "give the endpoint's api_key"
            )
        if code == 404 and path != "/models":
            with contextlib.suppress(RequestError):
                served = await self.models()
                if self.endpoint.model not in served:
                    raise self._unknown_model(served)
            raise self._unusable(
                f"the model server has no {path} for `{self.endpoint.model}`",
                got,
                "check the model's name, and that the URL ends in /v1",
            )

    def _unusable(self, what: str, got: str, remedy: str = "") -> EndpointError:
        return EndpointError.of(what, where=self.endpoint.url, got=got, remedy=remedy)

    def _unknown_model(self, served: list[str]) -> EndpointError:
        return EndpointError.of(
            "the endpoint does not serve this model",
            where=self.endpoint.url,
            got=self.endpoint.model,
            allowed=", ".join(served) or "it serves none",
            remedy="correct the model's name, or serve it",
        )


def api_key_of(variable: str | None, where: str) -> str:
    """Return the key of an endpoint: what an environment variable holds; empty without one.

    Args:
        variable: Its name, as `api_key_env` gives it.
        where: Dotted key of the endpoint.

    Raises:
        ConfigError: It is not set.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError.of(
            "the endpoint's API key is missing",
            where=f"{where}.api_key_env",
            got=f"the environment variable {variable} is not set",
            remedy=f"export {variable}=…, or leave api_key_env out",
        )
    return key


async def ask_each(
    items: Sequence[T], concurrency: int, ask: Callable[[T], Awaitable[None]]
) -> None:
    """Await `ask` for every item, in the given order, at most `concurrency` at a time.

    After the first failure the other requests are withdrawn, not waited for.
    """
    waiting = iter(items)

    async def work() -> None:
        for item in waiting:
            await ask(item)

    workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(items)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def chat_request(model: str, messages: Sequence[Message], params: SamplingParams) -> dict[str, Any]:
    """Return what is sent to ask for an answer; every sampling field is in it."""
    return {
        "model": model,
        "messages": [replace(m, weight=1).as_dict() for m in messages],
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": params.seed,
        # Some servers refuse an empty list.
        "stop": list(params.stop) or None,
        "logprobs": params.logprobs,
    }


def _probabilities(ranking: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the share of each answer that a ranking lists in the probability of all of them.

    Those that it does not list may have what it does not cover.
    """
    if not ranking or ranking["coverage"] <= 0:
        return {}
    logprobs = {one["text"]: float(one["logprob"]) for one in ranking["answers"]}
    best = max(logprobs.values())
    weights = {text: math.exp(logprob - best) for text, logprob in logprobs.items()}
    total = math.fsum(weights.values()) / float(ranking["coverage"])
    return {text: weight / total for text, weight in weights.items()}


def _text_positions(
    report: dict[str, Any], num_prompt: int, context: str, prompt: str
) -> tuple[range, int]:
    """Return the tokens of the continuation that can be scored, and the bytes they stand for."""
    offsets = report["text_offset"][:num_prompt]
    # A token that holds a part of a character only may end where it starts.
    ends = [*offsets[1:], len(prompt)]
    first = next(
        index
        for index, (start, end) in enumerate(zip(offsets, ends, strict=True))
        if start >= len(context) or end > len(context)
    )
    while first < num_prompt and report["token_logprobs"][first] is None:
        first += 1
    scored_text = prompt[offsets[first] :] if first < num_prompt else ""
    return range(first, num_prompt), len(scored_text.encode())


def _reason(response: httpx.Response) -> str:
    """Return the server's own words, shortened."""
    try:
        answer = response.json()
        error = answer.get("error", answer.get("detail", answer))
        message = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = response.text
    return " ".join(str(message).split())[:300] or response.reason_phrase


def _may_pass(status: int) -> bool:
    """Return whether the same request may be answered later."""
    return status in _RETRIED or (500 <= status < 600 and status not in _NEVER_RETRIED)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the pause that `Retry-After` asks for, in seconds: 0 if there is none to keep.

    It is a number of seconds, or a date in one of three forms, which is compared with the
    server's own clock where it tells it.
    Source: RFC 9110, sections 10.2.3 and 5.6.7.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    until, now = _moment(value), _moment(headers.get("date", ""))
    if until is None:
        return 0.0
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


def _moment(value: str) -> datetime | None:
    """Return the time an HTTP date names, or None."""
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    # The oldest form names no zone; all HTTP dates are in UTC.
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class _Usage(NamedTuple):
    """The tokens that an answer says it took; None where it does not say."""

    prompt_tokens: int | None
    completion_tokens: int | None

    @staticmethod
    def of(answer: Mapping[str, Any]) -> _Usage:
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            return _Usage(None, None)
        counts = [usage.get(name) for name in _Usage._fields]
        return _Usage(*(c if isinstance(c, int) and c >= 0 else None for c in counts))
