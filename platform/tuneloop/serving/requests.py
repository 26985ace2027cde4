"""What the decode engine is asked and what it answers.

Loads no PyTorch, so that the HTTP side and whoever starts a server are up in a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuneloop.errors import TuneloopError
from tuneloop.records import Completion, SamplingParams


@dataclass(frozen=True)
class TokenScore:
    """What the model thought of one token.

    Args:
        logprob: Natural log of the token's probability at temperature 1.
        top: The likeliest tokens at this position, best first, as (token id, logprob).
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class InvalidRequest(ValueError):
    """One request cannot be answered; the others go on. The message says why.

    Args:
        code: Short machine-readable reason, as OpenAI has it.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class QueueFull(TuneloopError):
    """Too many requests wait; try again later."""


@dataclass(frozen=True)
class DecodeResult(Completion):
    """A completion with the scores that were asked for.

    Args:
        scores: One for each of `token_ids`.
        prompt_scores: One for each prompt token but the first, which nothing precedes.
    """

    scores: list[TokenScore] | None = None
    prompt_scores: list[TokenScore] | None = None


@dataclass(frozen=True)
class DecodeRequest:
    """One prompt to continue.

    Args:
        params: `max_tokens` may be 0 when only the prompt is to be scored.
        num_top: How many of the likeliest tokens each score lists.
        score_prompt: Score the prompt's tokens as well.
        on_token: Called in the engine's thread with each token id as soon as it is chosen.
        adapter: One of the engine's adapters; empty: the base weights alone.
        stop_ids: Tokens that end this generation; None: those of the engine.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    num_top: int = 0
    score_prompt: bool = False
    on_token: Callable[[int], None] | None = None
    adapter: str = ""
    stop_ids: frozenset[int] | None = None
