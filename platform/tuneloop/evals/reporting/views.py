"""An evaluation as plain values a page can show: texts, and positions in per cent of a width."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import psutil
import pyarrow.compute as pc

from tuneloop.artifacts import git_commit, package_versions
from tuneloop.config import TuneloopConfig
from tuneloop.evals.reporting.error_analysis import describe_score, prompt_turns
from tuneloop.evals.reporting.formatting import (
    format_cost,
    format_difference,
    format_estimate,
    format_interval,
    format_number,
    format_p_value,
    format_value,
    word_diff,
)
from tuneloop.evals.reporting.headline import describe_arm, describe_rows, direction
from tuneloop.evals.scoring.function_calls import without_accepted
from tuneloop.evals.scoring.metrics import FIELD_PREFIX, PRECISION_PREFIX, Metric, in_task
from tuneloop.evals.scoring.pairing import Change, PairedExample
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.text import shorten

_NUM_EXAMPLES = 5
_LONGEST_TEXT = 1500
_LONGEST_EVIDENCE, _LONGEST_ROW = 120, 300
# A label that fewer of the rows like its own have is doubtful.
_DENIED = 0.2
_MOST_LABELS = 20
_OUTCOME_LABELS = {
    "fixed": "fixed",
    "better": "better",
    "introduced": "got worse",
    "worse": "worse",
    "both_right": "right in both",
    "both_wrong": "wrong in both",
    "same": "same score",
}
_SHOWN_CHANGES: dict[Change, str] = {
    "introduced": "Got worse",
    "fixed": "Got better",
    "both_wrong": "Still wrong",
}


def show_arms(evaluation: Evaluation, secondary: Sequence[str]) -> list[dict[str, Any]]:
    """Return every arm as text and bar positions; `secondary` names the metrics besides."""
    metric = evaluation.metric(evaluation.primary)
    ends = [
        arm["scores"][evaluation.primary]["high"] or arm["scores"][evaluation.primary]["value"] or 0
        for arm in evaluation.arms
    ]
    top = max([*ends, 1e-9]) * 1.1 if metric.kind == "number" else 1.0
    shown = []
    for arm in evaluation.arms:
        score = arm["scores"][evaluation.primary]
        shown.append(
            {
                "name": arm["name"],
                "candidate": arm["name"] == evaluation.candidate["name"],
                **_bar(score, metric, top),
                "method": score["method"],
                "rows": describe_rows(evaluation, score),
                "worst_case": " to ".join(
                    format_value(end, metric) for end in arm.get("worst_case", {}).values()
                ),
                "sampling": _sampling_noise(arm.get("sampling")),
                "trainings": describe_trainings(arm, evaluation.primary, metric),
                "num_scored": arm["num_scored"],
                "num_unscored": arm["num_unscored"],
                "reasons": arm["unscored_reasons"],
                "secondary": [
                    format_value(arm["scores"][name]["value"], evaluation.metric(name))
                    for name in secondary
                ],
                "completion_tokens": format_number(arm["median_completion_tokens"]),
                "prompt_tokens": format_number(arm["mean_prompt_tokens"]),
                "latency": format_number(arm["median_latency_s"], 2),
                # An evaluation of an earlier version has neither.
                "cost": format_cost(arm.get("cost_per_1000_requests")),
                "contamination": _contamination(arm.get("contamination"), metric),
            }
        )
    return shown


def describe_trainings(arm: dict[str, Any], primary: str, metric: Metric) -> str:
    """Return each model's score of an arm that is several trainings, in words; else nothing."""
    models = arm.get("models", [])
    if not models:
        return ""
    scores = [
        f"{model['name']} {format_value(model['scores'][primary]['value'], metric)}"
        for model in models
    ]
    told = [f"{len(models)} trainings of one recipe, whose mean is the score: {', '.join(scores)}"]
    score = arm["scores"][primary]
    if (share := score.get("seed_share")) is not None:
        told.append(
            "The interval holds for other seeds as well. The seeds make up "
            f"{share:.0%} of the score's variance: more trainings would make that smaller, more "
            "rows would not"
        )
    elif score["low"] is not None:  # rows of one cluster tell nothing of other seeds
        told.append("They are right and wrong on the same rows")
    told.append(f"Examples, error tags and judges look at the answers of {models[0]['name']}")
    return ". ".join(told)


