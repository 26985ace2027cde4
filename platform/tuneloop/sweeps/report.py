"""A sweep as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from tuneloop.evals.reporting.formatting import format_number
from tuneloop.evals.reporting.report import page_style, page_template
from tuneloop.sweeps.advice import Sweep, advise
from tuneloop.sweeps.curve import ROWS_KEY
from tuneloop.sweeps.table import (
    SweepView,
    as_score,
    difference_in_words,
    in_words,
    task_sentences,
    trial_table,
    view_of,
)
from tuneloop.text import format_duration

_COLOURS = 6
_WIDTH, _HEIGHT = 900, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 40


def render_sweep(name: str, curve: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> str:
    """Return the report as one HTML page that loads nothing from anywhere.

    Args:
        name: Reference of the sweep.
        curve: Content of `curve.json`.
        trials: Rows of `trials.parquet`.
    """
    template = page_template("tuneloop.sweeps")
    view = view_of(curve, trials)
    advice = advise(curve, trials)
    return template.render(
        name=name,
        style=Markup(page_style()),
        view=view,
        table=trial_table(view),
        tone={"stop": "good", "unclear": "unclear"}.get(advice[0].kind if advice else "", "mixed"),
        advice=advice,
        chart=Markup(draw_chart(view, curve)) if _num_sizes(view) > 1 else "",
        candidates=show_candidates(curve, trials),
        break_even=show_break_even(curve, trials),
        tasks=show_tasks(curve, trials),
        task_sentences=task_sentences(curve),
        effects=show_effects(curve),
        spent=_spent(trials),
    )


def _num_sizes(view: SweepView) -> int:
    return len({point["rows"] for point in view.points})


class Candidate(NamedTuple):
    """What could be used: a combination, or something untrained.

    Attributes:
        hours: Of its training; 0 without one.
        price: Of training and labels; None where no price is known.
        latency_s: Median seconds of an answer.
        is_on_front: No other is as good in all of score, cost and latency, and better in one.
    """

    name: str
    score: float
    hours: float
    price: float | None
    latency_s: float | None
    is_on_front: bool = False


def list_candidates(
    curve: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]
) -> list[Candidate]:
    """Return what could be used, best score first, with the Pareto front marked."""
    found = []
    for cell in curve.get("cells", []):
        done = [trials[number] for number in cell["trials"] if trials[number]["score"] is not None]
        if cell["value"] is None or not done:
            continue
        prices = [(trial.get("price") or 0.0) + (trial.get("label_price") or 0.0) for trial in done]
        has_price = any(trial.get("price") or trial.get("label_price") for trial in done)
        latencies = [t["latency_s"] for t in done if t.get("latency_s") is not None]
        name = _name_of(cell["values"])
        found.append(
            Candidate(
                name,
                cell["value"],
                _mean([trial["wall_s"] / 3600 for trial in done]),
                _mean(prices) if has_price else None,
                _mean(latencies) if latencies else None,
            )
        )
    for base, bars in curve.get("untrained", {}).items():
        several = len(curve["untrained"]) > 1
        found += [
            Candidate(
                f"{bar['arm']}{f' of {base}' * several}",
                bar["score"],
                0.0,
                0.0 if any(one.price is not None for one in found) else None,
                bar["latency_s"],
            )
            for bar in bars
        ]
    sign = 1 if curve.get("higher_is_better", True) else -1
    costs = [_costs(one, sign) for one in found]
    marked = [
        one._replace(is_on_front=not any(_beats(other, own) for other in costs))
        for one, own in zip(found, costs, strict=True)
    ]
    return sorted(marked, key=lambda one: -sign * one.score)


def show_candidates(
    curve: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Return what could be used as a table, the Pareto front with a star."""
    sweep, candidates = Sweep(curve, trials), list_candidates(curve, trials)
    has_price = any(one.price is not None for one in candidates)
    return [
        {
            "": one.name,
            "score": sweep.score(one.score),
            "training": f"{one.hours:.2f} h" if one.hours else "–",
            **({"training and labels, price": format_number(one.price, 2)} if has_price else {}),
            "answer, median s": format_number(one.latency_s, 2),
            "Pareto front": "★" if one.is_on_front else "",
        }
        for one in candidates
    ]


def _costs(one: Candidate, sign: int) -> tuple[float, ...]:
    """Return what should all be small."""
    return (
        -sign * one.score,
        one.hours if one.price is None else one.price,
        one.latency_s or 0.0,
    )


