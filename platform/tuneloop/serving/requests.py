"""What an engine is asked and what it answers: prompts as token ids, answers as token ids.

Templates and tokenizers stay on this side, so whichever engine writes, what was trained is what is
asked. Loads no PyTorch, so that the HTTP side and whoever starts a server are up in a third of the
time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from tuneloop.errors import TuneloopError
from tuneloop.records import Completion, SamplingParams

if TYPE_CHECKING:
    from tuneloop.serving.constraint import Constraint
    from tuneloop.serving.ranking import AnswerTree, RankedAnswer


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
        param: The field that is wrong; None: the prompt.
    """

    def __init__(self, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class QueueFull(TuneloopError):
    """Too many requests wait; try again later."""


@dataclass(frozen=True)
class DecodeResult(Completion):
    """A completion with the scores that were asked for.

    Args:
        scores: One for each of `token_ids`.
        prompt_scores: One for each prompt token but the first, which nothing precedes.
        ranked: The answers that were found among those given, most probable first.
        coverage: Their share of the probability of all answers given, at least.
    """

    scores: list[TokenScore] | None = None
    prompt_scores: list[TokenScore] | None = None
    ranked: Sequence[RankedAnswer] = ()
    coverage: float | None = None


class AnswerForm(NamedTuple):
    """A form that an answer has to have.

    Args:
        text: A JSON schema, a regular expression, a grammar (`grammar`: Lark or GBNF), or a JSON
            list of texts.
        param: The field of the request that asks for it.
    """

    kind: Literal["json", "regex", "grammar", "lark", "choice"]
    text: str
    param: str


@dataclass(frozen=True)
class Ranking:
    """Answers of which the most probable is the answer.

    Args:
        coverage: Find as many of them, the most probable first, as have this share of the
            probability of all; 0: the most probable alone, 1: all.
    """

    tree: AnswerTree
    coverage: float = 0.0


@dataclass(frozen=True)
class Shaping:
    """What changes the model's logits before a token is chosen. The defaults change nothing.

    Args:
        top_k: Only the k likeliest tokens can be drawn; 0: all.
        min_p: Only tokens at least this fraction as likely as the likeliest can be drawn.
        presence_penalty: Subtracted from the logit of each token that has been generated.
        frequency_penalty: Subtracted once for each time the token has been generated.
        repetition_penalty: Divides positive and multiplies negative logits of each token in the
            prompt or the answer (Keskar et al. 2019, §4.1).
        logit_bias: Added to the logits of these token ids.
    """

    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def changes_logits(self) -> bool:
        """Whether the likeliest token may become another."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return bool(self.logit_bias) or any(penalties)


@dataclass(frozen=True)
class DecodeRequest:
    """One prompt to continue.

    Args:
        params: `max_tokens` may be 0 when only the prompt is to be scored.
        num_top: How many of the likeliest tokens each score lists.
        score_prompt: Score the prompt's tokens as well.
        on_token: Called in the engine's thread with each token id as soon as it is chosen, and with
            its score where scores are asked for.
        adapter: One of the engine's adapters; empty: the base weights alone.
        stop_ids: Tokens that end this generation; None: those of the engine.
        decode: Ids to the text that is given, and in which stop strings are looked for; None: as
            the engine does.
        shaping: Penalties, biases and bounds on what is drawn.
        constraint: The form the answer has to have.
        ranking: Answers to choose from by the model's own probabilities, whatever else is asked.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    num_top: int = 0
    score_prompt: bool = False
    on_token: Callable[[int, TokenScore | None], None] | None = None
    adapter: str = ""
    stop_ids: frozenset[int] | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    shaping: Shaping = Shaping()
    constraint: Constraint | None = None
    ranking: Ranking | None = None


@dataclass(frozen=True)
class Activity:
    """What an engine is doing and has done.

    Args:
        running: Sequences in prefill or decode.
        waiting: Requests that wait for a slot.
        prompt_tokens: Tokens of all prompts since the start.
        generated_tokens: Tokens written since the start, stop tokens apart.
    """

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Limits:
    """What an engine can be asked for.

    Args:
        max_length: Tokens of prompt and answer together.
        adapters: Names of the adapters that requests may use.
        is_memory_bound: Memory and not the model is what bounds the length.
    """

    vocab_size: int
    max_length: int
    adapters: frozenset[str] = frozenset()
    is_memory_bound: bool = False

    def check(self, request: DecodeRequest) -> None:
        """Return if the request can be answered.

        Raises:
            InvalidRequest: It can never be.
        """
        ids, params = request.prompt_ids, request.params
        if request.adapter and request.adapter not in self.adapters:
            raise InvalidRequest(f"there is no adapter `{request.adapter}`", param="model")
        if len(ids) == 0:
            raise InvalidRequest("the prompt has no tokens")
        if any(not 0 <= token < self.vocab_size for token in request.shaping.logit_bias):
            raise InvalidRequest(
                f"`logit_bias` has a token id outside the vocabulary of {self.vocab_size}",
                param="logit_bias",
            )
        if params.max_tokens < (0 if request.score_prompt else 1):
            raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
        total = len(ids) + params.max_tokens
        if total > self.max_length:
            limit = "memory holds" if self.is_memory_bound else "the model has"
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens and max_tokens is {params.max_tokens}: "
                f"together {total}, but {limit} {self.max_length} positions",
                "context_length_exceeded",
            )
        tree = request.ranking.tree if request.ranking else None
        if tree is not None and params.max_tokens < tree.longest:
            raise InvalidRequest(
                f"`max_tokens` must be at least {tree.longest} for these answers",
                param="max_tokens",
            )
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise InvalidRequest(f"a token id is outside the vocabulary of {self.vocab_size}")


class DecodeEngine(Protocol):
    """What writes the answers of the models that share some weights.

    Streams are requests with `on_token`, log-probabilities requests with `params.logprobs` and
    `score_prompt`, adapters are named by requests, and a request is cancelled by its future.
    `tests/unit/serving/test_conformance.py` says what all of it means.

    Attributes:
        max_batch_size: Sequences that are decoded together.
        vocab_size: Ids of the model, which may be more than its tokenizer's.
        notice: What whoever asked for the model should know of how it is served; mostly empty.
    """

    max_batch_size: int
    vocab_size: int
    notice: str

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""

    def check(self, request: DecodeRequest) -> None:
        """Return if the request can be answered.

        Raises:
            InvalidRequest: It can never be.
        """

    def submit(self, request: DecodeRequest) -> Future[DecodeResult]:
        """Queue a request and return its future; cancelling the future drops the request.

        Raises:
            InvalidRequest: The request can never be answered.
            QueueFull: Too many requests wait already.
        """

    def activity(self) -> Activity:
        """Return how much there is to do, and how much has been done."""

    def refuse_dead(self) -> None:
        """Return if requests can still be answered.

        Raises:
            TuneloopError: The engine has ended, and another one has to be started.
        """

    def close(self) -> None:
        """Stop; requests that have not ended fail."""
