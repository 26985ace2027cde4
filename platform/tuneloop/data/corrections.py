"""What a mark may do with a row, and what it makes of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tuneloop.config import OneTaskConfig, TaskConfig
from tuneloop.data.sources.formats import check_answer
from tuneloop.data.sources.row_errors import AnswerError
from tuneloop.marks import Fix
from tuneloop.records import Message

# The column of a test row's further right answers.
ACCEPTED_COLUMN = "accepted_answers"
NOT_THERE = "no row of the sources has this id any more: the row was changed or taken out"


def corrected(messages: Sequence[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    """Return a conversation with another last answer; what was thought before it is left out."""
    last = replace(Message.of(messages[-1]), content=answer, reasoning_content="")
    return [*messages[:-1], last.as_dict()]


def refusal_by_task(task: TaskConfig, fix: Fix) -> str:
    """Return why a task does not allow what marks ask for, whatever their row says; empty if so.

    Of a mixture only the row knows which task is its own: `prepare` tells it.
    """
    if task.tasks or task.type == "language_modeling":
        return ""
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    return refusal(fix, turns, task)


def refusal(fix: Fix, messages: Sequence[dict[str, Any]], task: OneTaskConfig) -> str:
    """Return why a row cannot be changed as marks ask; empty if it can."""
    if fix.action == "drop":
        return ""
    if not messages:
        return "a row of plain text has no answer"
    if Message.of(messages[-1]).tool_calls:
        return "the answer is a tool call: correct it in the file"
    for answer in fix.answers:
        try:
            check_answer(answer, task)
        except AnswerError as error:
            details = f" (allowed: {error.allowed})" if error.allowed else ""
            return f"the given answer breaks the task: {error.what}: {error.got}{details}"
    return ""
