"""Sends every question of every arm to its endpoint and stores each answer at once."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tuneloop.config import BudgetConfig
from tuneloop.errors import EndpointError, Problem
from tuneloop.evals.scoring.budget import Budget, Sent, cost_of, most
from tuneloop.evals.scoring.constrained import form_schema, has_key, is_wrapped, unwrap
from tuneloop.evals.scoring.questions import Question, messages_json
from tuneloop.evals.scoring.spending import Cost, Entry, Spending, read_entries
from tuneloop.models.client.client import Client, RequestError, ask_each
from tuneloop.models.json_form import has_form
from tuneloop.progress import Progress
from tuneloop.records import (
    Arm,
    Completion,
    Conversation,
    Endpoint,
    FinishReason,
    Message,
    SamplingParams,
)
from tuneloop.text import format_duration

_log = logging.getLogger("tuneloop.evals")
# Raised when a change here changes the answers of the same arm to the same questions.
_REQUEST_VERSION = 1
# Version 1 gave all questions one seed: they drew the same random numbers, and were right and wrong
# together.
_SAMPLED_VERSION = 2
# With pauses that double, a rate limit of an endpoint may last a minute before a question is given
# up; a server of our own has none.
_RETRIES = 7
_OWN_RETRIES = 3


@dataclass(frozen=True)
class ModelAnswer:
    """What came back for one question.

    Args:
        prompt: What was sent, as predictions keep it.
        bits_per_byte: The score of a plain text; None for questions.
        probability: Of the answer among those it was chosen from, if it was.
        error: Why there is no answer; empty when there is one.
        refused: There is no answer, and it is certain that nothing was computed for it.
        lost: There may have been an answer, which did not arrive.
    """

    example_id: str
    prompt: str
    text: str = ""
    finish_reason: FinishReason | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float | None = None
    bits_per_byte: float | None = None
    probability: float | None = None
    error: str = ""
    refused: bool = False
    lost: bool = False


@dataclass(frozen=True)
class EvaluationRequest:
    """One question to one arm.

    Args:
        shots: Solved examples before it.
        of_reference: Ask how probable the reference is, instead of for an answer.
        sample: Number of the answer, where several are sampled.
    """

    arm: Arm
    identity: str
    question: Question
    params: SamplingParams
    shots: tuple[Conversation, ...] = ()
    of_reference: bool = False
    sample: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return self.identity, self.question.example_id

    @property
    def prompt(self) -> str:
        if self.question.text:
            return self.question.text
        # A row's id knows the names of its tools alone.
        sent = messages_json(self.messages, self.question.tools)
        return with_reference(sent, self.question.reference) if self.of_reference else sent

    @property
    def payment_key(self) -> str:
        """What the answer is known by where it is paid for."""
        return f"{self.identity} {self.question.example_id}"

    def kept(self, answer: ModelAnswer) -> dict[str, Any]:
        """Return an answer as the file of answers keeps it."""
        return {"identity": self.identity} | dataclasses.asdict(answer)

    @property
    def form(self) -> Mapping[str, Any]:
        """Fields of the request that give the answer a form; none if it is free."""
        return self.arm.forms.get(self.question.task, {})

    @property
    def messages(self) -> tuple[Message, ...]:
        """What is sent."""
        return self.question.prompt(self.shots)

    @property
    def sent_params(self) -> SamplingParams:
        """How this answer is sampled: each question, and each of its answers, by another seed."""
        if self.params.temperature == 0:
            return self.params
        text = f"{self.params.seed} {self.sample} {self.question.example_id}"
        digest = hashlib.sha256(text.encode()).digest()
        return dataclasses.replace(self.params, seed=int.from_bytes(digest[:4]) >> 1)


def with_reference(prompt: str, reference: str) -> str:
    """Return a prompt, as predictions keep it, with the reference as its answer."""
    turns = [*json.loads(prompt), {"role": "assistant", "content": reference}]
    return json.dumps(turns, ensure_ascii=False)


def arm_identity(arm: Arm, params: SamplingParams, sample: int = 0) -> str:
    """Return what an arm's answers depend on besides the question, as hexadecimal digits.

    Args:
        arm: Who answers.
        params: How answers are sampled.
        sample: Number of the answer, where several are sampled.
    """
    if arm.models:
        each = [arm_identity(model, params, sample) for model in arm.models]
        return hashlib.sha256(json.dumps(each).encode()).hexdigest()[:32]
    model = arm.model_fingerprint or f"{arm.endpoint.url} {arm.endpoint.model}"
    parts: dict[str, Any] = {
        "version": _SAMPLED_VERSION if params.temperature > 0 else _REQUEST_VERSION,
        "model": model,
        "shots": [messages_json(shot.messages) for shot in arm.shots],
        "sampling": dataclasses.asdict(params),
    }
    if arm.chosen_by:
        parts["choose"] = arm.chosen_by
    if arm.forms:
        parts["forms"] = arm.forms
        if arm.answer_key and any(has_key(f, arm.answer_key) for f in arm.forms.values()):
            # Answers of before were cut to this property.
            parts["records"] = "whole"
    if sample:
        parts["sample"] = sample
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class PartialAnswers:
    """The answers a run has so far, in a file that a killed run leaves for the next one.

    Failed requests are asked again; what they have cost counts.

    Args:
        path: A JSON Lines file; a last line cut off by a crash is ignored. None: nothing is kept.

    Attributes:
        spending: What the answers in the file have cost, with those that were lost.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._answers: dict[tuple[str, str], ModelAnswer] = {}
        self._spending = Spending(path) if path else None
        if path is not None:
            self.read(path)

    @property
    def spending(self) -> Spending:
        assert self._spending is not None, "answers that cost something are kept in a file"
        return self._spending

    def read(self, path: Path) -> None:
        """Keep in memory what such a file holds; nothing if it is not there."""
        for entry in read_entries(path):
            if entry.reply is None or entry.reply.get("error"):
                continue
            fields = dict(entry.reply)
            self.put(fields.pop("identity"), ModelAnswer(**fields))

    def __len__(self) -> int:
        return len(self._answers)

    def put(self, identity: str, answer: ModelAnswer) -> None:
        """Keep an answer in memory, for example one of an earlier evaluation."""
        self._answers[identity, answer.example_id] = answer

    def get(self, request: EvaluationRequest) -> ModelAnswer | None:
        """Return the answer to exactly this request, or None."""
        answer = self._answers.get(request.key)
        return answer if answer is not None and answer.prompt == request.prompt else None

    def add(self, request: EvaluationRequest, answer: ModelAnswer) -> None:
        """Keep an answer that cost nothing in the file and in memory."""
        self.spending.add(Entry(request.payment_key, Cost(), request.kept(answer)))
        self.put(request.identity, answer)


