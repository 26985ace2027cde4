"""The records that travel between rooms.

Shape legend used in docstrings: B batch, T tokens, N target tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length"]
Status = Literal["scored", "unscored"]

# The arms that every run compares, and the names of the first and the last on the server.
BASE, FEW_SHOT, SIMPLE, FINETUNED = "base", "base+few-shot", "simple", "finetuned"
# The same models, whose answers can only be labels, or JSON under its schema.
BASE_CONSTRAINED, FINETUNED_CONSTRAINED = "base+constrained", "finetuned+constrained"
ARMS = (BASE, FEW_SHOT, BASE_CONSTRAINED, SIMPLE, FINETUNED_CONSTRAINED, FINETUNED)

# How the reason of train rows that `data.num_train_examples` leaves out begins, also in the card.
TRAIN_LIMIT = "not among the first"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, in OpenAI's layout.

    Args:
        content: Its text; may be empty beside `tool_calls`, and as a tool's result.
        tool_calls: JSON of the calls: a list of `{"id", "type", "function": {"name", "arguments"}}`
            with `arguments` as JSON text. Empty: none.
        tool_call_id: The call that a tool's message answers.
        name: Of the participant or tool.
        reasoning_content: What the assistant thought before it answered.
        weight: 0 for an answer that is context only, 1 for one to learn.
    """

    role: Role
    content: str
    tool_calls: str = ""
    tool_call_id: str = ""
    name: str = ""
    reasoning_content: str = ""
    weight: int = 1

    @staticmethod
    def of(turn: Mapping[str, Any]) -> Message:
        """Return the message that a dataset's row or `as_dict` holds."""
        calls = turn.get("tool_calls")
        texts = {name: turn.get(name) or "" for name in _MORE_TEXTS}
        return Message(
            turn["role"],
            turn["content"] or "",
            tool_calls=json.dumps(calls, ensure_ascii=False) if calls else "",
            weight=0 if turn.get("weight") == 0 else 1,
            **texts,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the message in OpenAI's layout, without fields that say nothing."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = self.calls
        turn |= {name: value for name in _MORE_TEXTS if (value := getattr(self, name))}
        return turn if self.weight else turn | {"weight": 0}

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tool calls."""
        found: list[dict[str, Any]] = json.loads(self.tool_calls) if self.tool_calls else []
        return found

    @property
    def text(self) -> str:
        """What the message says: its content, then its calls as JSON, one on each line."""
        return "\n".join(part for part in [self.content, *map(call_text, self.calls)] if part)


_MORE_TEXTS = ("tool_call_id", "name", "reasoning_content")


def call_text(call: Mapping[str, Any]) -> str:
    """Return a tool call as `{"name": …, "arguments": {…}}`, the form most templates write."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        arguments = function["arguments"]
    text = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    # Half a surrogate pair, which a model may write as an escape, stays one: it is no text.
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the answer to learn.

    Args:
        messages: At least one user and one assistant message; the last is the assistant's.
        row_id: Stable hash of source and content.
        source: Where the row came from, `path:line`.
        task: Name of its task in a mixture; empty otherwise.
        tools: JSON of the tools that may be called, a list in OpenAI's layout; empty for none.
    """

    messages: tuple[Message, ...]
    row_id: str = ""
    source: str = ""
    task: str = ""
    tools: str = ""


@dataclass(frozen=True)
class Sample:
    """Token ids with the positions to learn.

    Args:
        input_ids: Shape (T,).
        loss_mask: Shape (T,); 1 where the token is a target, 0 where it is context.
    """

    input_ids: list[int]
    loss_mask: list[int]


@dataclass(frozen=True)
class SamplingParams:
    """Everything that shapes a generation. All of it is sent and logged; servers add no defaults.

    Args:
        max_tokens: Upper bound of generated tokens, at least 1.
        temperature: 0 is greedy decoding.
        top_p: Nucleus probability in (0, 1].
        seed: Seed of the sampler when `temperature` > 0.
        stop: Strings that end the generation; they are not part of the text.
        logprobs: Return the log-probability of each generated token.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Args:
        text: Decoded without special tokens.
        token_ids: Shape (T,), the generated ids without the stop token.
        finish_reason: `stop` when the model ended by itself, `length` when it was cut off.
        prompt_tokens: None where the server does not count them.
        completion_tokens: None where the server does not count them.
        logprobs: Shape (T,), natural log, when asked for.
        probabilities: Of the answers it was chosen from, the most probable first, as far as they
            were looked at: of all of them at least 99%, when asked for. Empty otherwise.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int | None
    completion_tokens: int | None
    latency_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parity:
    """How closely exported and served forms of a trained model match the live model.

    Args:
        passed: No difference is larger than rounding explains.
        prompts: Number of prompts compared.
        tokens: Number of generated tokens compared.
        max_abs_logprob_diff: Largest difference over all arms, prompts and tokens.
        greedy_equal: Every arm picks the live model's token everywhere.
        num_ties: Differing picks where the live model's two best tokens were within the tolerance.
        tolerance: Largest difference of log-probabilities that rounding explains.
        arms: The largest difference by form: `adapter`, `merged`, `served`.
    """

    passed: bool
    prompts: int
    tokens: int
    max_abs_logprob_diff: float
    greedy_equal: bool
    num_ties: int
    tolerance: float
    arms: dict[str, float]


@dataclass(frozen=True)
class Endpoint:
    """A model on an OpenAI-compatible server.

    Args:
        url: Base URL, ending in `/v1`.
    """

    url: str
    model: str
    api_key: str = ""


class Price(NamedTuple):
    """What a model charges, in one currency for a million tokens."""

    input: float
    output: float


class Vote(NamedTuple):
    """A human's judgement of two answers.

    Args:
        evaluation: Reference of the evaluation whose answers were seen.
        score: 1 where the answer of `arm` is better, 0 where that of `other` is, 0.5 for neither.
    """

    evaluation: str
    example_id: str
    arm: str
    other: str
    score: float
    reviewer: str


@dataclass(frozen=True)
class Arm:
    """One way of answering the test set, for example `base`, `base+few-shot`, `finetuned`.

    Args:
        shots: Solved examples before each question of their task, as user and assistant turns.
        model_fingerprint: Identity of weights, tokenizer and chat template. Answers are reused
            only between arms whose fingerprints are equal; without one, the endpoint's URL and
            model name stand for it.
        parity: How closely the served model matches the trained one; None if not recorded.
        answer: Makes all answers itself, by example id, from the questions; the endpoint is not
            asked.
        choose: Chooses solved examples for each question, by example id, in place of `shots`.
        chosen_by: Identity of what `choose` does.
        trained_on: Identity of the train rows that the answers were learned from; empty if unknown.
        find_seen: Returns the ids of the questions that these rows hold.
        encode: Returns ids and loss mask of a conversation as the model reads it, with the last
            answer as the only target, from messages and JSON of tools; None where that is unknown.
        tokenizer: Directory with the tokenizer of a model that is served here.
        price: What the endpoint charges; None if nothing or unknown.
        timeout_s: Longest wait for one answer, in seconds.
        forms: What else is asked for, by task: fields of the request that give the answer a form.
        answer_key: The property of a JSON answer that is the answer itself; empty: all of it is.
        models: Trainings of one recipe with other seeds, which all answer in place of this arm; the
            endpoint is not asked then.
    """

    name: str
    endpoint: Endpoint
    shots: tuple[Conversation, ...] = ()
    model_fingerprint: str = ""
    parity: Parity | None = None
    answer: Callable[[Sequence[Any]], Mapping[str, str]] | None = None
    choose: Callable[[Sequence[Any]], Mapping[str, tuple[Conversation, ...]]] | None = None
    chosen_by: str = ""
    trained_on: str = ""
    find_seen: Callable[[Sequence[Any]], Set[str]] | None = field(default=None, compare=False)
    encode: Callable[[Sequence[Message], str], Sample] | None = field(default=None, compare=False)
    tokenizer: Path | None = field(default=None, compare=False)
    price: Price | None = None
    timeout_s: float = 1200.0
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    answer_key: str = ""
    models: tuple[Arm, ...] = ()

    @property
    def each(self) -> tuple[Arm, ...]:
        """Who answers: the models, or the arm itself."""
        return self.models or (self,)

    def changed(self, change: Callable[[Arm], Arm]) -> Arm:
        """Return the arm with a change to each that answers."""
        if not self.models:
            return change(self)
        return replace(self, models=tuple(change(model) for model in self.models))
