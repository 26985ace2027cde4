"""What a sweep says to do next: label more rows, take a larger model, try other settings, or stop.

Each piece of advice comes from numbers in `curve.json` and `trials.parquet`, and names them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tuneloop.evals.reporting.situation import HARDLY, SURELY_LESS
from tuneloop.sweeps.curve import ROWS_KEY, series_of
from tuneloop.sweeps.table import as_change, as_score, difference_in_words, in_words
from tuneloop.sweeps.tasks import TASKS_KEY

MODEL_KEY = "model.base"
Kind = Literal["rows", "model", "setting", "prompt", "stop", "unclear"]
Help = Literal["surely", "hardly", "unclear", "unknown"]

# Above this share there is little left to gain.
_SATURATED = 0.98


class Advice(NamedTuple):
    """Something to do, why, and what it is expected to bring.

    Attributes:
        gain: In the unit of the score, with its interval; None where it is not known.
        price: Of labels and training; None where a price is not given.
    """

    kind: Kind
    title: str
    why: str
    gain: dict[str, float] | None = None
    price: float | None = None


class Sweep(NamedTuple):
    """What was measured: `curve.json`, and the rows of `trials.parquet`."""

    curve: Mapping[str, Any]
    trials: Sequence[Mapping[str, Any]]

    @property
    def best(self) -> Mapping[str, Any]:
        """The winner's row."""
        return self.trials[self.curve["best"]["trial"]]

    @property
    def line(self) -> Mapping[str, Any]:
        """The learning curve that the winner is on."""
        series = series_of(self.best, self.curve["keys"])
        return next(one for one in self.curve["curves"] if one["series"] == series)

    @property
    def sign(self) -> int:
        """1 where a higher score is better, else -1."""
        return 1 if self.curve.get("higher_is_better", True) else -1

    @property
    def unit(self) -> float:
        """What the least gains are measured in: a share, or the loss of the winner."""
        return 1.0 if self.is_share else abs(float(self.best["score"]))

    @property
    def is_share(self) -> bool:
        """Whether scores are shares, so that differences are points."""
        scores = [trial["score"] for trial in self.trials if trial["score"] is not None]
        return self.sign > 0 and all(0 <= score <= 1 for score in scores)

    def points(self, gain: Mapping[str, float]) -> str:
        """Return a gain with its interval in words; positive is better."""
        value, *ends = (self.sign * gain[name] for name in ("value", "low", "high"))
        return as_change({"value": value, "low": min(ends), "high": max(ends)}, self.is_share)

    def score(self, value: float) -> str:
        """Return a score in words."""
        return as_score(value, self.is_share)

    def help_of(self, gain: Mapping[str, float]) -> Help:
        """Return whether a gain is worth anything."""
        value = self.sign * gain["value"]
        low, high = sorted(self.sign * gain[name] for name in ("low", "high"))
        if value < HARDLY * self.unit and high < SURELY_LESS * self.unit:
            return "hardly"
        return "surely" if low >= HARDLY * self.unit else "unclear"


