"""The gate: whether a candidate may take the place of what it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from tuneloop.config import FloorConfig
from tuneloop.errors import ConfigError, Problem
from tuneloop.evals.reporting.formatting import (
    format_difference,
    format_estimate,
    format_interval,
    format_size,
    format_value,
)
from tuneloop.evals.reporting.headline import Direction, describe_rows, direction, margin_of
from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.estimates import design_of, rows_to_find, scale_of
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.predictions import paired_values
from tuneloop.evals.scoring.results import Evaluation

Verdict = Literal["better", "not worse", "worse", "cannot tell"]
_VERDICTS: dict[Direction, Verdict] = {
    "better": "better",
    "not_worse": "not worse",
    "equal": "not worse",
    "worse": "worse",
    "unclear": "cannot tell",
}
_ALL_ROWS = "all rows"


@dataclass(frozen=True)
class GateCheck:
    """One thing that is asked of the candidate.

    Args:
        name: What is asked.
        outcome: `better`, `not worse`, `worse`; `reached`, `missed`; or `cannot tell`.
        detail: The numbers it rests on.
        rows_needed: About how many test rows would tell; None where it is told, or where rows are
            not what is missing.
    """

    name: str
    passed: bool
    outcome: str
    detail: str
    rows_needed: int | None = None


@dataclass(frozen=True)
class GateResult:
    """What the gate says.

    Args:
        verdict: About the difference alone.
        checks: The difference first, then rows that were trained on, then the floors.
    """

    candidate: str
    against: str
    verdict: Verdict
    margin: float
    checks: list[GateCheck]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {"passed": self.passed, **asdict(self)}


def decide(
    evaluation: Evaluation, floors: Sequence[FloorConfig] = (), is_same: bool = False
) -> GateResult:
    """Return whether the last arm may take the place of the one before it.

    It has to be better, or not worse by `evaluation.margin` or more, has to be trained on none of
    the rows, and to reach every floor. What cannot be told is not passed.

    Args:
        evaluation: Of two arms.
        floors: Scores to reach.
        is_same: Both arms are one model: it is not worse than itself.

    Raises:
        ConfigError: A floor for rows that there are not.
    """
    # Also of two arms of one model, of which one is bound to a form.
    (pair,) = evaluation.comparison["pairs"]
    metric = evaluation.metric(evaluation.primary)
    difference, margin = pair["differences"][evaluation.primary], margin_of(evaluation)
    verdict = _VERDICTS[direction(evaluation, pair, evaluation.primary)]
    detail = format_difference(difference["value"], metric)
    if interval := format_interval(difference, metric):
        detail += f" ({evaluation.metrics['confidence']:.0%} interval {interval})"
    detail += f", {describe_rows(evaluation, difference)}"
    rows = None
    if is_same:
        verdict, detail = "not worse", f"one model; {detail}"
    elif verdict == "cannot tell":
        lacks = _lacks(evaluation, pair)
        rows = None if lacks else _rows_needed(evaluation, pair, difference)
        detail += lacks or _about(rows, difference)
    size = format_size(margin, metric)
    asked = GateCheck(
        f"{pair['arm']} is not worse than {pair['other']} by {size} or more",
        verdict in ("better", "not worse"),
        verdict,
        detail,
        rows,
    )
    checks = [asked, *_unseen(evaluation), *_floors(evaluation, floors, metric)]
    return GateResult(pair["arm"], pair["other"], verdict, margin, checks)


def _lacks(evaluation: Evaluation, pair: dict[str, Any]) -> str:
    """Return that answers are missing, where with all of them there would be a verdict."""
    if "worst_case" not in pair:
        return ""
    come = pair | {"worst_case": None}
    is_told = direction(evaluation, come, evaluation.primary) != "unclear"
    return "; too many answers are missing to tell" if is_told else ""


def _rows_needed(
    evaluation: Evaluation, pair: dict[str, Any], difference: dict[str, Any]
) -> int | None:
    """Return about how many rows would tell, if the difference is what was measured.

    They exclude a loss of the margin or more in four of five cases; where the loss measured is that
    large, they show it.
    """
    metric, margin = evaluation.metric(evaluation.row_metric), margin_of(evaluation)
    if evaluation.row_metric != evaluation.primary:
        return _rows_by_width(difference, margin)
    examples = evaluation.pair(pair["other"], pair["arm"])
    examples = examples.where(~np.isnan(examples.gain))
    if not examples or difference["low"] is None:
        return None
    gain = float(examples.gain.mean())
    theirs, ours = (scores.to_numpy() for scores in examples.sides(evaluation.row_metric))
    if any("models" in arm for arm in evaluation.arms):
        ours, theirs = paired_values(
            [e.after for e in examples], [e.before for e in examples], evaluation.row_metric
        )
    distance = gain + margin if gain > -margin else -gain
    names, ids = (examples.sides(name)[1].to_pylist() for name in ("cluster", "example_id"))
    clusters = Clusters.of([name or row for name, row in zip(names, ids, strict=True)])
    confidence = evaluation.metrics["confidence"]
    design = design_of(ours, theirs, clusters, scale_of(metric), confidence)
    needed = None if design is None or distance == 0 else rows_to_find(design, min(1.0, distance))
    return None if needed is None else max(needed, len(examples) + 1)


def _rows_by_width(difference: dict[str, Any], margin: float) -> int | None:
    """Return about how many rows narrow the interval enough, if the difference stays the same."""
    value, low, high = difference["value"], difference["low"], difference["high"]
    # What seeds add to the width does not go with the rows.
    if low is None or value in (-margin, 0) or difference.get("seed_share"):
        return None
    ratio = (value - low) / (value + margin) if value > -margin else (high - value) / -value
    return max(int(difference["n"]) + 1, round(difference["n"] * ratio**2))


def _about(rows: int | None, estimate: dict[str, Any]) -> str:
    if rows is None and (share := estimate.get("seed_share")):
        return f"; more {'' if share > 0.5 else 'rows and '}trainings would have to tell"
    if rows is None:
        return "; more rows than anyone has would have to tell"
    return f"; about {float(f'{rows:.2g}'):,.0f} rows would tell"


def _unseen(evaluation: Evaluation) -> list[GateCheck]:
    """Return the check that the candidate was trained on none of the rows, if that is known."""
    parts = evaluation.candidate.get("contamination")
    if parts is None:
        return []
    seen, total = parts["flagged"]["n"], parts["all"]["n"]
    detail = f"{seen} of {total} rows are in its training data"
    name = f"{evaluation.candidate['name']} was trained on none of the rows"
    return [GateCheck(name, not seen, "missed" if seen else "reached", detail)]


def _floors(
    evaluation: Evaluation, floors: Sequence[FloorConfig], metric: Metric
) -> list[GateCheck]:
    parts = evaluation.slices["arms"][evaluation.candidate["name"]]
    # Macro-F1 is of all rows together.
    by_row = f", by {evaluation.row_metric}" * (evaluation.row_metric != evaluation.primary)
    checks, problems = [], []
    for number, floor in enumerate(floors):
        if floor.by is None:
            score = evaluation.candidate["scores"][evaluation.primary]
            worst = evaluation.candidate.get("worst_case")
            score = score | ({"worst": worst["low"]} if worst else {})
            checks.append(_floor(evaluation, floor, metric, _ALL_ROWS, score))
            continue
        # Several columns may part the rows alike.
        of_column = [
            part | name
            for part in parts
            for name in [{"by": part["by"], "slice": part["slice"]}, *part.get("also", [])]
            if name["by"] == floor.by
        ]
        meant = [part for part in of_column if floor.value in (None, part["slice"])]
        if not meant:
            known = of_column or parts
            problems.append(
                Problem(
                    "the test has no such rows, or fewer than "
                    f"{evaluation.slices['smallest']} of them, or no others",
                    where=f"evaluation.floors.{number}",
                    got=floor.by + (f" = {floor.value}" if floor.value is not None else ""),
                    allowed=", ".join(
                        dict.fromkeys(p["slice"] if of_column else p["by"] for p in known)
                    )
                    or "all rows together: the test has no parts",
                )
            )
        for part in meant:
            # In XML and in a table's cell no other character may stand.
            value = "".join(c for c in " ".join(part["slice"].split()) if c.isprintable())
            name = f"{part['by']} = {value}{by_row}"
            if missing := part.get("num_unscored"):
                # As if all of them were wrong.
                worst_case = (part["value"] or 0.0) * part["n"] / (part["n"] + missing)
                part |= {"worst": worst_case}
            checks.append(_floor(evaluation, floor, metric, name, part))
    ConfigError.refuse(problems)
    return checks


def _floor(
    evaluation: Evaluation, floor: FloorConfig, metric: Metric, rows: str, score: dict[str, Any]
) -> GateCheck:
    low, high, value = score["low"], score["high"], score["value"]
    least = format_value(floor.at_least, metric)
    detail = f"{format_estimate(score, metric)}, {describe_rows(evaluation, score)}"
    needed = None
    if low is not None and low >= floor.at_least:
        lacks = score.get("worst", low) < floor.at_least
        outcome = "cannot tell" if lacks else "reached"
        detail += "; too many answers are missing to tell" if lacks else ""
    elif high is not None and high < floor.at_least:
        outcome = "missed"
    else:
        outcome = "cannot tell"
        if score.get("seed_share"):
            detail += _about(None, score)
        elif low is not None and value != floor.at_least:
            # The end of the interval that is nearer to the floor goes with the root of the rows.
            end = low if value > floor.at_least else high
            ratio = (value - end) / (value - floor.at_least)
            needed = max(score["n"] + 1, round(score["n"] * ratio**2))
            detail += _about(needed, score)
    name = f"at least {least} on {rows}"
    return GateCheck(name, outcome == "reached", outcome, detail, needed)


def to_junit(result: GateResult) -> str:
    """Return the checks as JUnit XML: one test case for each, a failure where it is not passed."""
    failed = sum(not check.passed for check in result.checks)
    suite = ElementTree.Element(
        "testsuite",
        name=f"tuneloop gate: {result.candidate} against {result.against}",
        tests=str(len(result.checks)),
        failures=str(failed),
        errors="0",
    )
    for check in result.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname="tuneloop.gate", name=check.name, time="0"
        )
        if not check.passed:
            failure = ElementTree.SubElement(
                case, "failure", type=check.outcome, message=f"{check.outcome}: {check.detail}"
            )
            failure.text = check.detail
        output = ElementTree.SubElement(case, "system-out")
        output.text = f"{check.outcome}: {check.detail}"
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(result: GateResult, report: str) -> str:
    """Return the checks as Markdown.

    Args:
        report: Where the whole report is.
    """
    lines = [
        f"### {'Passed' if result.passed else 'Not passed'}: `{result.candidate}` is "
        + _in_words(result.verdict, result.against),
        "",
        "| check | outcome | |",
        "|---|---|---|",
    ]
    for check in result.checks:
        cells = (check.name, f"**{check.outcome}**", check.detail)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", f"Report: `{report}`", ""])


def headline(result: GateResult) -> str:
    """Return the result in a line."""
    passed = "passed" if result.passed else "not passed"
    return f"{passed}: {result.candidate} is {_in_words(result.verdict, result.against)}"


def _in_words(verdict: Verdict, other: str) -> str:
    return {
        "better": f"better than `{other}`",
        "not worse": f"not worse than `{other}`",
        "worse": f"worse than `{other}`",
        "cannot tell": f"neither shown to be worse than `{other}` nor not to be",
    }[verdict]
