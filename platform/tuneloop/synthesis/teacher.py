"""Asking a larger model, within a budget: every reply is paid for once, also through a crash."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tuneloop.config import BudgetConfig
from tuneloop.errors import EndpointError, Problem
from tuneloop.evals.scoring.budget import Budget, BudgetError, Cost, cost_of, most
from tuneloop.models.client.client import Client, RequestError, ask_each
from tuneloop.progress import Progress
from tuneloop.records import Endpoint, Message, Price, SamplingParams

logger = logging.getLogger("tuneloop.data")

# With pauses that double, a rate limit may last a minute before a request is given up.
_RETRIES = 7
# A reply that did not arrive may have been paid for, so each further try counts in the budget.
_LOST_RETRIES = 2
_NO_FORM = ("HTTP 400", "HTTP 422")


@dataclass(frozen=True)
class Reply:
    """What a model wrote; `error` says why it wrote nothing.

    Args:
        prompt_tokens: None where the server does not count them.
        completion_tokens: Likewise.
    """

    text: str = ""
    finish_reason: str = ""
    error: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Asked:
    """A request.

    Args:
        form: Fields of the request that give the answer a form; endpoints that refuse them are
            asked without.
    """

    messages: tuple[Message, ...]
    params: SamplingParams
    form: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def key(self, endpoint: Endpoint) -> str:
        """Return what the reply depends on, as 32 hexadecimal digits."""
        parts = [
            endpoint.url.rstrip("/"),
            endpoint.model,
            [message.as_dict() for message in self.messages],
            vars(self.params),
            dict(self.form),
        ]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


class Replies:
    """The replies so far and what they cost, in a file that a killed run leaves for the next one.

    A request is noted before it is sent: one whose reply a crash lost counts with the most that it
    can have cost, so that the budget holds whatever happens. Failed requests count and are asked
    again.

    Args:
        path: A JSON Lines file; a last line cut off by a crash is ignored.
        earlier: Files of earlier data sets, whose replies are used again and cost nothing now.

    Attributes:
        spent: What the requests of this file have cost.
        num_requests: How many they are, those that failed included.
        num_lost: Of them, how many a crash left without a reply: they may be paid for twice.
        lost: The most that those can have cost; it is part of `spent`.
    """

    def __init__(self, path: Path, earlier: Sequence[Path] = ()) -> None:
        self.path = path
        self.spent = Cost()
        self.num_requests = 0
        self._replies: dict[str, Reply] = {}
        sent: dict[str, list[Cost]] = {}
        for record in _records(path):
            if record.reply is None:
                sent.setdefault(record.key, []).append(record.cost)
                continue
            if not record.is_earlier and sent.get(record.key):
                # What a reply has cost settles one note: an earlier one may be of a lost reply.
                sent[record.key].pop()
            self._keep(record)
        lost = [cost for costs in sent.values() for cost in costs]
        self.num_lost, self.lost = len(lost), sum(lost, Cost())
        self.spent += self.lost
        self.num_requests += self.num_lost
        self._earlier = {
            record.key: record.reply
            for file in earlier
            for record in _records(file)
            if record.reply is not None and not record.reply.error
        }

    def _keep(self, record: _Record) -> None:
        assert record.reply is not None
        self.spent += record.cost
        self.num_requests += not record.is_earlier
        if not record.reply.error:
            self._replies[record.key] = record.reply

    def get(self, key: str) -> Reply | None:
        """Return the reply to a request, or None."""
        if key not in self._replies and (reply := self._earlier.get(key)) is not None:
            self._add(_Record(key, Cost(), reply, is_earlier=True))
        return self._replies.get(key)

    def note(self, key: str, cost: Cost) -> None:
        """Write down that a request is about to be sent, with the most that it can cost."""
        self._write(_Record(key, cost, None))

    def add(self, key: str, reply: Reply, cost: Cost) -> None:
        """Keep a reply, or that there is none, with what it has cost."""
        self._add(_Record(key, cost, reply))

    def _add(self, record: _Record) -> None:
        self._write(record)
        self._keep(record)

    def _write(self, record: _Record) -> None:
        line = json.dumps(
            {
                "key": record.key,
                "cost": [record.cost.tokens, record.cost.money],
                "reply": vars(record.reply) if record.reply else None,
                "earlier": record.is_earlier,
            }
        )
        with self.path.open("a", encoding="utf-8") as file:
            # A line that a crash cut off stays by itself.
            file.write(f"\n{line}\n")


class _Record(NamedTuple):
    """A line of the file: a request that is about to be sent, or its reply."""

    key: str
    cost: Cost
    reply: Reply | None
    is_earlier: bool = False


def _records(path: Path) -> Iterator[_Record]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found = json.loads(line)
            reply = None if found["reply"] is None else Reply(**found["reply"])
            yield _Record(found["key"], Cost(*found["cost"]), reply, bool(found.get("earlier")))
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a crash


class Rates(NamedTuple):
    """How fast a model is asked: requests in flight, and most begun in a minute; None: any."""

    concurrency: int
    per_minute: float | None = None


class Teacher:
    """A model on a server, and what it may cost.

    Args:
        endpoint: Where to ask, and for which model.
        price: What it charges; None if nothing or unknown.
        rates: How fast it is asked.
        limits: What all requests together may cost, those of earlier runs included.
        replies: What it has said so far.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        price: Price | None,
        rates: Rates,
        limits: BudgetConfig,
        replies: Replies,
    ) -> None:
        self.endpoint, self.price, self.rates = endpoint, price, rates
        self.limits, self.replies = limits, replies
        self.stopped: Problem | None = None
        self.errors: Counter[str] = Counter()
        self._takes_forms = True

    def reply(self, asked: Asked) -> Reply | None:
        """Return what was replied; None if nothing was."""
        return self.replies.get(asked.key(self.endpoint))

    def ask(self, requests: Sequence[Asked], may_fail: bool = False) -> None:
        """Ask what has no reply yet. Where the budget ends, the rest is not asked.

        Args:
            requests: In this order.
            may_fail: Replies to other requests are there: these may all fail.

        Raises:
            EndpointError: The endpoint is unusable, or replied to nothing.
        """
        unique = {request.key(self.endpoint): request for request in requests}
        todo = {key: one for key, one in unique.items() if self.replies.get(key) is None}
        if len(todo) < len(unique):
            logger.info("%d of %d replies are already there", len(unique) - len(todo), len(unique))
        if todo and self.stopped is None:
            with Progress("asking", len(todo), "replies") as progress:
                asyncio.run(self._ask(todo, progress))
        failures = self.errors.total()
        if failures and not may_fail and not any(self.replies.get(key) for key in unique):
            reason, count = self.errors.most_common(1)[0]
            raise EndpointError(
                Problem(
                    "no request was answered",
                    where=f"{self.endpoint.url}, model {self.endpoint.model}",
                    got=f"{count} of {failures} times: {reason}",
                    remedy="look at the server's log",
                )
            )

    async def _ask(self, todo: Mapping[str, Asked], progress: Progress) -> None:
        budget = Budget(self.limits, self.replies.spent, "generation.budget")
        pace, started, num_done = _Pace(self.rates.per_minute), time.monotonic(), 0
        failures: list[Exception] = []
        async with Client(self.endpoint, retries=_RETRIES, asks_lost_again=False) as client:
            await client.check()

            async def send(key: str) -> bool:
                """Ask once; return whether it may be asked again: the reply did not arrive."""
                request = todo[key]
                # The form is part of the prompt on some servers.
                texts = [m.text for m in request.messages]
                texts += [json.dumps(dict(request.form))] if request.form else []
                reserved = most(self.price, texts, request.params.max_tokens)
                try:
                    await budget.reserve(reserved)
                except BudgetError as error:
                    failures.append(error)
                    return False
                cost, is_lost = reserved, False
                try:
                    await pace.wait()
                    self.replies.note(key, reserved)
                    said = await self._said(client, request)
                    cost, is_lost = self._cost(said, reserved), said.is_lost
                    self.replies.add(key, said.reply, cost)
                except EndpointError as error:
                    failures.append(error)
                    cost = Cost()
                    self.replies.add(key, Reply(error=str(error)), cost)
                finally:
                    await budget.settle(reserved, cost)
                return is_lost

            async def ask(key: str) -> None:
                nonlocal num_done
                for _ in range(1 + _LOST_RETRIES):
                    # What is on its way is paid for: it is waited for, and nothing more is sent.
                    if failures:
                        return
                    if not await send(key):
                        break
                num_done += 1
                progress.update(num_done)
                left = (time.monotonic() - started) / num_done * (len(todo) - num_done)
                line = "asked %d/%d, %s tokens so far, %.0f s left"
                tokens = f"{self.replies.spent.tokens:,}"
                is_last = num_done == len(todo)
                progress.log(logger, line, num_done, len(todo), tokens, left, now=is_last)

            await ask_each(list(todo), self.rates.concurrency, ask)
        for failure in failures:
            if not isinstance(failure, BudgetError):
                raise failure
        if failures:
            assert isinstance(failures[0], BudgetError)
            self.stopped = failures[0].problems[0]
            logger.warning("%s", self.stopped)

    async def _said(self, client: Client, request: Asked) -> _Said:
        form = request.form if self._takes_forms else {}
        try:
            completion = await client.generate(request.messages, request.params, form=form)
        except RequestError as error:
            if form and error.refused and str(error).startswith(_NO_FORM):
                if self._takes_forms:
                    logger.warning("answers have no enforced form: the server says %s", error)
                self._takes_forms = False
                return await self._said(client, request)
            self.errors[str(error)] += 1
            logger.warning("no reply: %s", error)
            return _Said(Reply(error=str(error)), error.refused, error.lost)
        counts = completion.prompt_tokens, completion.completion_tokens
        return _Said(Reply(completion.text, completion.finish_reason, "", *counts))

    def _cost(self, said: _Said, reserved: Cost) -> Cost:
        """Return what a reply has cost; the most it can have where its tokens were not counted."""
        if said.was_refused:
            return Cost()
        reply = said.reply
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            return reserved
        return cost_of(self.price, reply.prompt_tokens, reply.completion_tokens)


class _Said(NamedTuple):
    """A reply.

    Args:
        was_refused: It is certain that nothing was computed for it.
        is_lost: It may have been written, and did not arrive.
    """

    reply: Reply
    was_refused: bool = False
    is_lost: bool = False


class _Pace:
    """Lets requests begin at equal distances."""

    def __init__(self, per_minute: float | None) -> None:
        self._distance_s = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        """Return when the next request may begin."""
        now = time.monotonic()
        begin = max(now, self._next)
        self._next = begin + self._distance_s
        await asyncio.sleep(begin - now)