def advise(curve: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> list[Advice]:
    """Return what to do, the most telling first; empty for a sweep without a winner.

    Args:
        curve: Content of `curve.json`.
        trials: Rows of `trials.parquet`.
    """
    if not curve.get("best") or "test" not in curve["best"]:
        return []
    sweep = Sweep(curve, trials)
    rows, model = _rows(sweep), _larger_model(sweep)
    settings, take = _edges(sweep), _best_setting(sweep)
    prompt = _prompt(sweep)
    found = [*prompt, rows[1], *([model[1]] if model[1] else []), *settings, *_tasks(sweep)]
    worth = [one for one in found if one.kind in ("prompt", "rows", "model", "setting")]
    if worth:
        rest = [one for one in found if one not in worth]
        return worth + take + rest
    first = _stop(sweep, rows[0], model[0])
    return [*take, *found] if take and first.kind == "unclear" else [first, *take, *found]


def _rows(sweep: Sweep) -> tuple[Help, Advice]:
    """Return whether more rows help."""
    forecast = sweep.line.get("forecast", {})
    if not forecast.get("forecasts"):
        why = forecast.get("refused") or "the training rows were not varied"
        return "unknown", Advice(
            "unclear",
            "Whether more rows help is not known",
            f"There is no forecast: {why}. `{ROWS_KEY}: [100, 200, 400]` in `sweep.parameters` "
            "would tell.",
        )
    largest = max(size for size, _ in sweep.line["points"])
    twice, four = forecast["forecasts"][0], forecast["forecasts"][1]
    helps = sweep.help_of(twice["gain"])
    if helps == "hardly":
        return helps, Advice(
            "unclear",
            "More rows hardly help",
            f"Twice the {largest:,} training rows are expected to bring "
            f"{sweep.points(twice['gain'])}.",
            twice["gain"],
        )
    if helps == "unclear":
        return helps, Advice(
            "unclear",
            "More rows may help",
            f"Twice the {largest:,} training rows are expected to bring "
            f"{sweep.points(twice['gain'])}: that may be nothing. More validation rows, seeds or "
            "data volumes make it known; label only if labels are cheap.",
            twice["gain"],
            _price(sweep, twice["num_examples"]),
        )
    goal = four if sweep.help_of(four["step"]) == "surely" else twice
    more = goal["num_examples"] - largest
    price = _price(sweep, goal["num_examples"])
    spent = "" if price is None else f", for about {price:,.2f}"
    return helps, Advice(
        "rows",
        f"Label about {more:,} more rows",
        f"{goal['num_examples']:,} training rows in place of {largest:,} are expected to bring "
        f"{sweep.points(goal['gain'])}{spent}.{_which_rows(sweep)}",
        goal["gain"],
        price,
    )


def _which_rows(sweep: Sweep) -> str:
    """Return which rows to label first: those on which the winner is clearly worse."""
    weakest = sweep.curve.get("weakest", [])
    if not weakest:
        return " No part of the validation rows is clearly worse than the others."
    parts = [
        f"{part['by'].replace('_', ' ')} `{part['slice']}` ({sweep.score(part['value'])} of "
        f"{part['n']:,}, the others {sweep.score(part['rest'])})"
        for part in weakest[:3]
    ]
    return f" First those where it is clearly worse than elsewhere: {', '.join(parts)}."


def _price(sweep: Sweep, num_rows: int) -> float | None:
    """Return what a training on so many rows costs, beyond the labels that are there."""
    largest = max(int(trial["num_train_examples"]) for trial in sweep.trials)
    per_row, per_hour = sweep.curve.get("price_per_row"), sweep.curve.get("price_per_hour")
    if per_row is None and per_hour is None:
        return None
    labels = (num_rows - largest) * (per_row or 0.0)
    hours = sweep.best.get("cpu_hours") or sweep.best.get("gpu_hours") or 0.0
    hours *= num_rows / int(sweep.best["num_train_examples"])
    return labels + hours * (per_hour or 0.0)


def _larger_model(sweep: Sweep) -> tuple[Help, Advice | None]:
    """Return whether a larger model helps, by the step between the two largest that were tried."""
    steps = sweep.curve.get("model_steps", [])
    if not steps:
        return "unknown", None
    step = steps[-1]
    helps = sweep.help_of(step["gain"])
    times = f"{step['times_hours']:.1f} times the training time"
    if step["times_latency"] is not None:
        times += f" and {step['times_latency']:.1f} times the time to answer"
    measured = (
        f"`{step['larger']}` against `{step['smaller']}` on {step['num_train_examples']:,} rows: "
        f"{sweep.points(step['gain'])}, for {times}."
    )
    if helps == "surely":
        title = "A larger model helps"
        why = f"{measured} One still larger is worth a trial."
        return helps, Advice("model", title, why, step["gain"])
    title = {"hardly": "A larger model does not help", "unclear": "A larger model may help"}[helps]
    return helps, Advice("unclear", title, measured, step["gain"])


def _edges(sweep: Sweep) -> list[Advice]:
    """Return the settings whose best value is the last one that was tried on its side."""
    found = []
    for key in sweep.curve["keys"]:
        # A value may be a list.
        values = [trial[key] for trial in sweep.trials if trial["status"] in ("done", "stopped")]
        values = [value for number, value in enumerate(values) if value not in values[:number]]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if key == ROWS_KEY or len(numbers) < 3 or len(numbers) < len(values):
            continue
        best = sweep.best[key]
        if best not in (min(numbers), max(numbers)) or not _matters(sweep, key):
            continue
        is_top = best == max(numbers)
        found.append(
            Advice(
                "setting",
                f"Try {'more' if is_top else 'less'} of `{key}`",
                f"The best value, {best:g}, is the {'largest' if is_top else 'smallest'} of the "
                f"{len(numbers)} that were tried.",
            )
        )
    return found


def _matters(sweep: Sweep, key: str) -> bool:
    """Return whether the best value of a setting is a point better than any other one of it."""
    cells = [cell for cell in sweep.curve.get("cells", []) if cell["value"] is not None]
    best, rest = (
        max(
            (sweep.sign * c["value"] for c in cells if (c["values"][key] == sweep.best[key]) is of),
            default=-math.inf,
        )
        for of in (True, False)
    )
    return best - rest >= HARDLY * sweep.unit


def _best_setting(sweep: Sweep) -> list[Advice]:
    """Return the best combination beside the next, where settings alone were varied."""
    keys = sweep.curve["keys"]
    cells = [cell for cell in sweep.curve.get("cells", []) if cell["value"] is not None]
    if len(cells) < 2 or {ROWS_KEY, MODEL_KEY, TASKS_KEY} & set(keys):
        return []
    best, second = sorted(cells, key=lambda cell: -sweep.sign * cell["value"])[:2]
    told = [_score_with_interval(sweep, cell) for cell in (best, second)]
    names = [
        ", ".join(f"`{key}: {in_words(cell['values'][key])}`" for key in keys)
        for cell in (best, second)
    ]
    if abs(best["value"] - second["value"]) < HARDLY * sweep.unit:
        apart = "a point" if sweep.is_share else "1%"
        why = f"They have {told[0]} and {told[1]} on the validation rows: less than {apart} apart."
        return [Advice("setting", f"Take {names[0]}, or {names[1]}", why)]
    why = f"It has {told[0]} on the validation rows; the next, {names[1]}, has {told[1]}."
    return [Advice("setting", f"Take {names[0]}", why)]


def _score_with_interval(sweep: Sweep, cell: Mapping[str, Any]) -> str:
    words = sweep.score(cell["value"])
    if None in (cell["low"], cell["high"]):
        return words
    return f"{words} ({sweep.score(cell['low'])} to {sweep.score(cell['high'])})"


def _tasks(sweep: Sweep) -> list[Advice]:
    """Return the tasks of a mixture to which training with the others does harm."""
    found = []
    for one in sweep.curve.get("task_effects", []):
        if one["effect"] == "hurt":
            found.append(
                Advice(
                    "setting",
                    f"Train `{one['task']}` by itself",
                    f"Beside the other tasks it has {difference_in_words(one)}, on the same "
                    f"{one['num_train_examples']:,} rows of its own.",
                )
            )
    return found


def _prompt(sweep: Sweep) -> list[Advice]:
    """Return what needs no training and is not surely passed by the best combination.

    The best of it comes first: what a prompt does not tell, the simple arm may.
    """
    number = sweep.curve["best"]["trial"]
    # Sweeps of an early version have neither cells nor what needs no training.
    cells = (one for one in sweep.curve.get("cells", []) if number in one["trials"])
    cell = next(cells, None)
    if cell is None:
        return []
    untrained = sweep.curve.get("untrained", {})
    bars: Sequence[Mapping[str, Any]] = untrained.get(sweep.best.get(MODEL_KEY)) or next(
        iter(untrained.values()), []
    )
    forecast = sweep.line.get("forecast", {})
    passing = {one["arm"]: one for one in forecast.get("break_even", [])}
    found = []
    for bar in sorted(bars, key=lambda bar: -sweep.sign * bar["score"]):
        at = passing.get(bar["arm"], {"found": "", "high": None, "num_examples": None})
        ends = [cell[end] for end in ("low", "high") if cell[end] is not None]
        is_sure = at["high"] is not None and at["high"] <= cell["num_train_examples"]
        if not passing and ends:
            is_sure = all(sweep.sign * (end - bar["score"]) > 0 for end in ends)
        if is_sure or at["found"] == "passed":
            continue
        is_better = sweep.sign * (bar["score"] - cell["value"]) >= 0
        why = (
            f"It has {sweep.score(bar['score'])} without training, the best combination "
            f"{sweep.score(cell['value'])} on the same rows"
        )
        if at["found"] == "out of reach" and is_better:
            reach = forecast["forecasts"][-1]["num_examples"]
            why += f", which does not pass it with {reach:,} rows either. A larger model may."
            found.append(Advice("prompt", f"Stop: keep {bar['arm']}", why))
            continue
        if at["found"] == "found":
            end = "more than anybody labels" if at["high"] is None else f"{at['high']:,}"
            why += (
                f", which passes it at about {at['num_examples']:,} rows ({at['low']:,} to {end})"
            )
        title = f"{bar['arm']} is as good" if is_better else f"Not surely better than {bar['arm']}"
        found.append(Advice("prompt", title, f"{why}."))
    return found


def _stop(sweep: Sweep, rows: Help, model: Help) -> Advice:
    """Return the advice to stop, or that it cannot be told."""
    value = sweep.curve["best"]["validation"]["value"]
    if sweep.is_share and value >= _SATURATED:
        why = f"{sweep.score(value)} of the validation rows are right already."
        return Advice("stop", "Stop: little is left to gain", why)
    if rows == "hardly" and model in ("hardly", "unknown"):
        twice = sweep.line["forecast"]["forecasts"][0]
        why = (
            f"Twice the rows are expected to bring {sweep.points(twice['gain'])}, at most "
            f"{100 * SURELY_LESS:.0f} points with 95% certainty."
            if sweep.is_share
            else f"Twice the rows are expected to bring {sweep.points(twice['gain'])}."
        )
        if model == "hardly":
            why += " The larger model does not help either."
        tried = set(sweep.curve["keys"]) - {ROWS_KEY, MODEL_KEY, TASKS_KEY}
        what = "neither rows nor settings bring more" if tried else "more rows hardly help"
        return Advice("stop", f"Stop: {what}", why)
    return Advice(
        "unclear",
        "It cannot be told yet what would help",
        "The gains that were measured may be nothing. More validation rows or `sweep.num_seeds` "
        "narrow the intervals.",
    )