def ask_all(
    requests: Sequence[EvaluationRequest],
    answered: PartialAnswers,
    concurrency: int,
    limits: BudgetConfig,
    score: Callable[[EvaluationRequest, ModelAnswer], float | None],
) -> list[ModelAnswer]:
    """Return an answer for every request; those already answered are not asked again.

    Args:
        requests: All questions of all arms.
        answered: Answers of an interrupted run or an earlier evaluation; new ones are added.
        concurrency: Requests in flight.
        limits: What endpoints may cost, with what `answered` has spent already.
        score: The primary metric of an answer, for the progress lines.

    Raises:
        EndpointError: An endpoint is unusable, the budget is used up, or every request of an arm
            failed. Answers that did come are kept in `answered`.
    """
    todo = [request for request in requests if answered.get(request) is None]
    if len(todo) < len(requests):
        _log.info("%d of %d answers exist already", len(requests) - len(todo), len(requests))
    failed: dict[tuple[str, str], ModelAnswer] = {}
    for arm in {r.arm.name: r.arm for r in todo if r.arm.answer}.values():
        _answer_itself(arm, [r for r in todo if r.arm.name == arm.name], answered, failed)
    # Two arms that ask the same of the same model are answered once.
    todo = list({request.key: request for request in todo if not request.arm.answer}.values())
    budget = Budget(limits, answered.spending)
    asking = _Asking(answered, failed, concurrency, budget, score)
    asking.ask([request for request in todo if not request.form])
    asking.ask([r for r in todo if r.form and not _take_over(r, answered)])
    _refuse_dead_arms(requests, failed)
    return [answered.get(request) or failed[request.key] for request in requests]


