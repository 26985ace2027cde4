"""Reading an answer that a server streams, as server-sent events of chat chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tuneloop.errors import TuneloopError
from tuneloop.records import FinishReason

FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "stop",
}


class RequestError(TuneloopError):
    """One request got no usable answer; the endpoint itself may be fine.

    Args:
        message: Why.
        refused: The server said no, or was not reached: nothing was computed or is charged.
        lost: The server may have written an answer that did not arrive.
    """

    def __init__(self, message: str, refused: bool = False, lost: bool = False) -> None:
        super().__init__(message)
        self.refused, self.lost = refused, lost


@dataclass(frozen=True)
class Delta:
    """A piece of an answer.

    Args:
        text: To append to what came before.
        finish_reason: On the last piece, whose text is empty; None on all others.
        prompt_tokens: On the last piece, where the server counts them.
        completion_tokens: On the last piece, where the server counts them.
    """

    text: str = ""
    finish_reason: FinishReason | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


async def event_lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Yield the lines of server-sent events.

    httpx's own also end at U+2028 and its like, which JSON leaves within a text as they are.
    """
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").removesuffix("\r")
    if rest:
        yield rest.decode(errors="replace")


async def read_deltas(lines: AsyncIterator[str]) -> AsyncIterator[Delta]:
    """Yield the pieces of one streamed chat completion; exactly one, the last, has its end.

    Raises:
        RequestError: An error event, something that is no chunk, or no end. A replica that dies
            cuts its streams without a word, so a missing end is the only sign of it.
    """
    reason: FinishReason | None = None
    usage: dict[str, int] = {}
    num_chars = 0
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            break
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                error = chunk["error"]
                message = error.get("message", error) if isinstance(error, dict) else error
                raise RequestError(f"the answer broke off: {message}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                if text:
                    num_chars += len(text)
                    yield Delta(text)
                if choice.get("finish_reason") is not None:
                    reason = FINISH_REASONS[choice["finish_reason"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"not a piece of a chat completion: {data:.200}") from error
    if reason is None:
        raise RequestError(f"the answer broke off after {num_chars} characters")
    yield Delta("", reason, usage.get("prompt_tokens"), usage.get("completion_tokens"))
