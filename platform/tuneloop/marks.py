"""What people say about rows: marks, and what becomes of the marks of several people.

A mark names a row by its id, which is made of the row's content as the files have it. It stays the
same when a mark changes the row's answer, so one mark holds for every version of the dataset.
"""

from __future__ import annotations

import json
import unicodedata
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tuneloop.errors import DataError, Problem

MarkKind = Literal["bad_reference", "bad_row", "fine", "accept", "more_like_this", "note"]
MARK_KINDS: tuple[MarkKind, ...] = get_args(MarkKind)
MARK_LABELS: dict[MarkKind, str] = {
    "bad_reference": "the answer is wrong",
    "bad_row": "drop the row",
    "fine": "nothing is wrong",
    "accept": "this answer is right too",
    "more_like_this": "needs more like this",
    "note": "note",
}
# What a preparation did with a row, by the action of its fix.
FIX_LABELS = {"correct": "corrected", "drop": "dropped", "accept": "accepts more answers"}
# Ends the name of a dataset of rows of `evaluation.sources`.
SCORED_SUFFIX = "-scored"
# Of these a reviewer's newest mark on a row counts.
_VERDICTS = ("bad_reference", "bad_row", "fine")


@dataclass(frozen=True)
class Mark:
    """What one person says about one row.

    Args:
        row_id: Of the row. Copies of a row, `ID-2` and so on, are marked with it.
        dataset: The dataset in which it was seen, with version: `datasets/faq@v1`.
        reviewer: Who says so.
        answer: With `bad_reference` the corrected answer, with `accept` one more right answer.
        note: In the reviewer's own words.
        evaluation: Where it was seen; empty for a page of a dataset.
        created_at: ISO 8601, UTC.
        uid: Made with the mark: storing it twice keeps it once.
    """

    kind: MarkKind
    row_id: str
    dataset: str
    reviewer: str
    answer: str = ""
    note: str = ""
    evaluation: str = ""
    created_at: str = ""
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def content_id(self) -> str:
        """The id of the row's content, without the number of a copy."""
        return self.row_id.partition("-")[0]

    @property
    def dataset_name(self) -> str:
        """The name of the dataset: `faq`."""
        return self.dataset.partition("/")[2].partition("@")[0]

    @property
    def applied_by(self) -> str:
        """The command that reads the row again, and applies the mark: `prepare` or `evaluate`."""
        return "evaluate" if self.dataset_name.endswith(SCORED_SUFFIX) else "prepare"


class Fix(NamedTuple):
    """What marks ask to be done with a row.

    Args:
        action: `correct` its answer, `drop` it, or `accept` more answers as right.
        answers: The corrected answer, or those that are right too; none of a row to drop.
        marks: Who asks for it; at least one.
    """

    action: Literal["correct", "drop", "accept"]
    content_id: str
    answers: tuple[str, ...]
    marks: tuple[Mark, ...]

    @property
    def reviewers(self) -> str:
        """Who asks for it, as text."""
        return ", ".join(dict.fromkeys(mark.reviewer for mark in self.marks))

    def identity(self) -> dict[str, object]:
        """Return what of the fix changes a dataset: not who asks for it."""
        return {"action": self.action, "row": self.content_id, "answers": list(self.answers)}


class Decided(NamedTuple):
    """What marks ask for, and why others ask for nothing.

    Args:
        fixes: In the order of the rows' ids.
        unused: By `uid` of a mark, why nothing is done about it.
    """

    fixes: list[Fix]
    unused: dict[str, str]


def decide(marks: Iterable[Mark]) -> Decided:
    """Return what is to be done with the rows of one dataset.

    A reviewer's newest verdict on a row counts. Verdicts of several reviewers that contradict one
    another change nothing until one of them marks the row again.

    Args:
        marks: Oldest first.
    """
    fixes: list[Fix] = []
    unused: dict[str, str] = {}
    by_row: dict[str, list[Mark]] = {}
    for mark in marks:
        by_row.setdefault(mark.content_id, []).append(mark)
    for row, own in sorted(by_row.items()):
        verdict = _verdict(own, unused)
        if verdict is not None:
            fixes.append(verdict)
        is_dropped = verdict is not None and verdict.action == "drop"
        accepted = _accepted(own, is_dropped, unused)
        if accepted:
            answers = tuple(sorted(accepted))
            fixes.append(Fix("accept", row, answers, tuple(accepted[a] for a in answers)))
        unused |= {
            mark.uid: "kept for people to read; it changes no row"
            for mark in own
            if mark.kind in ("more_like_this", "note")
        }
    return Decided(fixes, unused)