class _Asking(NamedTuple):
    """How questions are asked, and where their answers go."""

    answered: PartialAnswers
    failed: dict[tuple[str, str], ModelAnswer]
    concurrency: int
    budget: Budget
    score: Callable[[EvaluationRequest, ModelAnswer], float | None]

    def ask(self, todo: Sequence[EvaluationRequest]) -> None:
        """Ask, and keep each answer as it comes."""
        if not todo:
            return
        with Progress("evaluate", len(todo), "answers") as progress:
            running = _RunningScores(todo, self.concurrency, self.score)

            def keep(request: EvaluationRequest, answer: ModelAnswer) -> None:
                if answer.error:
                    self.failed[request.key] = answer
                elif request.arm.model_fingerprint:
                    self.answered.add(request, answer)
                else:  # it is in the file, with what it has cost
                    self.answered.put(request.identity, answer)
                running.report(request, answer, progress)

            asyncio.run(_ask(todo, self.concurrency, self.budget, keep))


def _take_over(request: EvaluationRequest, answered: PartialAnswers) -> bool:
    """Take a free answer for the bound one if it has the form; return whether it has.

    A greedy model of our own writes it again: what may follow is ruled out, nothing else changes.
    """
    schema = form_schema(request.form)
    if schema is None or not request.arm.model_fingerprint or request.params.temperature > 0:
        return False
    free = arm_identity(dataclasses.replace(request.arm, forms={}), request.params)
    answer = answered.get(dataclasses.replace(request, identity=free))
    if answer is None or answer.finish_reason != "stop" or not has_form(answer.text, schema):
        return False
    answered.put(request.identity, answer)
    return True


def _answer_itself(
    arm: Arm,
    requests: Sequence[EvaluationRequest],
    answered: PartialAnswers,
    failed: dict[tuple[str, str], ModelAnswer],
) -> None:
    """Add the answers of an arm that makes them itself; those it does not have are failures."""
    assert arm.answer is not None
    started = time.perf_counter()
    texts = arm.answer([request.question for request in requests])
    latency_s = (time.perf_counter() - started) / len(requests)
    for request in requests:
        answer = ModelAnswer(request.question.example_id, request.prompt)
        text = texts.get(answer.example_id)
        if text is None:
            failed[request.key] = dataclasses.replace(answer, error="there is no answer to it")
        else:
            answer = dataclasses.replace(answer, text=text, finish_reason="stop")
            # How long an answer took that was made elsewhere is not known.
            latency = None if arm.endpoint.url else latency_s
            answered.put(request.identity, dataclasses.replace(answer, latency_s=latency))


