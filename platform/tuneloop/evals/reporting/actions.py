"""An action of the advice: what it may bring, what that rests on, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from tuneloop.evals.reporting.formatting import format_difference
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.text import format_duration

Basis = Literal["at most", "measured", "forecast", "unknown"]
# The title of the action that ends what cannot bring anything.
STOP = "Stop, or make the test harder"


class Gain(NamedTuple):
    """What an action may add to the primary metric, with the ends of its interval."""

    value: float
    low: float
    high: float


class Brings(NamedTuple):
    """What an action may bring, what that rests on, and how many rows it is about: see `Action`."""

    gain: Gain | None = None
    basis: Basis = "unknown"
    num_rows: int = 0


NOTHING_KNOWN = Brings()


@dataclass(frozen=True)
class Action:
    """Something to do.

    Args:
        title: What.
        why: The measurement that speaks for it.
        gain: In the unit of the primary metric, below 0 where lower is better; None where it is
            not known.
        basis: Whether the gain is a bound, measured, a forecast, or not known.
        num_rows: Rows that the gain is about; 0 where it is about all.
        cost_s: Seconds of training and evaluation, as they took before; None where no machine has
            to run.
        command: What does it, or shows what has to be done.
        page: Address of the dashboard's page with the evidence; empty where there is none.
    """

    title: str
    why: str
    gain: Gain | None
    basis: Basis
    num_rows: int
    cost_s: float | None
    command: str
    page: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        gain = None if self.gain is None else self.gain._asdict()
        return {**asdict(self), "gain": gain}

    def describe_gain(self, metric: Metric) -> str:
        """Return the gain in words."""
        if self.gain is None:
            return "not known"
        low, high = (format_difference(end, metric, unit=False) for end in self.gain[1:])
        prefix = "at most " * (self.basis == "at most")
        return f"{prefix}{format_difference(self.gain.value, metric)} ({low} to {high})"

    def describe_cost(self) -> str:
        """Return the cost in words."""
        return "reading" if self.cost_s is None else f"about {format_duration(self.cost_s)}"


def comes_first(action: Action, metric: Metric) -> bool:
    """Whether an action surely brings something, or ends what cannot: before any bound."""
    if action.gain is None or action.basis not in ("forecast", "measured"):
        return action.title == STOP
    sign = -1 if metric.better == "lower" else 1
    return min(sign * end for end in action.gain[1:]) > 0