def _sampling_noise(sampling: dict[str, Any] | None) -> str:
    """Return in words how much of a score's uncertainty more answers to each row would remove."""
    if sampling is None:
        return ""
    text = f"{sampling['num_samples']} answers to each row, whose mean is its score"
    if sampling["share"] is None:
        return text
    shorter = 1 - math.sqrt(1 - sampling["share"])
    return (
        f"{text}. The sampling makes up {sampling['share']:.0%} of the score's variance: more "
        f"answers would make the interval at most {shorter:.0%} shorter, the rest takes more rows"
    )


def _contamination(parts: dict[str, Any] | None, metric: Metric) -> str:
    """Return how many rows an arm was trained on, with the scores on these and on the others."""
    if parts is None:
        return "unknown"
    flagged, clean = parts["flagged"], parts["clean"]
    if not flagged["n"]:
        return "none"
    rest = parts.get("unknown", clean)
    seen, others = (format_value(part["value"], metric) for part in (flagged, rest))
    unknown = ", of which it is not known" if "unknown" in parts else ""
    return f"{flagged['n']} of {parts['all']['n']}: {seen}; the others {others}{unknown}"


def show_calibration(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return by arm how sure it was of its labels, and how often it was right."""
    return [
        {
            "arm": arm["name"],
            "error": f"{100 * calibration['expected_calibration_error']:.1f} points",
            "n": calibration["n"],
            "bins": [
                {
                    "range": f"{one['low']:.0%} to {one['high']:.0%}",
                    "n": one["n"],
                    "probability": f"{one['mean_probability']:.0%}",
                    "accuracy": f"{one['accuracy']:.0%}",
                }
                for one in calibration["bins"]
            ],
        }
        for arm in evaluation.arms
        if (calibration := arm.get("calibration"))
    ]


def show_pair(evaluation: Evaluation, pair: dict[str, Any]) -> dict[str, Any]:
    """Return a paired comparison as text and as positions on an axis, in per cent of its width."""
    metric = evaluation.metric(evaluation.primary)
    difference = pair["differences"][evaluation.primary]
    outcomes = pair["outcomes"]
    low, high = difference["low"], difference["high"]
    # An evaluation of an earlier version has no adjusted p-values.
    p_value = difference.get("p_adjusted", difference["p_value"])
    reach = max(
        abs(p["differences"][evaluation.primary][end] or 0.0)
        for p in evaluation.comparison["pairs"]
        for end in ("low", "high", "value")
    )
    # The axis runs from -span to +span, with zero in the middle.
    span = max(reach * 1.05, 1e-9)
    if metric.kind != "number":
        span = min(1.0, math.ceil(10 * reach) / 10) or 0.1
    total = max(1, sum(outcomes.values()))
    return {
        "arm": pair["arm"],
        "other": pair["other"],
        "n": pair["num_both_scored"],
        "difference": format_difference(difference["value"], metric),
        "interval": format_interval(difference, metric),
        "p": format_p_value(p_value),
        "is_adjusted": p_value != difference["p_value"],
        "test": difference["test"],
        "method": difference["method"],
        "direction": direction(evaluation, pair, evaluation.primary),
        "rows": describe_rows(evaluation, difference),
        "at": _position(difference["value"], span),
        "from": _position(low, span),
        "to": _position(high, span),
        "span": f"{span:.3f}" if metric.kind == "number" else f"{100 * span:.0f}",
        "outcomes": [
            {
                "kind": kind,
                "label": _OUTCOME_LABELS[kind],
                "count": count,
                "width": 100 * count / total,
            }
            for kind, count in outcomes.items()
        ],
        "num_fixed": outcomes.get("fixed", outcomes.get("better", 0)),
        "num_worse": outcomes.get("introduced", outcomes.get("worse", 0)),
    }


def show_parts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the score of each field: one group for each, one bar for each arm."""
    groups = []
    for name in evaluation.metrics["metrics"]:
        task, _, metric = name.rpartition("/")
        if metric.startswith(FIELD_PREFIX):
            field = in_task(task, metric.removeprefix(FIELD_PREFIX)).lstrip("/")
            bars = _bars(evaluation, name)
            groups.append({"name": field, "bars": bars})
            # What is right of the fields that an answer gives differs where it invents some.
            given = in_task(task, PRECISION_PREFIX + metric.removeprefix(FIELD_PREFIX)).lstrip("/")
            if given in evaluation.metrics["metrics"]:
                precision = _bars(evaluation, given)
                if [bar["value"] for bar in precision] != [bar["value"] for bar in bars]:
                    groups.append({"name": f"{field}, where given", "bars": precision})
    return groups


def show_labels(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return F1 by label, the worst of the last arm first: one group each, one bar for each arm."""
    groups = []
    own = evaluation.candidate.get("label_f1", {})
    for label in sorted(own, key=lambda label: own[label] or 0.0):
        bars = []
        for arm in evaluation.arms:
            score = {"value": arm["label_f1"].get(label), "low": None, "high": None}
            bars.append({"arm": arm["name"], **_bar(score, Metric("F1"))})
        groups.append({"name": label, "bars": bars})
    return groups


def show_confusion(evaluation: Evaluation) -> dict[str, Any]:
    """Return the candidate's answers by label: `columns` and `rows` of counts; empty without."""
    # An evaluation of an earlier version has none.
    confusion = evaluation.candidate.get("confusion", {})
    if not 0 < len(confusion) <= _MOST_LABELS:
        return {}
    answered = {answer for row in confusion.values() for answer in row if answer}
    columns = [*confusion, *sorted(answered - set(confusion))]
    return {
        "columns": [*columns, "no label"],
        "rows": [
            {"label": label, "counts": [row.get(name, 0) for name in [*columns, ""]]}
            for label, row in confusion.items()
        ],
    }


def show_slices(evaluation: Evaluation, arm: str = "", other: str = "") -> dict[str, Any]:
    """Return an arm's slices as text, worst first; empty where there are none.

    Args:
        arm: The candidate if empty.
        other: The arm that changes are told against; the strongest other one if empty. Changes are
            known for the candidate alone.
    """
    arm = arm or evaluation.candidate["name"]
    other = other or evaluation.strongest_other() or ""
    parts = evaluation.slices.get("arms", {}).get(arm, [])
    if not parts:
        return {}
    metric, level = evaluation.metric(evaluation.row_metric), 1 - evaluation.metrics["confidence"]
    sign = -1 if metric.better == "lower" else 1
    changes = {
        (change["by"], change["slice"]): change
        for pair in evaluation.slices["pairs"]
        if (pair["arm"], pair["other"]) == (arm, other)
        for change in pair["slices"]
    }
    rows, worse, lost = [], [], []
    for part in parts:
        name = f"{part['by'].replace('_', ' ')}: {part['slice']}"
        change = changes.get((part["by"], part["slice"]))
        is_worse = _is_below(part, sign * ((part["value"] or 0) - (part["rest"] or 0)), level)
        is_lost = change is not None and _is_below(change, sign * (change["value"] or 0), level)
        worse += [name] * is_worse
        lost += [name] * is_lost
        interval = format_interval(change, metric) if change else ""
        rows.append(
            {
                "name": name,
                "rows": describe_rows(evaluation, part),
                "score": format_value(part["value"], metric),
                "interval": format_estimate(part, metric).partition(" ")[2].strip("()"),
                "rest": format_value(part["rest"], metric),
                "p": format_p_value(part["p_adjusted"]),
                "is_worse": is_worse,
                "change": format_difference(change["value"], metric) if change else "",
                "change_interval": interval,
                "change_p": format_p_value(change["p_adjusted"]) if change else "",
                "is_lost": is_lost,
            }
        )
    return {
        "arm": arm,
        "metric": evaluation.row_metric * (evaluation.row_metric != evaluation.primary),
        "other": other if changes else "",
        "rows": rows,
        "worse": worse,
        "lost": lost,
    }


def _is_below(part: dict[str, Any], difference: float, level: float) -> bool:
    """Return whether a loss is shown, with all slices that were looked at in mind."""
    return difference < 0 and part["p_adjusted"] is not None and part["p_adjusted"] <= level


def show_tasks(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return a mixture's tasks: a bar for each arm, and the candidate against the others."""
    groups, ids = [], evaluation.column("example_id")
    for task, about in evaluation.tasks.items():
        name = in_task(task, about["primary"])
        metric = evaluation.metric(name)
        groups.append(
            {
                "name": task,
                "label": metric.label.partition(": ")[2],
                "num_examples": len(
                    pc.unique(ids.filter(pc.equal(evaluation.column("task"), task)))
                ),
                "bars": _bars(evaluation, name),
                "differences": [
                    {
                        "other": pair["other"],
                        "value": format_difference(difference["value"], metric),
                        "interval": format_interval(difference, metric),
                        "direction": direction(evaluation, pair, name),
                    }
                    for pair in evaluation.candidate_pairs()
                    for difference in [pair["differences"][name]]
                ],
            }
        )
    return groups


def _bars(evaluation: Evaluation, name: str) -> list[dict[str, Any]]:
    """Return a metric of every arm as text and bar positions."""
    metric = evaluation.metric(name)
    return [{"arm": arm["name"], **_bar(arm["scores"][name], metric)} for arm in evaluation.arms]


def _bar(score: dict[str, Any], metric: Metric, top: float = 1.0) -> dict[str, Any]:
    """Return a score and its interval as text, and as positions in per cent of `top`'s width."""
    ends = {"bar": score["value"], "low": score["low"], "high": score["high"]}
    value, _, interval = format_estimate(score, metric).partition(" ")
    return {"value": value, "interval": interval.strip("()")} | {
        name: None if end is None else round(100 * end / top, 2) for name, end in ends.items()
    }


def show_tags(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the error tags that occur: counts of each arm, changes since the strongest other."""
    strongest = evaluation.strongest_other()
    changes: dict[str, Any] = next(
        (p["error_tags"] for p in evaluation.candidate_pairs() if p["other"] == strongest), {}
    )
    return [
        {
            "name": tag,
            "label": meaning,
            "counts": [
                (count, 100 * count / max(1, arm["num_scored"]))
                for arm in evaluation.arms
                for count in [arm["error_tags"].get(tag, 0)]
            ],
            "changes": changes.get(tag),
        }
        # An evaluation of an earlier version lacks tags that are newer.
        for tag, meaning in evaluation.tags.items()
        if any(arm["error_tags"].get(tag) for arm in evaluation.arms)
    ]


def show_examples(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the examples of each comparison, that with the strongest other arm first."""
    if evaluation.metrics["task_type"] == "language_modeling":
        return []
    strongest = evaluation.strongest_other()
    pairs = sorted(evaluation.candidate_pairs(), key=lambda pair: pair["other"] != strongest)
    groups = []
    for pair in pairs:
        examples = evaluation.pair(pair["other"], pair["arm"])
        changes = []
        for change, label in _SHOWN_CHANGES.items():
            changed = examples.where(examples.change == change)
            if changed:
                first = changed[:_NUM_EXAMPLES]
                near = evaluation.near([e.example_id for e in first])
                shown = [_example(evaluation, e, near[e.example_id]) for e in first]
                changes.append({"label": label, "count": len(changed), "examples": shown})
        if changes:
            groups.append({"words": describe_arm(pair["other"]), "changes": changes})
    return groups


def _example(
    evaluation: Evaluation, example: PairedExample, near: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    reference = shorten(example.reference, _LONGEST_TEXT)
    return {
        "id": example.example_id,
        "question": shorten(example.question, _LONGEST_TEXT),
        "reference": reference,
        "sides": [
            {
                "arm": prediction.arm,
                "score": describe_score(evaluation, prediction, evaluation.row_metric),
                "right": prediction.scores[evaluation.row_metric] == 1,
                "tags": [
                    {"name": tag, "evidence": shorten(evidence.get(tag, ""), _LONGEST_EVIDENCE)}
                    for evidence in [evidence_of(prediction)]
                    for tag in prediction.error_tags
                ],
                "pieces": word_diff(
                    without_accepted(reference), shorten(prediction.completion, _LONGEST_TEXT)
                ),
                "empty": not prediction.completion.strip(),
                "num_samples": len(prediction.samples),
            }
            for prediction in (example.before, example.after)
        ],
        "nearest": [show_train_row(row) for row in near]
        if example.after.arm == evaluation.candidate["name"]
        else [],
    }


def evidence_of(prediction: Prediction) -> dict[str, str]:
    """Return what each of an answer's tags rests on, by tag."""
    return {evidence["tag"]: evidence["detail"] for evidence in prediction.error_evidence}


def show_train_row(row: dict[str, Any]) -> dict[str, str]:
    """Return a training row near a question as text: what it asks and says, and why it matters."""
    notes = [f"similarity {row['similarity']:.2f}"]
    if row["conflicts"]:
        notes.append("says otherwise than the reference")
    if row["gives_this_answer"]:
        notes.append("gives this answer")
    if row["agreement"] is not None and row["agreement"] < _DENIED:
        notes.append(f"{row['agreement']:.0%} of the rows like it have its label")
    return {
        "row_id": row["row_id"],
        "question": shorten(row["question"], _LONGEST_ROW),
        "answer": shorten(row["answer"], _LONGEST_ROW),
        "notes": "; ".join(notes),
        "tone": "wrong" if row["conflicts"] else "",
    }


def show_prompts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return what each arm was sent for the first example, turn by turn."""
    shown = []
    for arm in evaluation.arms:
        prompt = next(p.prompt for p in evaluation.predictions if p.arm == arm["name"])
        turns = [
            (role, shorten(text, _LONGEST_TEXT) if role == "text" else text)
            for role, text in prompt_turns(prompt)
        ]
        shown.append({"arm": arm["name"], "turns": turns})
    return shown


def list_facts(
    evaluation: Evaluation, config: TuneloopConfig, dataset: str
) -> list[tuple[str, str]]:
    """Return what was run, as label and text."""
    e = config.evaluation
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    greedy = "greedy (temperature 0)" if e.temperature == 0 else f"temperature {e.temperature:g}"
    many = f", {e.num_samples} answers to each question" if e.num_samples > 1 else ""
    # An evaluation of an earlier version does not say what answered.
    sources = {arm["name"]: arm.get("answered_by", "") for arm in evaluation.arms}
    is_served = any(not source or source.startswith("served here") for source in sources.values())
    return [
        ("Task", f"{config.task.describe()}, scored by {evaluation.primary}"),
        *([("Base model", config.model.base)] if is_served else []),
        *((f"Arm {name}", source) for name, source in sources.items() if source),
        ("Dataset", f"{dataset}, {e.split} split, {evaluation.metrics['num_examples']} examples"),
        ("Looks at these rows", _describe_looks(evaluation)),
        ("Sampling", f"{greedy}{many}, at most {e.max_tokens} tokens, seed {e.seed}"),
        ("Requests", f"over HTTP, {e.concurrency} in flight"),
        ("Resampling", f"{e.num_resamples:,} resamples, seed {e.seed}"),
        ("Versions", f"{versions}, Python {platform.python_version()}"),
        ("Commit", git_commit() or "not in a git checkout"),
        (
            "Machine",
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, "
            f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        ),
    ]


def _describe_looks(evaluation: Evaluation) -> str:
    """Return how often the rows were scored, and what that does to the score."""
    # An evaluation of an earlier version does not say.
    looks, arms = (evaluation.metrics.get(name) for name in ("num_looks", "num_arms_scored"))
    if looks is None:
        return "not counted"
    if looks == 1:
        return "the first in this workspace: nothing can have been chosen by their scores"
    scored = f", of {arms} different models and prompts" if arms else ""
    return (
        f"{looks} evaluations in this workspace{scored}, this one included; the best of several "
        "that are chosen by the score of these rows is worse on others. Choose on the validation "
        "split"
    )


def _position(value: float | None, span: float) -> float | None:
    return None if value is None else round(50 + 50 * value / span, 2)
