"""Asking a larger model, within a budget: every reply is paid for once, also through a crash."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tuneloop.config import BudgetConfig
from tuneloop.errors import EndpointError, Problem
from tuneloop.evals.scoring.budget import Budget, BudgetError, Sent, cost_of, most
from tuneloop.evals.scoring.spending import Cost, Entry, Spending, read_entries
from tuneloop.models.client.client import Client, RequestError, ask_each
from tuneloop.progress import Progress
from tuneloop.records import Endpoint, Message, Price, SamplingParams

logger = logging.getLogger("tuneloop.data")

# With pauses that double, a rate limit may last a minute before a request is given up.
_RETRIES = 7
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


class Replies(Spending):
    """The replies so far and what they cost, in a file that a killed run leaves for the next one.

    Failed requests count and are asked again.

    Args:
        path: A JSON Lines file; a last line cut off by a crash is ignored.
        earlier: Files of earlier data sets, whose replies are used again and cost nothing now.
    """

    def __init__(self, path: Path, earlier: Sequence[Path] = ()) -> None:
        super().__init__(path)
        self._replies = _read(path)
        self._earlier: dict[str, Reply] = {}
        for file in earlier:
            self._earlier |= _read(file)

    def get(self, key: str) -> Reply | None:
        """Return the reply to a request, or None."""
        if key not in self._replies and (reply := self._earlier.get(key)) is not None:
            self.add(Entry(key, Cost(), vars(reply), is_earlier=True))
        return self._replies.get(key)

    def add(self, entry: Entry) -> None:
        """Keep a reply, or that there is none, with what it has cost."""
        super().add(entry)
        if entry.reply is not None and not entry.reply.get("error"):
            self._replies[entry.key] = Reply(**entry.reply)


def _read(path: Path) -> dict[str, Reply]:
    """Return the replies of a file, without those that failed."""
    replies = (e for e in read_entries(path) if e.reply and not e.reply.get("error"))
    return {entry.key: Reply(**(entry.reply or {})) for entry in replies}


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
        self.errors.clear()  # those of an earlier call do not say that this one failed
        if todo and self.stopped is None:
            with Progress("asking", len(todo), "replies") as progress:
                asyncio.run(self._ask(todo, progress))
        failures = self.errors.total()
        if failures and not may_fail and not any(self.replies.get(key) for key in unique):
            reason, count = self.errors.most_common(1)[0]
            raise EndpointError.of(
                "no request was answered",
                where=f"{self.endpoint.url}, model {self.endpoint.model}",
                got=f"{count} of {failures} times: {reason}",
                remedy="look at the server's log",
            )

    async def _ask(self, todo: Mapping[str, Asked], progress: Progress) -> None:
        pace, started, num_done = _Pace(self.rates.per_minute), time.monotonic(), 0
        budget = Budget(self.limits, self.replies, "generation.budget", pace.wait)
        async with Client(self.endpoint, retries=_RETRIES, asks_lost_again=False) as client:
            await client.check()

            async def ask(key: str) -> None:
                nonlocal num_done
                request = todo[key]
                # The form is part of the prompt on some servers.
                texts = [m.text for m in request.messages]
                texts += [json.dumps(dict(request.form))] if request.form else []
                reserved = most(self.price, texts, request.params.max_tokens)
                if await budget.buy(key, reserved, lambda: self._said(client, request, reserved)):
                    num_done += 1
                    progress.update(num_done)
                    left = (time.monotonic() - started) / num_done * (len(todo) - num_done)
                    line = "asked %d/%d, %s tokens so far, %.0f s left"
                    tokens = f"{self.replies.spent.tokens:,}"
                    is_last = num_done == len(todo)
                    progress.log(logger, line, num_done, len(todo), tokens, left, now=is_last)

            await ask_each(list(todo), self.rates.concurrency, ask)
        for failure in budget.failures:
            if not isinstance(failure, BudgetError):
                raise failure
        if budget.failures:
            assert isinstance(budget.failures[0], BudgetError)
            self.stopped = budget.failures[0].problems[0]
            logger.warning("%s", self.stopped)

    async def _said(self, client: Client, request: Asked, reserved: Cost) -> Sent:
        form = request.form if self._takes_forms else {}
        try:
            completion = await client.generate(request.messages, request.params, form=form)
        except RequestError as error:
            if form and error.refused and str(error).startswith(_NO_FORM):
                if self._takes_forms:
                    logger.warning("answers have no enforced form: the server says %s", error)
                self._takes_forms = False
                return await self._said(client, request, reserved)
            self.errors[str(error)] += 1
            logger.warning("no reply: %s", error)
            cost = Cost() if error.refused else reserved
            return Sent(vars(Reply(error=str(error))), cost, error.lost)
        counts = completion.prompt_tokens, completion.completion_tokens
        reply = Reply(completion.text, completion.finish_reason, "", *counts)
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            return Sent(vars(reply), reserved)  # the most it can have cost
        return Sent(vars(reply), cost_of(self.price, reply.prompt_tokens, reply.completion_tokens))


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