def _beats(other: Sequence[float], own: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(other, own, strict=True)) and other != own


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _name_of(values: Mapping[str, Any]) -> str:
    """Return a combination's values with the last parts of their keys."""
    last = {key: "rows" if key == ROWS_KEY else key.rpartition(".")[2] for key in values}
    return ", ".join(f"{last[key]} {in_words(value)}" for key, value in values.items())


def show_break_even(
    curve: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Return where each curve passes what needs no training."""
    sweep = Sweep(curve, trials)
    rows = []
    for line in curve["curves"]:
        for bar in line.get("forecast", {}).get("break_even", []):
            high = "more than anybody labels" if bar["high"] is None else f"{bar['high']:,}"
            rows.append(
                {
                    "curve": line["series"] or "all trials",
                    "to pass": f"{bar['arm']} ({sweep.score(bar['score'])})",
                    "training rows": {
                        "passed": "passed by the smallest volume",
                        "out of reach": "not with four times the largest volume",
                        "found": f"{bar['num_examples'] or 0:,}",
                        "uncertain": "too uncertain to say",
                    }[bar["found"]],
                    "90% interval": f"{bar['low'] or 0:,} to {high}",
                }
            )
    return rows


def show_tasks(
    curve: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Return each combination with every task's own score, where the trials are of a mixture."""
    sweep = Sweep(curve, trials)
    measured = {
        (line["task"], *cell["trials"]): cell
        for line in curve.get("task_curves", [])
        for cell in line["cells"]
    }
    rows = []
    for cell in curve["cells"] if curve.get("tasks") else []:
        row = {"": _name_of(cell["values"])}
        for task, column in curve["tasks"].items():
            of_task = measured.get((task, *cell["trials"]))
            value = _mean_of([trials[number].get(column) for number in cell["trials"]])
            # Of the rows that its interval is of: those that all trials answered.
            value = of_task["value"] if of_task else value
            row[task] = "–" if value is None else sweep.score(value)
            if of_task:
                if of_task["low"] is not None:
                    ends = (sweep.score(of_task[end]) for end in ("low", "high"))
                    row[task] += f" ({' to '.join(ends)})"
                row[task] += f", {of_task['num_train_examples']:,} rows"
            elif "task_curves" in curve:
                row[task] += ", not trained"
        rows.append(row)
    return rows


def show_effects(curve: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what the other tasks of a mixture do to each of them, as a table."""
    return [
        {
            "task": one["task"],
            "trained with": _name_of(one["values"]) or "–",
            "its rows": f"{one['num_train_examples']:,}",
            "rows of the others": f"{one['num_others']:,}",
            "alone": as_score(one["alone"], one["is_share"]),
            "with the others": as_score(one["mixed"], one["is_share"]),
            "difference": difference_in_words(one),
            "the others": one["effect"],
        }
        for one in curve.get("task_effects", [])
    ]


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _spent(trials: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what the sweep took, in words."""
    by_status: dict[str, int] = {}
    for trial in trials:
        by_status[trial["status"]] = by_status.get(trial["status"], 0) + 1
    seconds = sum(trial["wall_s"] or 0.0 for trial in trials)
    facts = [
        ("trials", ", ".join(f"{count} {status}" for status, count in by_status.items())),
        ("time of training", format_duration(seconds)),
    ]
    for unit, name in (("cpu", "hours of all workers"), ("gpu", "GPU hours")):
        hours = [t[f"{unit}_hours"] for t in trials if t.get(f"{unit}_hours") is not None]
        if hours:
            facts.append((name, f"{sum(hours):.2f}"))
    prices = [trial["price"] for trial in trials if trial.get("price") is not None]
    if prices:
        facts.append(("price of training", f"{sum(prices):,.2f}"))
    labels = [trial["label_price"] for trial in trials if trial.get("label_price") is not None]
    if labels:
        facts.append(("price of the labels, once", f"{max(labels):,.2f}"))
    # Trainings may differ in length.
    begun = [t for t in trials if t["status"] in ("stopped", "done") and t.get("num_steps")]
    if "stopped" in by_status and begun:
        taken = sum(trial["num_steps"] for trial in begun)
        planned = sum(trial["num_steps"] / trial["trained_ratio"] for trial in begun)
        facts.append(("steps saved by early stopping", f"{1 - taken / planned:.0%}"))
    return facts


class _Scale(NamedTuple):
    """Where scores and numbers of rows are in the drawing."""

    rows: tuple[float, float]
    scores: tuple[float, float]

    def x(self, rows: float) -> float:
        low, high = (math.log(end) for end in self.rows)
        share = (math.log(rows) - low) / (high - low)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, score: float) -> float:
        low, high = self.scores
        share = (score - low) / (high - low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def draw_chart(view: SweepView, curve: Mapping[str, Any]) -> str:
    """Return the learning curves as SVG: points with intervals, laws with theirs, bars to pass."""
    bars = _bars_of(curve)
    sizes = sorted({point["rows"] for point in view.points} | set(view.forecast_rows))
    scores = [one[end] for one in (*view.points, *view.lines) for end in ("low", "high", "score")]
    known = [score for score in (*scores, *bars.values()) if score is not None]
    pad = 0.04 * ((max(known) - min(known)) or 1)
    scale = _Scale((sizes[0] / 1.15, sizes[-1] * 1.15), (min(known) - pad, max(known) + pad))
    series = list(dict.fromkeys(point["series"] for point in view.points))
    parts = [*_axes(scale, sizes, view.percent)]
    for number, (arm, score) in enumerate(bars.items()):
        y = scale.y(score)
        label = Markup.escape(f"{arm} {as_score(score, view.percent)}")
        # Beside one another: their scores may be close.
        end, anchor = ((_WIDTH - _RIGHT, "end"), (_LEFT + 4, "start"))[number % 2]
        parts.append(
            f'<line class="pass" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="pass" x="{end}" y="{y - 5}" text-anchor="{anchor}">{label}</text>'
        )
    for number, name in enumerate(series):
        colour = f"c{number % _COLOURS}"
        path = [point for point in view.lines if point["series"] == name]
        if path:
            upper = [f"{scale.x(p['rows'])},{scale.y(p['high'])}" for p in path]
            lower = [f"{scale.x(p['rows'])},{scale.y(p['low'])}" for p in reversed(path)]
            middle = " ".join(f"{scale.x(p['rows'])},{scale.y(p['score'])}" for p in path)
            parts.append(f'<polygon class="band {colour}" points="{" ".join(upper + lower)}"/>')
            parts.append(f'<polyline class="law {colour}" points="{middle}"/>')
        for point in view.points:
            if point["series"] != name:
                continue
            x, y = scale.x(point["x"]), scale.y(point["score"])
            if point["low"] is not None:
                ends = f'y1="{scale.y(point["low"])}" y2="{scale.y(point["high"])}"'
                parts.append(f'<line class="whisker {colour}" x1="{x}" x2="{x}" {ends}/>')
            label = Markup.escape(f"{point['trial']}: {as_score(point['score'], view.percent)}")
            radius = 7 if point["best"] else 4.5
            parts.append(
                f'<circle class="{colour}" cx="{x}" cy="{y}" r="{radius}"><title>{label}</title>'
                "</circle>"
            )
    legend = "".join(
        f'<span><svg width="12" height="12"><circle class="c{number % _COLOURS}" cx="6" cy="6" '
        f'r="5"/></svg> {Markup.escape(name)}</span>'
        for number, name in enumerate(series)
    )
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="score by training rows">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div>'
    )


def _bars_of(curve: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores that need no training, by a name that tells base models apart."""
    scores: dict[str, dict[str, float]] = {}
    for base, bars in curve.get("untrained", {}).items():
        for bar in bars:
            scores.setdefault(bar["arm"], {})[base] = bar["score"]
    return {
        arm if len(set(by_base.values())) == 1 else f"{arm} of {base}": score
        for arm, by_base in scores.items()
        for base, score in by_base.items()
    }


def _axes(scale: _Scale, sizes: Sequence[int], percent: bool) -> list[str]:
    low, high = scale.scores
    step = _round_step((high - low) / 6)
    parts = []
    tick = math.ceil(low / step) * step
    while tick <= high:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        label = f"{100 * tick:.0f}%" if percent else f"{tick:.3g}"
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
        tick += step
    for size in sizes:
        x = scale.x(size)
        parts.append(
            f'<text x="{x}" y="{_HEIGHT - 20}" text-anchor="middle">{format_number(size)}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">training rows, '
        "each step doubles</text>"
    )
    return parts


def _round_step(width: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at least so wide."""
    power = 10 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
