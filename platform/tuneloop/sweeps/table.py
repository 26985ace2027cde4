"""A sweep as people see it: points and lines to draw, and the trials as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from rich.console import Group, RenderableType
from rich.table import Table

from tuneloop.artifacts import Artifact
from tuneloop.evals.reporting.formatting import (
    format_change,
    format_difference,
    format_number,
    format_value,
)
from tuneloop.evals.reporting.situation import HARDLY, SURELY_LESS
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.sweeps.curve import ROWS_KEY, series_of
from tuneloop.text import format_duration

_KINDS = (Metric("", kind="number"), Metric("", kind="ratio"))  # not in per cent, and in per cent
# The terminal has no room for these.
_NOT_PRINTED = ("", "loss", "model")


@dataclass(frozen=True)
class SweepView:
    """A sweep, ready to draw.

    Args:
        keys: The swept dotted keys.
        points: One for each scored trial: `rows, x, score, low, high, series, trial, best`.
        lines: Every fitted curve from point to point, or the ends of a line where no curve could be
            fitted: `rows, score, low, high, series`.
        forecast_rows: Numbers of training rows that were not tried and are forecast.
        sentences: What each curve says.
        trials: The table, with readable column names.
        problems: Trials without a score, and why.
        best: Reference of the best trial's model; empty when no trial finished.
        best_words: The best trial's score and settings.
        choice: How it was chosen, and what the choice makes of its score, in sentences.
        percent: Scores are shares.
        confidence: Level of their intervals, for example `95%`.
    """

    metric: str
    keys: list[str]
    points: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    forecast_rows: list[int]
    sentences: list[str]
    trials: list[dict[str, str]]
    problems: list[tuple[str, str]]
    best: str
    best_words: str
    choice: list[str]
    percent: bool
    confidence: str


def read_files(sweep: Artifact) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what is in `curve.json` and the rows of `trials.parquet`."""
    trials = pq.read_table(sweep.path / "trials.parquet").to_pylist()
    curve = json.loads((sweep.path / "curve.json").read_text(encoding="utf-8"))
    for cell in curve.get("cells", []):
        for number in cell["trials"]:
            # A column of values of several types holds them as JSON.
            trials[number] |= cell["values"]
    return curve, trials


def read_sweep(sweep: Artifact) -> SweepView:
    """Return a sweep's trials, points and fitted lines from its two files."""
    return view_of(*read_files(sweep))