def _verdict(own: Sequence[Mark], unused: dict[str, str]) -> Fix | None:
    """Return what the verdicts on one row come to; note why others come to nothing."""
    newest: dict[str, Mark] = {}
    for mark in own:
        if mark.kind in _VERDICTS:
            name = plain_name(mark.reviewer)
            if name in newest:
                unused[newest[name].uid] = f"{mark.reviewer} has marked the row again"
            newest[name] = mark
    asked: dict[tuple[str, str], list[Mark]] = {}
    for mark in newest.values():
        if mark.kind == "bad_reference" and not mark.answer.strip():
            unused[mark.uid] = "the right answer is missing: mark the row again and give it"
        else:
            answer = mark.answer.strip() if mark.kind == "bad_reference" else ""
            asked.setdefault((mark.kind, answer), []).append(mark)
    if len(asked) > 1:
        for key, marks in asked.items():
            others = [m for other, found in asked.items() if other != key for m in found]
            says = "; ".join(f"{m.reviewer}: {MARK_LABELS[m.kind]}" for m in others)
            for mark in marks:
                unused[mark.uid] = f"contradicted by {says}. One of you has to mark the row again"
        return None
    for (kind, answer), marks in asked.items():
        if kind == "bad_row":
            return Fix("drop", marks[0].content_id, (), tuple(marks))
        if kind == "bad_reference":
            return Fix("correct", marks[0].content_id, (answer,), tuple(marks))
        unused |= {mark.uid: "the row stays as it is" for mark in marks}
    return None


def _accepted(own: Sequence[Mark], is_dropped: bool, unused: dict[str, str]) -> dict[str, Mark]:
    """Return, by answer, the first mark that accepts it; note why others come to nothing."""
    accepted: dict[str, Mark] = {}
    fine = ((index, mark) for index, mark in enumerate(own) if mark.kind == "fine")
    taken_back = {plain_name(mark.reviewer): index for index, mark in fine}
    for index, mark in enumerate(own):
        answer = mark.answer.strip()
        if mark.kind != "accept":
            continue
        if not answer:
            unused[mark.uid] = "without an answer there is nothing to accept"
        elif is_dropped:
            unused[mark.uid] = "the row is dropped"
        elif index < taken_back.get(plain_name(mark.reviewer), -1):
            unused[mark.uid] = f"{mark.reviewer} has marked the row again"
        elif answer in accepted:
            unused[mark.uid] = f"{accepted[answer].reviewer} has accepted the same answer"
        else:
            accepted[answer] = mark
    return accepted


def plain_name(reviewer: str) -> str:
    """Return a name that is the same however a person writes it: case, spaces, Unicode forms."""
    return unicodedata.normalize("NFKC", " ".join(reviewer.split())).casefold()


def write_marks(marks: Iterable[Mark], path: Path) -> None:
    """Write marks as JSON Lines, one object for each, which `read_marks` reads."""
    lines = (json.dumps(asdict(mark), ensure_ascii=False) + "\n" for mark in marks)
    try:
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise DataError.of(
            "the marks cannot be written",
            where=str(path),
            got=error.strerror or str(error),
            remedy="give another path",
        ) from error


def read_marks(path: Path) -> list[Mark]:
    """Return the marks of a JSON Lines file, in its order.

    A line without `uid` gets one made of its content: it is the same whenever it is read.

    Raises:
        DataError: The file cannot be read, or lines of it are no marks; all of them are told.
    """
    try:
        # Other ends of lines may stand within a text.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.of(
            "the file of marks cannot be read",
            where=f"data.fixes: {path}",
            got=str(error),
            remedy="name a file that `tuneloop fixes CONFIG --output FILE` wrote, or true",
        ) from error
    marks: list[Mark] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            marks.append(_mark_of(json.loads(line), line))
        except (ValueError, TypeError) as error:
            problems.append(
                Problem(
                    "a line is no mark",
                    where=f"{path}:{number}",
                    got=str(error),
                    allowed="an object with the texts kind, row_id, dataset, reviewer and, where "
                    "the kind needs it, answer",
                    remedy="correct or remove the line",
                )
            )
    DataError.refuse(problems)
    return marks


def _mark_of(record: object, line: str) -> Mark:
    """Return the mark that a line holds; raise ValueError for what it lacks."""
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} in place of an object")
    names = [item.name for item in fields(Mark)]
    if unknown := [name for name in record if name not in names]:
        raise ValueError(f"unknown: {', '.join(unknown)}")
    needed = ("kind", "row_id", "dataset", "reviewer")
    if lost := [name for name in needed if not record.get(name)]:
        raise ValueError(f"missing: {', '.join(lost)}")
    if wrong := [name for name, value in record.items() if not isinstance(value, str)]:
        raise ValueError(f"not text: {', '.join(wrong)}")
    if record["kind"] not in MARK_KINDS:
        raise ValueError(f"kind {record['kind']}; allowed: {', '.join(MARK_KINDS)}")
    made = uuid.uuid5(uuid.NAMESPACE_OID, line.strip()).hex
    return Mark(**{"uid": made, **record})
