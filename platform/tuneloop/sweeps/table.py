"""A sweep as people see it: points and lines to draw, and the trials as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from rich.console import Group, RenderableType
from rich.table import Table

from tuneloop.artifacts import Artifact
from tuneloop.evals.reporting.formatting import format_number
from tuneloop.text import format_duration

ROWS_KEY = "data.num_train_examples"
# The terminal has no room for these.
_NOT_PRINTED = ("", "loss", "model")


@dataclass(frozen=True)
class SweepView:
    """A sweep, ready to draw.

    Args:
        keys: The swept dotted keys.
        points: One for each scored trial: `rows, x, score, low, high, series, trial, best`.
        lines: The ends of every fitted line: `rows, score, series`.
        sentences: What each line says.
        trials: The table, with readable column names.
        problems: Trials without a score, and why.
        best: Reference of the best trial's model; empty when no trial finished.
        best_words: The best trial's score and settings.
        choice: How it was chosen, and what the choice makes of its score, in sentences.
        percent: Scores are shares.
    """

    metric: str
    keys: list[str]
    points: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    sentences: list[str]
    trials: list[dict[str, str]]
    problems: list[tuple[str, str]]
    best: str
    best_words: str
    choice: list[str]
    percent: bool


def read_sweep(sweep: Artifact) -> SweepView:
    """Return a sweep's trials, points and fitted lines from its two files."""
    trials = pq.read_table(sweep.path / "trials.parquet").to_pylist()
    curve = json.loads((sweep.path / "curve.json").read_text(encoding="utf-8"))
    keys = list(curve["keys"])
    best = curve.get("best") or {}
    others = [key for key in keys if key != ROWS_KEY]
    scores = [trial["score"] for trial in trials if trial["score"] is not None]
    percent = bool(scores) and all(0 <= score <= 1 for score in scores)
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
                    "series": _series(", ".join(f"{key}={trial[key]}" for key in others)),
                    "trial": name,
                    "best": is_best,
                }
            )
        rows.append(
            {
                "": "best" if is_best else "",
                **{key: str(trial[key]) for key in keys},
                **({"seed": str(trial["seed"])} if has_seeds else {}),
                **(
                    {}
                    if ROWS_KEY in keys
                    else {"train rows": format_number(trial["num_train_examples"])}
                ),
                "parameters": _millions(trial["num_parameters"]),
                "validation" if is_tested else curve["metric"]: _score(trial["score"], percent),
                "95% interval": (
                    "–"
                    if trial["low"] is None
                    else f"{_score(trial['low'], percent)} to {_score(trial['high'], percent)}"
                ),
                **({"test": _score(trial["test_score"], percent)} if is_tested else {}),
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
        lines=_line_ends(curve["curves"]),
        sentences=[_line_in_words(line, percent) for line in curve["curves"]],
        trials=rows,
        problems=problems,
        best=str(best.get("model") or ""),
        best_words=next(
            (
                f"{_score(best['test']['value'] if is_tested else p['score'], percent)} "
                f"{'on the test ' * is_tested}with {p['trial']}"
                for p in points
                if p["best"]
            ),
            "",
        ),
        choice=_choice_in_words(curve, len(points), percent),
        percent=percent,
    )


def _choice_in_words(curve: dict[str, Any], num_scored: int, percent: bool) -> list[str]:
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
    sentences = [
        f"Chosen among {num_scored} by {curve['metric']} on {curve['num_validation_examples']:,} "
        f"validation rows. The test split of {curve['num_test_examples']:,} rows was answered by "
        "the winner alone."
    ]
    words = f"The winner has {_with_interval(best['test'], percent)} on the test"
    words += (
        f" ({confidence} interval); on validation {_score(best['validation']['value'], percent)}"
    )
    gap = best["optimism"]
    if gap["value"] is None:
        return [*sentences, words + "."]
    size = _difference(gap["value"], percent)
    ends = (
        ""
        if gap["low"] is None
        else f" ({_difference(gap['low'], percent)} to {_difference(gap['high'], percent)})"
    )
    words += f". Reporting the score it was chosen by would have added {size}{ends}."
    return [*sentences, words]


def _with_interval(score: dict[str, Any], percent: bool) -> str:
    if score["low"] is None:
        return _score(score["value"], percent)
    ends = f"{_score(score['low'], percent)} to {_score(score['high'], percent)}"
    return f"{_score(score['value'], percent)}, {ends},"


def _difference(value: float, percent: bool) -> str:
    return (f"{100 * value:+.1f} points" if percent else f"{value:+.3f}").replace("-", "−")


def _spread_out(points: list[dict[str, Any]]) -> None:
    """Put points of one size beside each other: intervals on one line cannot be told apart."""
    series = sorted({point["series"] for point in points})
    for point in points:
        steps = series.index(point["series"]) - (len(series) - 1) / 2
        point["x"] = point["rows"] * 2 ** (0.012 * steps)


def _line_ends(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    ends = []
    for line in curves:
        if line["slope"] is None:
            continue
        sizes = [size for size, _ in line["points"]]
        for size in (min(sizes), max(sizes)):
            score = line["intercept"] + line["slope"] * math.log2(size)
            ends.append({"rows": size, "score": score, "series": _series(line["series"])})
    return ends


def _line_in_words(line: dict[str, Any], percent: bool) -> str:
    name = _series(line["series"])
    if line["slope"] is None:
        return f"{name}: one size only, so there is no line."
    gain = f"{100 * line['slope']:+.1f} points" if percent else f"{line['slope']:+.3f}"
    words = f"{name}: {gain.replace('-', '−')} for each doubling of the training rows"
    if line["residual"] is None:
        return words + " (two sizes: the line goes through both points)."
    spread = f"{100 * line['residual']:.1f} points" if percent else f"{line['residual']:.3f}"
    return words + f"; the points lie {spread} from the line on average."


def _series(label: str) -> str:
    return label or "all trials"


def _millions(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.0f} M"


def _score(value: float | None, percent: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if percent else f"{value:.3f}"


def sweep_table(sweep: Artifact) -> RenderableType:
    """Return the trials, the fitted lines and the best model of a sweep for the terminal."""
    view = read_sweep(sweep)
    is_one_size = len({trial["parameters"] for trial in view.trials} - {"–"}) < 2
    hidden = (*_NOT_PRINTED, "parameters") if is_one_size else _NOT_PRINTED
    columns = [name for name in view.trials[0] if name not in hidden]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            _short_key(name, view.keys), justify="left" if name in view.keys else "right"
        )
    for trial in view.trials:
        table.add_row(*(trial[name] for name in columns), style="bold" if trial[""] else None)
    best = f"best: {view.best}" if view.best else "no trial has a score"
    return Group(table, "", *view.sentences, *view.choice, best, "")


def _short_key(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a dotted key, where it tells the key from the others."""
    if key == ROWS_KEY:
        return "train rows"
    last = key.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in keys].count(last) < 2 else key
