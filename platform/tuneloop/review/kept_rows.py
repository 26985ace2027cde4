"""Questions that somebody asked in the playground, kept with their right answers as test rows."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tuneloop.errors import ArtifactError


@dataclass(frozen=True)
class KeptRow:
    """A row of format `question_answer`, with who kept it.

    Args:
        question: What was asked, without the task's instruction.
        answer: The right answer.
        reviewer: Who says so.
        created_at: ISO 8601, UTC.
    """

    question: str
    answer: str
    reviewer: str
    created_at: str = ""


def kept_rows_file(workspace: str | Path, task: str) -> Path:
    """Return the file for the test rows of a task, in a local workspace."""
    name = re.sub(r"[^\w.-]+", "-", task).strip("-.") or "rows"
    folder = Path(str(workspace).removeprefix("file://")).expanduser() / "review" / "test-rows"
    return folder / f"{name}.jsonl"


def keep_row(file: Path, row: KeptRow) -> bool:
    """Append a row; it is on disk when this returns.

    Returns:
        Whether it is new: the same question with the same answer is kept once.

    Raises:
        ArtifactError: The file has the question with another answer, has a line that is no row, or
            cannot be written.
    """
    try:
        for number, line in enumerate(_lines(file), 1):
            answer = _answer_to(row.question, line, f"{file}:{number}")
            if answer is not None and answer != row.answer:
                raise ArtifactError.of(
                    "this question has another right answer already",
                    where=f"{file}:{number}",
                    got=row.answer,
                    allowed=answer,
                    remedy="change or delete that line",
                )
            if answer is not None:
                return False
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        kept = asdict(row) | {"created_at": now}
        file.parent.mkdir(parents=True, exist_ok=True)
        # One write to the end: what others keep at the same time stands before or behind it.
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        with open(descriptor, "ab", buffering=0) as out:
            out.write(f"{json.dumps(kept, ensure_ascii=False)}\n".encode())
            os.fsync(descriptor)
    except OSError as error:
        raise ArtifactError.of(
            "the test row cannot be kept", where=str(file), got=str(error)
        ) from error
    return True


def _lines(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [line for line in text.split("\n") if line.strip()]


def _answer_to(question: str, line: str, where: str) -> str | None:
    """Return a line's answer if it has this question."""
    try:
        row = json.loads(line)
        asked, answer = row["question"], row["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError.of(
            "not a test row",
            where=where,
            got=line[:200],
            allowed="JSON with `question` and `answer`",
            remedy="mend or delete that line",
        ) from error
    return str(answer) if asked == question else None
