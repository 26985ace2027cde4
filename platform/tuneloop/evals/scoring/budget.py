"""What endpoints may cost: nothing is sent that could pass the budget."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tuneloop.config import BudgetConfig, PriceConfig
from tuneloop.errors import EndpointError, Problem
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.spending import Cost, Entry, Spending
from tuneloop.records import Arm, Price

# What a chat template may add to a message, in tokens; no template we know adds as many.
_TOKENS_PER_MESSAGE = 32
# A reply that did not arrive may have been paid for, so each further try counts in the budget.
_LOST_RETRIES = 2


def price_of(config: PriceConfig | None) -> Price | None:
    """Return what an endpoint charges; None where nobody says so."""
    return Price(config.input, config.output) if config else None


def cost_of(price: Price | None, prompt_tokens: int, completion_tokens: int) -> Cost:
    """Return what a request costs; no money where the price is not known."""
    money = 0.0
    if price is not None:
        money = (prompt_tokens * price.input + completion_tokens * price.output) / 1e6
    return Cost(prompt_tokens + completion_tokens, money)


def most(price: Price | None, texts: Sequence[str], max_tokens: int) -> Cost:
    """Return the most a request can cost: a token stands for at least one byte of the prompt.

    Args:
        texts: What is sent, message by message.
    """
    most_prompt = len("".join(texts).encode()) + _TOKENS_PER_MESSAGE * (len(texts) + 1)
    return cost_of(price, most_prompt, max_tokens)


def mean_count(counts: Sequence[int | None]) -> float | None:
    """Return the mean of those counts that are known; None where none is."""
    known = [count for count in counts if count is not None]
    return sum(known) / len(known) if known else None


def cost_per_1000(arm: Arm, predictions: Sequence[Prediction]) -> float | None:
    """Return what 1,000 such requests cost at the arm's price.

    Returns:
        None where there is no price, or where the endpoint did not count its tokens. The simple
        arm costs nothing.
    """
    if arm.answer is not None and not arm.endpoint.url:
        return 0.0
    prompt = mean_count([p.prompt_tokens for p in predictions])
    completion = mean_count([p.completion_tokens for p in predictions])
    if arm.price is None or prompt is None or completion is None:
        return None
    return 1000 * (prompt * arm.price.input + completion * arm.price.output) / 1e6


class BudgetError(EndpointError):
    """The next request could pass the budget."""


class Sent(NamedTuple):
    """What became of a request.

    Args:
        reply: As the file of the spending keeps it.
        cost: What it has cost.
        is_lost: It may have been answered, and no answer arrived.
    """

    reply: Mapping[str, Any]
    cost: Cost
    is_lost: bool = False


async def _at_once() -> None:
    """Wait for nothing."""


class Budget:
    """Keeps what is spent and on its way below the limits, through crashes and lost replies.

    Args:
        limits: The limits.
        spending: What requests have cost so far, those of killed runs included; more is added.
        where: Dotted key of the limits.
        wait: Returns when the next request may be sent, for servers with a rate limit.

    Attributes:
        failures: Why nothing more is sent; empty while all is well.
    """

    def __init__(
        self,
        limits: BudgetConfig,
        spending: Spending,
        where: str = "evaluation.budget",
        wait: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        self.limits = limits
        self.spending = spending
        self.where = where
        self.failures: list[Exception] = []
        self._wait = wait
        self._on_its_way = Cost()
        self._num_on_its_way = 0
        self._changed = asyncio.Condition()

    async def buy(self, key: str, most: Cost, send: Callable[[], Awaitable[Sent]]) -> Sent | None:
        """Send a request when it fits, again where its reply got lost, and keep what it has cost.

        Args:
            key: What the reply depends on.
            most: The most that one try can cost.
            send: Tries once.

        Returns:
            What became of the last try; None if it was not sent, as `failures` tell.
        """
        sent = None
        for _ in range(1 + _LOST_RETRIES):
            # What is on its way is paid for: it is waited for, and nothing more is sent.
            if self.failures:
                break
            try:
                sent = await self._try(key, most, send) or sent
            except EndpointError as error:
                self.failures.append(error)
                break
            if sent is None or not sent.is_lost:
                break
        return sent

    async def _try(self, key: str, most: Cost, send: Callable[[], Awaitable[Sent]]) -> Sent | None:
        """Send once; None if it is not sent, as something has failed meanwhile.

        Raises:
            BudgetError: It would pass the budget, even when all others are answered.
            EndpointError: The endpoint is unusable; nothing was paid.
        """
        await self._reserve(most)
        try:
            await self._wait()
            if self.failures:
                return None
            self.spending.note(key, most)
            try:
                sent = await send()
            except EndpointError as error:
                self.spending.add(Entry(key, Cost(), {"error": str(error)}))
                raise
            self.spending.add(Entry(key, sent.cost, sent.reply, sent.is_lost))
            return sent
        finally:
            await self._release(most)

    async def _reserve(self, cost: Cost) -> None:
        async with self._changed:
            while not self._fits(cost):
                if self._num_on_its_way == 0:
                    raise BudgetError(self._problem(cost))
                await self._changed.wait()
            self._on_its_way += cost
            self._num_on_its_way += 1

    async def _release(self, cost: Cost) -> None:
        async with self._changed:
            self._on_its_way -= cost
            self._num_on_its_way -= 1
            self._changed.notify_all()

    def _fits(self, cost: Cost) -> bool:
        total = self.spending.spent + self._on_its_way + cost
        limits = self.limits
        return (limits.tokens is None or total.tokens <= limits.tokens) and (
            limits.money is None or total.money <= limits.money + 1e-12
        )

    def _problem(self, cost: Cost) -> Problem:
        spent, lost, num_lost = self.spending.spent, self.spending.lost, self.spending.num_lost
        limits, told = list[str](), list[str]()

        def tell(limit: str, name: str, amount: Callable[[Cost], str]) -> None:
            requests = "request" if num_lost == 1 else "requests"
            held = f" (up to {amount(lost)} of them held for {num_lost:,} {requests} whose reply "
            held += "was lost)"
            text = f"{amount(spent)} {name} spent{held if num_lost else ''}"
            told.append(f"{text}, the next question takes up to {amount(cost)}")
            limits.append(f"{limit} {name}")

        if self.limits.tokens is not None:
            tell(f"{self.limits.tokens:,}", "tokens", lambda c: f"{c.tokens:,}")
        if self.limits.money is not None:
            tell(f"{self.limits.money:g}", "money", lambda c: f"{c.money:.3g}")
        return Problem(
            "the next question could pass the budget",
            where=" and ".join(f"{self.where}.{limit.split()[-1]}" for limit in limits),
            got="; ".join(told),
            allowed=", ".join(limits),
            remedy="raise it and run again (what is paid for is kept), or ask about fewer rows",
        )
