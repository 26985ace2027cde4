"""The headline of an evaluation: whether the candidate is better than each other arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tuneloop.config import NO_DIFFERENCE
from tuneloop.evals.reporting.formatting import (
    format_difference,
    format_estimate,
    format_interval,
    format_p_value,
    format_size,
    format_value,
    join_words,
)
from tuneloop.evals.reporting.gain import describe_gain
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.records import (
    BASE,
    BASE_CONSTRAINED,
    FEW_SHOT,
    FINETUNED,
    FINETUNED_CONSTRAINED,
    SIMPLE,
)

Tone = Literal["good", "mixed", "bad", "unclear"]
Direction = Literal["better", "not_worse", "equal", "unclear", "worse"]
_ARM_WORDS = {
    BASE: "the base model",
    FEW_SHOT: "few-shot prompting",
    BASE_CONSTRAINED: "the base model with constrained answers",
    SIMPLE: "the simple arm",
    FINETUNED_CONSTRAINED: "the finetuned model with constrained answers",
    FINETUNED: "the finetuned model",
}
_TONES: dict[Direction, Tone] = {
    "better": "good",
    "not_worse": "mixed",
    "equal": "unclear",
    "unclear": "unclear",
    "worse": "bad",
}


@dataclass(frozen=True)
class Headline:
    """What an evaluation says, in a sentence.

    Args:
        title: A few words.
        detail: The differences it rests on, with their intervals.
    """

    tone: Tone
    title: str
    detail: str


def write_headline(evaluation: Evaluation) -> Headline:
    """Return whether the candidate is better than each arm before it."""
    name = evaluation.candidate["name"]
    subject = "Finetuning" if name == FINETUNED else describe_arm(name, capital=True)
    pairs = evaluation.candidate_pairs()
    primary = evaluation.primary
    metric = evaluation.metric(primary)
    if not pairs:
        score = format_estimate(evaluation.candidate["scores"][primary], metric)
        return Headline("unclear", f"{subject}: {score}", "One arm alone: nothing to compare.")
    directions = [direction(evaluation, pair, primary) for pair in pairs]
    detail = "; ".join(_difference_in_words(evaluation, pair) for pair in pairs) + "."
    detail += describe_gain(evaluation)
    detail += _what_is_enough(evaluation, pairs)
    detail += _what_it_can_show(evaluation, pairs, directions)
    detail += _worst_case_in_words(evaluation)
    if len(set(directions)) == 1:
        words = _all_alike(directions[0], margin_of(evaluation), metric)
        if directions[0] == "unclear" and any(_lacks_answers(evaluation, pair) for pair in pairs):
            words = "made no clear difference: too many answers are missing to tell"
        elif directions[0] == "unclear" and any(_lacks_trainings(pair, primary) for pair in pairs):
            words = "made no clear difference: too few trainings to tell"
        return Headline(_TONES[directions[0]], f"{subject} {words}", detail)
    clauses = []
    for kind, words in _clauses(margin_of(evaluation), metric).items():
        others = [p["other"] for p, d in zip(pairs, directions, strict=True) if d == kind]
        if others:
            clauses.append(f"{words} {join_words([describe_arm(other) for other in others])}")
    tone: Tone = (
        "mixed" if "better" in directions else "bad" if "worse" in directions else "unclear"
    )
    return Headline(tone, f"{subject} {join_words(clauses, 'but')}", detail)


def _what_is_enough(evaluation: Evaluation, pairs: list[dict[str, Any]]) -> str:
    """Return which arm is enough, the cheapest first; empty where that is not known."""
    # An evaluation of an earlier version does not say which is cheapest.
    enough = evaluation.comparison.get("enough") or {}
    best, cheapest = enough.get("best"), enough.get("cheapest")
    size = format_size(enough.get("margin", 0.0), evaluation.metric(evaluation.primary))
    close = f"less than {size} worse than the best, {describe_arm(best)}" if best else ""
    if cheapest is None or cheapest == SIMPLE:
        rest = f", and it is {close}" if cheapest and best != SIMPLE else ""
        return _simple_is_enough(evaluation, pairs, cheapest == SIMPLE, rest)
    if cheapest == best:
        words = f" No cheaper arm is shown to be {close}."
    else:
        words = f" {describe_arm(cheapest, capital=True)} is the cheapest that is {close}"
        is_trained = cheapest in (FINETUNED, FINETUNED_CONSTRAINED)
        if evaluation.candidate["name"] == FINETUNED and not is_trained:
            words += ": finetuning is not needed for that"
        words += "."
    return words + _simple_is_enough(evaluation, pairs, False)


def _simple_is_enough(
    evaluation: Evaluation, pairs: list[dict[str, Any]], is_cheapest: bool, rest: str = ""
) -> str:
    """Return a sentence where the candidate does not beat the simple arm; empty otherwise.

    Args:
        is_cheapest: It is shown to be enough.
        rest: What that rests on.
    """
    kinds = evaluation.task_types()
    what = "a classifier" if kinds == {"classification"} else "the nearest training row's answer"
    against = {pair["other"]: pair for pair in pairs}.get(SIMPLE)
    if against is None and not is_cheapest:
        return ""
    kind = direction(evaluation, against, evaluation.primary) if against else "equal"
    if is_cheapest or (kind in ("worse", "equal") and "enough" not in evaluation.comparison):
        return f" The simple arm needs no model: {what} is enough{rest}."
    if kind != "better":
        return f" The simple arm needs no model: {what} may be enough."
    return ""


def direction(evaluation: Evaluation, pair: dict[str, Any], name: str) -> Direction:
    """Return what the difference of two arms in a metric allows to say.

    `better` and `worse` need both the interval and the printed test (Holm's p-value where several
    are read together). `equal` means that all of the interval is below the margin, `not_worse` that
    a loss of `evaluation.margin` is excluded; `unclear` that there are too few rows to tell. What
    is said must hold if every missing answer spoke against it. A loss within a margin that was set
    does not matter: it is not `worse`.
    """
    difference, metric = pair["differences"][name], evaluation.metric(name)
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return "unclear"
    worst = pair.get("worst_case") if name == evaluation.primary else None
    if metric.better == "lower":
        low, high = -high, -low
    # An evaluation of an earlier version has no adjusted p-values.
    p_value = difference.get("p_adjusted", difference.get("p_value", 0))
    is_shown = p_value is None or p_value <= _level(evaluation)
    if is_shown and low > 0 and (worst is None or worst["low"] > 0):
        return "better"
    margin, is_set = margin_of(evaluation), evaluation.comparison.get("margin") is not None
    is_harmless = low > -margin and (worst is None or worst["low"] > -margin)
    is_useless = high < margin and (worst is None or worst["high"] < margin)
    if is_set and is_harmless:
        return "equal" if is_useless else "not_worse"
    if is_shown and high < 0 and (worst is None or worst["high"] < 0):
        return "worse"
    is_score = metric.kind != "number"
    return "equal" if is_score and not is_set and is_harmless and is_useless else "unclear"


def _lacks_answers(evaluation: Evaluation, pair: dict[str, Any]) -> bool:
    """Return whether the answers that came would tell, if the missing ones were like them."""
    come = pair | {"worst_case": None}
    return "worst_case" in pair and direction(evaluation, come, evaluation.primary) != "unclear"


def _lacks_trainings(pair: dict[str, Any], primary: str) -> bool:
    """Return whether the seeds differ so much that no number of rows would tell."""
    difference = pair["differences"][primary]
    # Of macro-F1 nobody says how many rows it takes.
    return bool(difference.get("seed_share")) and difference.get("rows_needed", 0) is None


def _level(evaluation: Evaluation) -> float:
    """Return below which p-value a difference counts as shown."""
    return 1 - float(evaluation.metrics["confidence"])


def margin_of(evaluation: Evaluation) -> float:
    """Return the difference that does not matter."""
    margin = evaluation.comparison.get("margin")
    return NO_DIFFERENCE if margin is None else float(margin)


def _all_alike(kind: Direction, margin: float, metric: Metric) -> str:
    size = format_size(margin, metric)
    return {
        "better": "helped",
        "worse": "made it worse",
        "equal": f"made no difference of {size} or more",
        "not_worse": f"did no harm of {size} or more",
        "unclear": "made no clear difference: too few test rows to tell",
    }[kind]


def _clauses(margin: float, metric: Metric) -> dict[Direction, str]:
    size = format_size(margin, metric)
    return {
        "better": "is better than",
        "not_worse": f"is less than {size} worse than",
        "equal": f"is within {size} of",
        "unclear": "is not clearly different from",
        "worse": "is worse than",
    }


def _what_it_can_show(
    evaluation: Evaluation, pairs: list[dict[str, Any]], directions: list[Direction]
) -> str:
    """Return what the test can show, where it was too small for a difference; else nothing."""
    unclear = [
        pair
        for pair, kind in zip(pairs, directions, strict=True)
        if kind == "unclear" and not _lacks_answers(evaluation, pair)
    ]
    if not unclear:
        return ""
    difference = unclear[0]["differences"][evaluation.primary]
    metric = evaluation.metric(evaluation.primary)
    # An evaluation of an earlier version does not say.
    if difference.get("detectable") is None:
        return ""
    rows = describe_rows(evaluation, difference)
    if metric.kind != "number" and difference["detectable"] > 1:
        words = f" {rows} are too few for any difference to show in four of five cases"
    else:
        words = (
            f" {rows} show a difference of {format_size(difference['detectable'], metric)} in four "
            "of five cases"
        )
    if difference.get("seed_share"):
        words += f"; the seeds make up {difference['seed_share']:.0%} of the difference's variance"
        if _lacks_trainings(unclear[0], evaluation.primary):
            words += ": more trainings would tell, more rows alone would not"
    if needed := difference.get("rows_needed"):
        size = format_size(abs(difference["value"]), metric)
        if needed > difference["n"]:
            words += f"; one of {size} takes about {_rounded(needed):,} rows"
    return words + "."


def _worst_case_in_words(evaluation: Evaluation) -> str:
    """Return what missing answers could change; nothing where none is missing."""
    metric = evaluation.metric(evaluation.primary)
    parts = [
        f"{describe_arm(arm['name'])} between {format_value(ends['low'], metric)} and "
        f"{format_value(ends['high'], metric)}"
        for arm in evaluation.arms
        if (ends := arm.get("worst_case"))
    ]
    if not parts:
        return ""
    return f" With its missing answers all wrong or all right, {join_words(parts)}."


def describe_rows(evaluation: Evaluation, estimate: dict[str, Any]) -> str:
    """Return how many answers an estimate rests on: `112 answers in 24 modules`."""
    n, num_clusters = estimate["n"], estimate.get("num_clusters")
    answers = "1 answer" if n == 1 else f"{n:,} answers"
    if num_clusters is None or num_clusters == n:
        return answers
    by = evaluation.metrics.get("cluster_by") or "group"
    # A plain word can be counted, another name of a column not.
    is_plain = by.isascii() and by.isalpha() and by.islower() and not by.endswith("s")
    if num_clusters == 1:
        return f"{answers} in one {by}" if is_plain else f"{answers} with one `{by}`"
    many = (by[:-1] + "ies" if by.endswith("y") else by + "s") if is_plain else f"values of `{by}`"
    return f"{answers} in {num_clusters:,} {many}"


def _rounded(count: int) -> int:
    """Return a count with two significant digits."""
    return int(float(f"{count:.2g}"))


def _difference_in_words(evaluation: Evaluation, pair: dict[str, Any]) -> str:
    difference = pair["differences"][evaluation.primary]
    metric = evaluation.metric(evaluation.primary)
    words = format_difference(difference["value"], metric)
    if interval := format_interval(difference, metric):
        words += f" ({evaluation.metrics['confidence']:.0%} interval {interval}"
        p_value = difference.get("p_adjusted", difference.get("p_value"))
        is_beyond_zero = not difference["low"] <= 0 <= difference["high"]
        if p_value is not None and is_beyond_zero and p_value > _level(evaluation):
            words += f", but p = {format_p_value(p_value)}"
        words += ")"
    elif difference["n"] and difference.get("num_clusters") == 1:
        words += f" (no interval: {describe_rows(evaluation, difference)})"
    return f"{words} over {describe_arm(pair['other'])}"


def describe_arm(name: str, capital: bool = False) -> str:
    """Return an arm's name in words."""
    words = _ARM_WORDS.get(name, f"`{name}`")
    return words[0].upper() + words[1:] if capital else words