def view_of(curve: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> SweepView:
    """Return a sweep's trials, points and fitted lines.

    Args:
        curve: Content of `curve.json`.
        trials: Rows of `trials.parquet`.
    """
    keys = list(curve["keys"])
    best = curve.get("best") or {}
    scores = [trial["score"] for trial in trials if trial["score"] is not None]
    # Bits per byte are no share, though most lie between 0 and 1.
    is_share = curve.get("higher_is_better", True) and all(0 <= score <= 1 for score in scores)
    percent = bool(scores) and is_share
    confidence = f"{curve.get('confidence', 0.95):.0%}"
    points: list[dict[str, Any]] = []
    rows: list[dict[str, str]] = []
    problems: list[tuple[str, str]] = []
    any_failed = any(trial["status"] != "done" for trial in trials)
    # Sweeps of an earlier version chose on the test split.
    is_tested = "test" in best
    has_seeds = len({trial.get("seed") for trial in trials}) > 1
    for number, trial in enumerate(trials):
        name = ", ".join(f"{key}={trial[key]}" for key in keys)
        name += f", seed {trial['seed']}" if has_seeds else ""
        is_best = number == best.get("trial")
        if trial["score"] is None:
            problems.append((name, str(trial.get("problem") or trial.get("status"))))
        else:
            points.append(
                {
                    "rows": trial["num_train_examples"],
                    "x": trial["num_train_examples"],
                    "score": trial["score"],
                    "low": trial["low"],
                    "high": trial["high"],
                    "series": _series(series_of(trial, keys)),
                    "trial": name,
                    "best": is_best,
                }
            )
        rows.append(
            {
                "": "best" if is_best else "",
                **{key: in_words(trial[key]) for key in keys},
                **({"seed": str(trial["seed"])} if has_seeds else {}),
                **(
                    {}
                    if ROWS_KEY in keys
                    else {"train rows": format_number(trial["num_train_examples"])}
                ),
                "parameters": _millions(trial["num_parameters"]),
                "validation" if is_tested else curve["metric"]: as_score(trial["score"], percent),
                f"{confidence} interval": (
                    "–"
                    if trial["low"] is None
                    else f"{as_score(trial['low'], percent)} to {as_score(trial['high'], percent)}"
                ),
                **({"test": as_score(trial["test_score"], percent)} if is_tested else {}),
                "loss": format_number(trial["loss"], 3),
                "time": "–" if trial["wall_s"] is None else format_duration(trial["wall_s"]),
                **({"status": trial["status"]} if any_failed else {}),
                "model": trial["model"] or "–",
            }
        )
    _spread_out(points)
    return SweepView(
        metric=curve["metric"],
        keys=keys,
        points=points,
        lines=[point for line in curve["curves"] for point in _path(line)],
        forecast_rows=sorted(
            {
                one["num_examples"]
                for line in curve["curves"]
                for one in line.get("forecast", {}).get("forecasts", [])
            }
        ),
        sentences=(
            [_line_in_words(line, percent) for line in curve["curves"]]
            if ROWS_KEY in curve["keys"]
            else [f"Whether more rows help is not known: {ROWS_KEY} was not varied."]
        ),
        trials=rows,
        problems=problems,
        best=str(best.get("model") or ""),
        best_words=next(
            (
                f"{as_score(best['test']['value'] if is_tested else p['score'], percent)} "
                f"{'on the test ' * is_tested}with {p['trial']}"
                for p in points
                if p["best"]
            ),
            "",
        ),
        choice=_choice_in_words(curve, len(points), percent),
        percent=percent,
        confidence=confidence,
    )


def _choice_in_words(curve: Mapping[str, Any], num_scored: int, percent: bool) -> list[str]:
    """Return how the best trial was chosen, and the price of choosing it."""
    best = curve.get("best") or {}
    if not best:
        return []
    if "test" not in best:
        return [
            "Chosen on the test split by an earlier version: the best score is too high, for part "
            "of it is luck. Run the sweep again for a score that is not."
        ]
    confidence = f"{curve['confidence']:.0%}"
    chosen_by = curve.get("chosen_by", curve["metric"])
    sentences = [
        f"Chosen among {num_scored} by {chosen_by} on {curve['num_validation_examples']:,} "
        "validation rows that all of them answered. The test split of "
        f"{curve['num_test_examples']:,} rows was answered by "
        "the winner alone."
    ]
    words = f"The winner has {_with_interval(best['test'], percent)} on the test"
    validated = as_score(best["validation"]["value"], percent)
    words += f" ({confidence} interval); on validation {validated}"
    gap = best["optimism"]
    if gap["value"] is None:
        return [*sentences, words + "."]
    added = as_change(gap, percent)
    words += f". Reporting the score it was chosen by would have added {added}."
    return [*sentences, words]


def _with_interval(score: dict[str, Any], percent: bool) -> str:
    if score["low"] is None:
        return as_score(score["value"], percent)
    ends = f"{as_score(score['low'], percent)} to {as_score(score['high'], percent)}"
    return f"{as_score(score['value'], percent)}, {ends},"


def task_sentences(curve: Mapping[str, Any]) -> list[str]:
    """Return what each task of a mixture learns from how many rows of its own."""
    return [
        f"`{line['task']}`, {_line_in_words(line, line['is_share'])}"
        for line in curve.get("task_curves", [])
        if len({size for size, _ in line["points"]}) > 1
    ]


def difference_in_words(effect: Mapping[str, Any]) -> str:
    """Return what training with the other tasks makes of a task's score."""
    gap, percent = effect["difference"], effect["is_share"]
    return "–" if gap["value"] is None else as_change(gap, percent)


def as_change(gap: Mapping[str, Any], percent: bool) -> str:
    """Return a difference with its interval as people read it."""
    return format_change(gap, _KINDS[percent])


def in_words(value: object) -> str:
    """Return a swept value as people read it."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return "default" if value is None else str(value)


def _spread_out(points: list[dict[str, Any]]) -> None:
    """Put points of one size beside each other: intervals on one line cannot be told apart."""
    series = sorted({point["series"] for point in points})
    for point in points:
        steps = series.index(point["series"]) - (len(series) - 1) / 2
        point["x"] = point["rows"] * 2 ** (0.012 * steps)


def _path(line: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the points to draw a fitted curve through."""
    series = _series(line["series"])
    if path := line.get("forecast", {}).get("path"):
        return [
            {
                "rows": point["num_examples"],
                "score": point["value"],
                "low": point["low"],
                "high": point["high"],
                "series": series,
            }
            for point in path
        ]
    if line["slope"] is None:
        return []
    sizes = [size for size, _ in line["points"]]
    scores = {
        size: line["intercept"] + line["slope"] * math.log2(size)
        for size in (min(sizes), max(sizes))
    }
    return [
        {"rows": size, "score": score, "low": score, "high": score, "series": series}
        for size, score in scores.items()
    ]


def _line_in_words(line: dict[str, Any], percent: bool) -> str:
    name, forecast = _series(line["series"]), line.get("forecast", {})
    if forecast.get("forecasts"):
        return f"{name}: {_forecast_in_words(line, percent)}"
    refused = f" No forecast: {forecast['refused']}." if forecast.get("refused") else ""
    if line["slope"] is None:
        return f"{name}: one size only, so there is no line.{refused}"
    gain = format_difference(line["slope"], _KINDS[percent])
    words = f"{name}: {gain} for each doubling of the training rows"
    if line["residual"] is None:
        return f"{words} (two sizes: the line goes through both points).{refused}"
    spread = f"{100 * line['residual']:.1f} points" if percent else f"{line['residual']:.3f}"
    return f"{words}; the points lie {spread} from the line on average.{refused}"


def _forecast_in_words(line: dict[str, Any], percent: bool) -> str:
    forecast = line["forecast"]
    smallest, largest = (pick(size for size, _ in line["points"]) for pick in (min, max))
    expected = [
        f"{as_change(one['gain'], percent)} with {one['num_examples']:,}"
        for one in forecast["forecasts"]
    ]
    words = (
        f"compared with {largest:,} training rows, {' and '.join(expected)} are expected, with "
        f"{forecast['confidence']:.0%} intervals."
    )
    gain = forecast["forecasts"][0]["gain"]
    if percent and gain["value"] < HARDLY and gain["high"] < SURELY_LESS:
        words += " Twice the rows hardly help: look at other settings or a larger model, or stop."
    for bar in forecast["break_even"]:
        arm = f"{bar['arm']} ({as_score(bar['score'], percent)})"
        ends = f"{bar['low'] or 0:,} to " + (
            "more than anybody labels" if bar["high"] is None else f"{bar['high']:,}"
        )
        words += {
            "passed": f" It is past {arm} with {smallest:,} rows already.",
            "out of reach": f" It does not pass {arm} with {4 * largest:,} rows either.",
            "found": f" It passes {arm} at about {bar['num_examples'] or 0:,} rows ({ends}).",
            "uncertain": f" Where it passes {arm} is too uncertain to say ({ends} rows); more "
            "data volumes or seeds would tell.",
        }[bar["found"]]
    return words


def _series(label: str) -> str:
    return label or "all trials"


def _millions(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.0f} M"


def as_score(value: float | None, percent: bool) -> str:
    """Return a score as people read it."""
    return format_value(value, _KINDS[percent])


def sweep_table(sweep: Artifact) -> RenderableType:
    """Return the trials, the fitted lines and the best model of a sweep for the terminal."""
    view = read_sweep(sweep)
    is_one_size = len({trial["parameters"] for trial in view.trials} - {"–"}) < 2
    hidden = (*_NOT_PRINTED, "parameters") if is_one_size else _NOT_PRINTED
    columns = [name for name in view.trials[0] if name not in hidden]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            short_key(name, view.keys), justify="left" if name in view.keys else "right"
        )
    for trial in view.trials:
        table.add_row(*(trial[name] for name in columns), style="bold" if trial[""] else None)
    best = f"best: {view.best}" if view.best else "no trial has a score"
    return Group(table, "", *view.sentences, *view.choice, best, "")


class TrialTable(NamedTuple):
    """The trials as a table for a page.

    Args:
        rows: One for each trial, with short column names.
        same: The settings that all trials share, in words; they have no column.
    """

    rows: list[dict[str, str]]
    same: str


def trial_table(view: SweepView) -> TrialTable:
    """Return the trials without the columns that are the same in all of them."""
    settings = (*view.keys, "train rows", "parameters")
    same = {
        name: values[0]
        for name in settings
        if len(values := [trial[name] for trial in view.trials if name in trial]) > 1
        and len(set(values)) == 1
    }
    rows = [
        {short_key(key, view.keys): value for key, value in trial.items() if key not in same}
        for trial in view.trials
    ]
    return TrialTable(
        rows, ", ".join(f"{short_key(name, view.keys)} {value}" for name, value in same.items())
    )


def short_key(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a dotted key, where it tells the key from the others."""
    if key == ROWS_KEY:
        return "train rows"
    last = key.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in keys].count(last) < 2 else key
