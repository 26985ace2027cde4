"""Human verdicts on pairs of answers, and which pair comes next.

Pairs are blind: a hash of reviewer and example decides which arm is on the left. So the side does
not depend on the arms' names, differs between reviewers and survives a reload.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tuneloop.records import Vote

Choice = Literal["left", "right", "tie", "both_bad"]
# Nobody has read two answers sooner: a vote before that is a key that was held or pressed twice.
LEAST_READING_S = 1.0


@dataclass(frozen=True)
class Verdict:
    """One judgement of one pair of answers.

    Args:
        evaluation: Reference with version, `evaluations/demo@v1`.
        created_at: ISO 8601, UTC.
        uid: Made with the verdict: storing it twice keeps it once.
    """

    evaluation: str
    example_id: str
    arm_left: str
    arm_right: str
    choice: Choice
    reviewer: str
    comment: str = ""
    created_at: str = ""
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def winner(self) -> str | None:
        """The preferred arm; None for a tie or when both are bad."""
        return {"left": self.arm_left, "right": self.arm_right}.get(self.choice)


class Sides(NamedTuple):
    """The arm whose answer is on the left, and the one whose answer is on the right."""

    left: str
    right: str


def as_vote(verdict: Verdict) -> Vote:
    """Return a verdict as a vote for the arm on the left; two bad answers are a tie."""
    return Vote(
        verdict.evaluation,
        verdict.example_id,
        verdict.arm_left,
        verdict.arm_right,
        {"left": 1.0, "right": 0.0}.get(verdict.choice, 0.5),
        verdict.reviewer,
    )


def verdict_rows(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """Return votes with their comments as a table, newest first."""
    return [
        {
            "example": verdict.example_id,
            "reviewer": verdict.reviewer,
            "better": verdict.winner or {"tie": "equally good"}.get(verdict.choice, "both bad"),
            "comment": verdict.comment,
            "left": verdict.arm_left,
            "right": verdict.arm_right,
            "time (UTC)": verdict.created_at[:19].replace("T", " "),
        }
        for verdict in reversed(verdicts)
    ]


def blind_order(example_id: str, reviewer: str, arms: Collection[str]) -> Sides:
    """Return the side of each of two arms, decided by a hash."""
    first, second = sorted(arms)
    digest = hashlib.sha256(f"{reviewer}\0{example_id}\0{first}\0{second}".encode()).digest()
    return Sides(first, second) if digest[0] % 2 == 0 else Sides(second, first)


def open_examples(
    example_ids: Sequence[str], verdicts: Sequence[Verdict], arms: Collection[str]
) -> list[str]:
    """Return the examples without a verdict on this pair of arms, in their order."""
    done = {v.example_id for v in verdicts if {v.arm_left, v.arm_right} == set(arms)}
    return [example_id for example_id in example_ids if example_id not in done]


def next_example(still_open: Sequence[str], skipped: Sequence[str]) -> str | None:
    """Return the example to ask for next; skipped ones come last, the earliest skipped first."""
    fresh = [example_id for example_id in still_open if example_id not in skipped]
    latest_first = dict.fromkeys(reversed(skipped))
    again = [example_id for example_id in reversed(latest_first) if example_id in still_open]
    return next(iter([*fresh, *again]), None)
