"""What a judge says, in sentences: never without what people say."""

from __future__ import annotations

from typing import Any, NamedTuple

from tuneloop.evals.reporting.formatting import format_estimate
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.text import counted

_SHARE = Metric("share")
_KAPPA = Metric("kappa", kind="number")
# With so many votes the ends of an interval are about ten points away.
_USEFUL_VOTES = 100


class JudgedPairText(NamedTuple):
    """What is said of two arms: the first sentence is the result, or what is missing for one."""

    title: str
    result: str
    notes: list[str]


def show_judge(judge: dict[str, Any]) -> list[JudgedPairText]:
    """Return what judge and people say of each pair of arms; none without a judge."""
    return [describe_judged_pair(pair, judge) for pair in judge.get("pairs", [])]


def describe_judged_pair(pair: dict[str, Any], judge: dict[str, Any]) -> JudgedPairText:
    """Return a pair of `comparison.json`'s `judge` in sentences."""
    arm, other = pair["arm"], pair["other"]
    return JudgedPairText(f"{arm} against {other}", _result(pair), _notes(pair, judge))


def describe_judge(judge: dict[str, Any]) -> str:
    """Return who judged what, and what of it could not be used."""
    how = {
        "pairwise": "was shown two answers in both orders; where the order decides, it is a tie",
        "rubric": "rated each answer from 1 to 5; the higher rating wins",
    }[judge["kind"]]
    text = (
        f"`{judge['model']}` {how}. Equal answers were not shown. What is good, it was told: "
        f"“{judge['criteria']}”"
    )
    unread, missing = judge["num_unparseable"], judge["num_missing"]
    if unread:
        text += (
            f" {unread} of its {judge['num_judgements']:,} answers have no verdict and count as a "
            "tie."
        )
    if missing:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in judge["reasons"].items())
        text += f" {missing} did not come ({reasons})."
    if judge["cost"] is not None:
        text += f" Its judgements cost {judge['cost']:.3g}."
    return text + " Prompts and answers are in `judgements.parquet`."


def _result(pair: dict[str, Any]) -> str:
    if not pair["num_pairs"]:
        return "The answers to judge are the same in both: there is nothing to judge."
    if pair["corrected"] is None:
        least, voted = pair["least_votes"], pair["num_voted"]
        there = f"people have voted on {voted}" if voted else "nobody has voted on these answers"
        return (
            f"No win rate: {there}, and a judge alone is not quoted, since nobody knows how far it "
            f"is off. Vote on at least {least} of the {pair['num_pairs']:,} pairs in the dashboard "
            f"(`Blind votes`; about {_USEFUL_VOTES} bring the interval to ten points each way), "
            "then run the same command again: nothing is asked or paid twice."
        )
    rate = pair["corrected"]
    people = pair["num_reviewers"]
    return (
        f"`{pair['arm']}` wins {format_estimate(rate, _SHARE)} of the {pair['num_pairs']:,} pairs "
        f"with different answers, ties counting half: {pair['num_voted']} pairs judged by "
        f"{people} {'person' if people == 1 else 'people'}, and the judge on all, corrected by "
        f"where it differs from them ({rate['method']}; {_clusters(rate)})."
    )


def _clusters(rate: dict[str, Any]) -> str:
    n, clusters = rate["n"], rate["num_clusters"]
    votes = counted(n, "vote")
    return votes if n == clusters else f"{votes} in {counted(clusters, 'cluster')}"


def _notes(pair: dict[str, Any], judge: dict[str, Any]) -> list[str]:
    notes = []
    decided = pair["longer_wins"]
    if pair["corrected"] is not None:
        gain, bias = pair["gain"], pair["bias"]
        worth = (
            ""
            if gain is None
            else f" The judge is worth {max(0.0, gain - 1):.0%} more votes (weight "
            f"{pair['weight']:.2f})."
        )
        notes.append(
            f"People's votes alone: {format_estimate(pair['votes_alone'], _SHARE)}.{worth}"
        )
        side = pair["arm"] if bias["value"] >= 0 else pair["other"]
        ends = sorted(abs(bias[end]) for end in ("low", "high")) if bias["low"] is not None else []
        is_shown = bias["low"] is not None and not bias["low"] <= 0 <= bias["high"]
        interval = (
            f" ({100 * ends[0]:.0f} to {100 * ends[1]:.0f})"
            if is_shown
            else ", which may be chance"
        )
        notes.append(
            f"On these pairs the judge gives `{side}` {100 * abs(bias['value']):.0f} points more "
            f"than people do{interval}; its own rate over what it judged is "
            f"{pair['judge_alone']:.1%}."
        )
        notes.append(
            f"Agreement with people beyond chance (Cohen's kappa): "
            f"{format_estimate(pair['kappa'], _KAPPA)}; of the rule `the longer answer wins`: "
            f"{format_estimate(pair['kappa_of_longer'], _KAPPA)}."
        )
    if decided["n"]:
        people_say = pair.get("people_longer_wins")
        beside = (
            f", for people in {format_estimate(people_say, _SHARE)}"
            if people_say and people_say["n"]
            else ""
        )
        notes.append(
            f"Length: the longer answer wins for the judge in {format_estimate(decided, _SHARE)} "
            f"of the {decided['n']} pairs with a winner and of different length{beside}."
        )
    if judge["kind"] == "pairwise" and pair["num_pairs"]:
        flips = pair["num_flips"]
        notes.append(
            f"Order: it decided {flips} of {pair['num_pairs']:,} pairs"
            + (f"; in {pair['num_first_wins']} of them the first answer won." if flips else ".")
        )
    if pair["num_unknown"]:
        notes.append(f"Of {pair['num_unknown']} pairs there is no judgement: they count as a tie.")
    if judge.get("is_arm") in (pair["arm"], pair["other"]):
        notes.append(
            f"The judge is `{judge['is_arm']}` itself: models tend to prefer their own answers. "
            + (
                "The points above are how far it does here."
                if pair["corrected"] is not None
                else "How far it does here only votes can tell."
            )
        )
    return notes
