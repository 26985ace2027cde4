"""Human verdicts in SQLite, append-only: a changed mind is a newer row.

Pairs are blind: a hash of reviewer and example decides which arm is on the left. So the side does
not depend on the arms' names, differs between reviewers and survives a reload.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from tuneloop.errors import ArtifactError, Problem

T = TypeVar("T")
Choice = Literal["left", "right", "tie", "both_bad"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "both_bad")
# Nobody has read two answers sooner: a vote before that is a key that was held or pressed twice.
LEAST_READING_S = 1.0
_LOCK_TIMEOUT_S = 15.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    id INTEGER PRIMARY KEY,
    evaluation TEXT NOT NULL,
    example_id TEXT NOT NULL,
    arm_left TEXT NOT NULL,
    arm_right TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'both_bad')),
    reviewer TEXT NOT NULL,
    comment TEXT NOT NULL DEFAULT '',
    created_at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS verdicts_by_evaluation ON verdicts (evaluation, reviewer, example_id);
CREATE TRIGGER IF NOT EXISTS verdicts_are_not_edited BEFORE UPDATE ON verdicts
    BEGIN SELECT RAISE(ABORT, 'verdicts are append-only'); END;
CREATE TRIGGER IF NOT EXISTS verdicts_are_not_deleted BEFORE DELETE ON verdicts
    BEGIN SELECT RAISE(ABORT, 'verdicts are append-only'); END;
"""


@dataclass(frozen=True)
class Verdict:
    """One judgement of one pair of answers.

    Args:
        evaluation: Reference with version, `evaluations/demo@v1`.
        created_at: ISO 8601, UTC.
    """

    evaluation: str
    example_id: str
    arm_left: str
    arm_right: str
    choice: Choice
    reviewer: str
    comment: str = ""
    created_at: str = ""

    @property
    def winner(self) -> str | None:
        """The preferred arm; None for a tie or when both are bad."""
        return {"left": self.arm_left, "right": self.arm_right}.get(self.choice)


class Sides(NamedTuple):
    """The arm whose answer is on the left, and the one whose answer is on the right."""

    left: str
    right: str


class VerdictStore:
    """The verdicts of one workspace, in `<workspace>/review/verdicts.sqlite`.

    Args:
        workspace: A local directory. SQLite needs file locks, which object stores do not have.

    Raises:
        ArtifactError: The workspace is not local, or the file is not a verdict database.
    """

    def __init__(self, workspace: str | Path) -> None:
        if "://" in str(workspace).removeprefix("file://"):
            raise ArtifactError(
                Problem(
                    "verdicts cannot be stored in a remote workspace",
                    where="workspace",
                    got=str(workspace),
                    allowed="a local directory",
                    remedy="copy the evaluation to a local workspace to review it",
                )
            )
        self.path = Path(str(workspace).removeprefix("file://")) / "review" / "verdicts.sqlite"
        if self.path.exists():
            self._run(lambda connection: connection.executescript(_SCHEMA))

    def add(self, verdict: Verdict) -> None:
        """Append a verdict; it is on disk when this returns.

        Raises:
            ArtifactError: The database cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")

        def insert(connection: sqlite3.Connection) -> None:
            connection.executescript(_SCHEMA)
            connection.execute(
                "INSERT INTO verdicts (evaluation, example_id, arm_left, arm_right, choice,"
                " reviewer, comment, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    verdict.evaluation,
                    verdict.example_id,
                    verdict.arm_left,
                    verdict.arm_right,
                    verdict.choice,
                    verdict.reviewer,
                    verdict.comment,
                    now,
                ),
            )

        self._run(insert)

    def read(self, evaluation: str, reviewer: str | None = None) -> list[Verdict]:
        """Return the verdicts that count, oldest first: the newest of each reviewer and pair."""
        if not self.path.exists():
            return []
        query = (
            "SELECT evaluation, example_id, arm_left, arm_right, choice, reviewer, comment,"
            " created_at FROM verdicts WHERE evaluation = ?"
        )
        parameters = [evaluation]
        if reviewer is not None:
            query += " AND reviewer = ?"
            parameters.append(reviewer)
        rows = self._run(lambda c: c.execute(query + " ORDER BY id", parameters).fetchall())
        newest: dict[tuple[str, str, frozenset[str]], Verdict] = {}
        for row in rows:
            verdict = Verdict(*row)
            pair = frozenset((verdict.arm_left, verdict.arm_right))
            key = (verdict.reviewer, verdict.example_id, pair)
            newest.pop(key, None)
            newest[key] = verdict
        return list(newest.values())

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `work` does in one transaction."""
        try:
            # Reading creates no file; the first verdict does.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, _LOCK_TIMEOUT_S)) as connection, connection:
                return work(connection)
        except (sqlite3.DatabaseError, OSError) as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                remedy = "wait until the other program has finished, then try again"
            elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                remedy = (
                    f"keep a copy; `sqlite3 {self.path.name} .recover` may bring the votes back"
                )
            else:
                remedy = "free disk space or fix the permissions"
            raise ArtifactError(
                Problem(
                    "the verdicts cannot be opened",
                    where=str(self.path),
                    got=str(error),
                    remedy=remedy,
                )
            ) from error


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
