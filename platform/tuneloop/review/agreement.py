"""How far verdicts can be trusted: between reviewers, and against automatic judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tuneloop.review.ratings import Preference
from tuneloop.review.verdicts import Verdict

# Landis and Koch 1977, Biometrics 33, table 2: the lower ends of their bands.
_BANDS = ((0.8, "almost perfect"), (0.6, "substantial"), (0.4, "moderate"), (0.2, "fair"))


@dataclass(frozen=True)
class ReviewerAgreement:
    """Two reviewers over the examples both have judged.

    Args:
        agreed_ratio: Share of equal verdicts.
        kappa: Agreement beyond chance, 1 at most; None where chance alone would agree always.
    """

    first: str
    second: str
    num_shared: int
    agreed_ratio: float
    kappa: float | None


@dataclass(frozen=True)
class JudgeAgreement:
    """An automatic judge against the verdicts with a winner.

    Args:
        agreed_ratio: Share of the verdicts whose winner the judge also prefers; an example
            without a preference counts as half.
        num_undecided: Examples without a preference.
    """

    judge: str
    num_verdicts: int
    agreed_ratio: float
    num_undecided: int


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return the agreement of two lists of labels beyond chance; None where it is undefined.

    Source: Cohen 1960, Educational and Psychological Measurement 20.
    """
    n = len(first)
    if not n:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    ours, theirs = Counter(first), Counter(second)
    chance = sum(ours[label] * theirs[label] for label in ours) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def reviewer_agreement(verdicts: Sequence[Verdict]) -> list[ReviewerAgreement]:
    """Return one row for each two reviewers who judged the same pair of answers.

    The preferred arm, a tie or two bad answers are compared; the side does not matter.
    """
    labels: dict[str, dict[tuple[str, frozenset[str]], str]] = {}
    for verdict in verdicts:
        pair = frozenset((verdict.arm_left, verdict.arm_right))
        labels.setdefault(verdict.reviewer, {})[verdict.example_id, pair] = (
            f"arm {verdict.winner}" if verdict.winner is not None else verdict.choice
        )
    rows = []
    for first, second in combinations(sorted(labels), 2):
        shared = list(labels[first].keys() & labels[second].keys())
        if not shared:
            continue
        ours, theirs = ([labels[name][key] for key in shared] for name in (first, second))
        agreed = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(shared)
        rows.append(
            ReviewerAgreement(first, second, len(shared), agreed, cohen_kappa(ours, theirs))
        )
    return rows


def judge_agreement(
    verdicts: Sequence[Verdict], judge: str, preferred: Mapping[str, str | None]
) -> JudgeAgreement | None:
    """Return how often a judge prefers the same answer as people; None without such verdicts.

    Args:
        preferred: By example the judge's winner, None where it has no preference. Examples that
            are missing were not judged.
    """
    decided = [v for v in verdicts if v.winner is not None and v.example_id in preferred]
    if not decided:
        return None
    undecided = sum(preferred[v.example_id] is None for v in decided)
    right = sum(preferred[v.example_id] == v.winner for v in decided)
    return JudgeAgreement(judge, len(decided), (right + undecided / 2) / len(decided), undecided)


def describe_kappa(kappa: float | None) -> str:
    """Return a kappa in the usual words."""
    if kappa is None:
        return "only one kind of vote: cannot be told from chance"
    for low, words in _BANDS:
        if kappa > low:
            return words
    return "slight" if kappa >= 0 else "worse than chance"


def preferences(verdicts: Sequence[Verdict]) -> list[Preference]:
    """Return verdicts as comparisons for a rating.

    A tie and two bad answers count as half a win for each.
    """
    scores = {"left": 1.0, "right": 0.0, "tie": 0.5, "both_bad": 0.5}
    return [Preference(v.arm_left, v.arm_right, scores[v.choice], v.example_id) for v in verdicts]


def reviewer_rows(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return the agreement of reviewers as a table."""
    return [
        {
            "reviewers": f"{row.first} and {row.second}",
            "shared examples": row.num_shared,
            "same verdict": f"{row.agreed_ratio:.0%}",
            "Cohen's kappa": "–" if row.kappa is None else f"{row.kappa:.2f}".replace("-", "−"),
            "in words": describe_kappa(row.kappa),
        }
        for row in reviewer_agreement(verdicts)
    ]


def judge_rows(
    verdicts: Sequence[Verdict],
    arms: Collection[str],
    judges: Mapping[str, Mapping[str, str | None]],
) -> list[dict[str, Any]]:
    """Return how automatic judges agree with the votes on two arms, as a table.

    Args:
        judges: By name, what each prefers by example; see `judge_agreement`.
    """
    chosen = [v for v in verdicts if {v.arm_left, v.arm_right} == set(arms)]
    rows = (judge_agreement(chosen, name, preferred) for name, preferred in judges.items())
    return [
        {
            "judge": row.judge,
            "votes with a winner": row.num_verdicts,
            "agrees": f"{row.agreed_ratio:.0%}",
            "no preference": row.num_undecided,
        }
        for row in rows
        if row is not None
    ]