async def _ask(
    todo: Sequence[EvaluationRequest],
    concurrency: int,
    budget: Budget,
    keep: Callable[[EvaluationRequest, ModelAnswer], None],
) -> None:
    """Ask in the given order with at most `concurrency` requests in flight."""
    async with AsyncExitStack() as stack:
        clients: dict[str, Client] = {}
        checked: set[Endpoint] = set()
        for arm in {request.arm.name: request.arm for request in todo}.values():
            # What is lost on its way here is asked again by the budget, which counts each try.
            client = (
                Client(arm.endpoint, arm.timeout_s, _OWN_RETRIES)
                if arm.model_fingerprint
                else Client(arm.endpoint, arm.timeout_s, _RETRIES, asks_lost_again=False)
            )
            clients[arm.name] = await stack.enter_async_context(client)
            if arm.endpoint not in checked:
                await client.check()
                checked.add(arm.endpoint)

        async def ask(request: EvaluationRequest) -> None:
            # What is on its way is paid for: it is waited for, and nothing more is sent.
            if not budget.failures:
                try:
                    answer = await answer_of(request)
                    if answer is not None:
                        keep(request, answer)
                except Exception as error:
                    budget.failures.append(error)

        async def answer_of(request: EvaluationRequest) -> ModelAnswer | None:
            client, answer = clients[request.arm.name], None
            if request.arm.model_fingerprint:  # a model of our own
                return await _answer(client, request)

            async def send() -> Sent:
                nonlocal answer
                answer = await _answer(client, request)
                return Sent(request.kept(answer), _cost(request, answer), answer.lost)

            await budget.buy(request.payment_key, _most(request), send)
            return answer

        await ask_each(todo, concurrency, ask)
        if budget.failures:
            raise budget.failures[0]


def _most(request: EvaluationRequest) -> Cost:
    if request.question.text:
        return most(request.arm.price, [request.question.text], 1)
    texts = [message.text for message in request.messages]
    # Tools and the form are part of the prompt.
    texts += [request.question.tools] if request.question.tools else []
    texts += [json.dumps(dict(request.form))] if request.form else []
    return most(request.arm.price, texts, request.params.max_tokens)


def _cost(request: EvaluationRequest, answer: ModelAnswer) -> Cost:
    """Return what an answer has cost; the most it can have where its tokens were not counted."""
    if answer.refused:
        return Cost()
    if answer.prompt_tokens is None or answer.completion_tokens is None:
        return _most(request)
    if request.question.text:  # its first token is not scored, and a token follows
        return cost_of(request.arm.price, answer.prompt_tokens + 1, 1)
    return cost_of(request.arm.price, answer.prompt_tokens, answer.completion_tokens)


async def _answer(client: Client, request: EvaluationRequest) -> ModelAnswer:
    example_id, prompt = request.question.example_id, request.prompt
    try:
        if request.of_reference:
            return await _probability_of_reference(client, request)
        if request.question.text:
            started = time.perf_counter()
            likelihood = await client.loglikelihood("", request.question.text)
            if not likelihood.num_tokens or not likelihood.num_bytes:
                return ModelAnswer(example_id, prompt, error="the text is a single token")
            return ModelAnswer(
                example_id,
                prompt,
                finish_reason="stop",
                prompt_tokens=likelihood.num_tokens,
                completion_tokens=0,
                latency_s=time.perf_counter() - started,
                bits_per_byte=-likelihood.logprob / math.log(2) / likelihood.num_bytes,
            )
        completion = await client.generate(
            request.messages, request.sent_params, request.question.tools, request.form
        )
    except RequestError as error:
        _log.warning("%s, example %s is unscored: %s", request.arm.name, example_id, error)
        return ModelAnswer(
            example_id, prompt, error=str(error), refused=error.refused, lost=error.lost
        )
    text, key = completion.text, request.arm.answer_key
    return ModelAnswer(
        example_id,
        prompt,
        text=unwrap(text, key) if is_wrapped(request.form, key) else text,
        finish_reason=completion.finish_reason,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        latency_s=completion.latency_s,
        probability=_probability(request, completion),
    )


