"""What endpoints may cost: nothing is sent that could pass the budget."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tuneloop.config import BudgetConfig
from tuneloop.errors import EndpointError, Problem
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.records import Arm, Price

# What a chat template may add to a message, in tokens; no template we know adds as many.
_TOKENS_PER_MESSAGE = 32


@dataclass(frozen=True)
class Cost:
    """Tokens and money."""

    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.tokens - other.tokens, self.money - other.money)


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


class Budget:
    """Keeps what is spent and what is on its way below the limits.

    Args:
        limits: The limits.
        spent: What answers have cost that an interrupted run left.
        where: Dotted key of the limits.
    """

    def __init__(self, limits: BudgetConfig, spent: Cost, where: str = "evaluation.budget") -> None:
        self.limits = limits
        self.where = where
        self.spent = spent
        self._on_its_way = Cost()
        self._num_on_its_way = 0
        self._changed = asyncio.Condition()

    async def reserve(self, cost: Cost) -> None:
        """Return when a request that costs at most this can be sent.

        Raises:
            BudgetError: It would pass the budget, even when all others are answered.
        """
        async with self._changed:
            while not self._fits(cost):
                if self._num_on_its_way == 0:
                    raise BudgetError(self._problem(cost))
                await self._changed.wait()
            self._on_its_way += cost
            self._num_on_its_way += 1

    async def settle(self, reserved: Cost, cost: Cost) -> None:
        """Count what a request that was reserved has cost."""
        async with self._changed:
            self.spent += cost
            self._on_its_way -= reserved
            self._num_on_its_way -= 1
            self._changed.notify_all()

    def _fits(self, cost: Cost) -> bool:
        total = self.spent + self._on_its_way + cost
        limits = self.limits
        return (limits.tokens is None or total.tokens <= limits.tokens) and (
            limits.money is None or total.money <= limits.money + 1e-12
        )

    def _problem(self, cost: Cost) -> Problem:
        parts: list[tuple[str, str, str, str]] = []
        if self.limits.tokens is not None:
            spent, coming = f"{self.spent.tokens:,}", f"{cost.tokens:,}"
            parts.append(("tokens", f"{self.limits.tokens:,}", spent, coming))
        if self.limits.money is not None:
            spent, coming = f"{self.spent.money:.3g}", f"{cost.money:.3g}"
            parts.append(("money", f"{self.limits.money:g}", spent, coming))
        return Problem(
            "the next question could pass the budget",
            where=" and ".join(f"{self.where}.{name}" for name, *_ in parts),
            got="; ".join(
                f"{spent} {name} spent, the next question takes up to {more}"
                for name, _, spent, more in parts
            ),
            allowed=", ".join(f"{limit} {name}" for name, limit, *_ in parts),
            remedy="raise it and run again (what is paid for is kept), or ask about fewer rows",
        )