async def _probability_of_reference(client: Client, request: EvaluationRequest) -> ModelAnswer:
    assert request.arm.encode is not None
    answer = Message("assistant", request.question.reference)
    before = [
        dataclasses.replace(m, weight=0) if m.role == "assistant" else m for m in request.messages
    ]
    sample = request.arm.encode([*before, answer], request.question.tools)
    start = list(sample.loss_mask).index(1)
    started = time.perf_counter()
    likelihood = await client.loglikelihood(sample.input_ids[:start], sample.input_ids[start:])
    size = len(request.question.reference.encode())
    return ModelAnswer(
        request.question.example_id,
        request.prompt,
        finish_reason="stop",
        prompt_tokens=start,
        completion_tokens=likelihood.num_tokens,
        latency_s=time.perf_counter() - started,
        bits_per_byte=-likelihood.logprob / math.log(2) / size,
    )


def _probability(request: EvaluationRequest, completion: Completion) -> float | None:
    """Return the probability of the answer among those it was chosen from, if it is known."""
    if not request.form.get("ranking", {}).get("coverage"):
        return None  # the search went no further than the answer
    return next(iter(completion.probabilities.values()), None)


def _refuse_dead_arms(
    requests: Sequence[EvaluationRequest], failed: Mapping[tuple[str, str], ModelAnswer]
) -> None:
    """Raise when an arm has no answer at all: a score of nothing must not be published."""
    problems = []
    for arm in {request.arm.name: request.arm for request in requests}.values():
        asked = [request for request in requests if request.arm.name == arm.name]
        errors = [failed[request.key].error for request in asked if request.key in failed]
        if len(errors) == len(asked):
            reason, count = Counter(errors).most_common(1)[0]
            shots = "; fewer or shorter shots (evaluation.num_shots) make the prompt shorter"
            place = f"{arm.endpoint.url}, model {arm.endpoint.model}"
            remedy = f"look at the server's log{shots if arm.shots or arm.choose else ''}"
            problems.append(
                Problem(
                    f"no question of `{arm.name}` was answered",
                    where=arm.endpoint.url if arm.answer else place,
                    got=f"{count} of {len(errors)} times: {reason}",
                    remedy="give answers to the rows that are scored" if arm.answer else remedy,
                )
            )
    EndpointError.refuse(problems)


class _RunningScores:
    """What the progress line says: done, rate, time left, running score of the arm."""

    def __init__(
        self,
        todo: Sequence[EvaluationRequest],
        concurrency: int,
        score: Callable[[EvaluationRequest, ModelAnswer], float | None],
    ) -> None:
        self.total = len(todo)
        self.concurrency = concurrency
        self.totals_by_arm = Counter(request.arm.name for request in todo)
        self.score = score
        self.done = self.tokens = 0
        self.score_sums: dict[str, float] = {}
        self.num_scored: Counter[str] = Counter()
        self.done_by_arm: Counter[str] = Counter()
        self.started = time.monotonic()

    def report(self, request: EvaluationRequest, answer: ModelAnswer, progress: Progress) -> None:
        name = request.arm.name
        self.done += 1
        self.done_by_arm[name] += 1
        self.tokens += (answer.completion_tokens or 0) or (answer.prompt_tokens or 0)
        score = None if answer.error else self.score(request, answer)
        if score is not None:
            self.score_sums[name] = self.score_sums.get(name, 0.0) + score
            self.num_scored[name] += 1
        elapsed = max(time.monotonic() - self.started, 1e-9)
        num_scored = self.num_scored[name]
        mean = f"{self.score_sums[name] / num_scored:.3f}" if num_scored else "unknown"
        progress.update(self.done, f"{name} {mean}")
        # The first answers come late and all together: they say nothing about the rate.
        left = format_duration(elapsed / self.done * (self.total - self.done))
        progress.log(
            _log,
            "evaluation %d/%d, %.0f tokens/s%s; %s %d/%d, score so far %s",
            self.done,
            self.total,
            self.tokens / elapsed,
            f", {left} left" if self.done > self.concurrency else "",
            name,
            self.done_by_arm[name],
            self.totals_by_arm[name],
            mean,
            now=self.done_by_arm[name] == self.totals_by_arm[name],
        )
