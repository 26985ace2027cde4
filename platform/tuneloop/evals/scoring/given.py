"""Answers made elsewhere, read from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuneloop.artifacts import sha256_file
from tuneloop.errors import DataError, Problem
from tuneloop.evals.scoring.questions import Question, normalised_prompt
from tuneloop.records import Arm, Endpoint
from tuneloop.text import counted


def given_arm(name: str, path: str) -> Arm:
    """Return the arm whose answers a JSONL file holds.

    Args:
        path: Each line has `completion`, and `example_id` or `prompt` (the question's last turn).

    Raises:
        DataError: The file cannot be read, or a line is none of these; said with file and line.
    """
    answers = _read(Path(path).expanduser())

    def answer(questions: Sequence[Question]) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for question in questions:
            keys = ("example_id", question.example_id), ("prompt", normalised_prompt(question))
            for key in keys:
                if key in answers:
                    found[question.example_id] = answers[key]
                    break
        return found

    digest = sha256_file(Path(path).expanduser())
    return Arm(name, Endpoint(path, ""), (), f"file sha256:{digest}", answer=answer)


def _read(path: Path) -> dict[tuple[str, str], str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.of("the answers cannot be read", where=str(path), got=str(error)) from error
    answers: dict[tuple[str, str], str] = {}
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        key = _key(record)
        if key is None:
            problem = "an answer needs `completion`, and `example_id` or `prompt`, all of them text"
        elif answers.get(key, record["completion"]) != record["completion"]:
            problem = "a question has two different answers"
        else:
            answers[key] = record["completion"]
            continue
        problems.append(Problem(problem, where=f"{path}:{number}", got=line[:80]))
    if not answers and not problems:
        problems.append(Problem("there are no answers in the file", where=str(path)))
    if len(problems) > 3:
        more = f"and {counted(len(problems) - 3, 'more such line')}"
        problems[3:] = [Problem(more, where=str(path))]
    DataError.refuse(problems)
    return answers


def _key(record: object) -> tuple[str, str] | None:
    """Return what a line answers, or None if it is no answer."""
    if not isinstance(record, dict) or not isinstance(record.get("completion"), str):
        return None
    for name in ("example_id", "prompt"):
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return name, " ".join(value.split()) if name == "prompt" else value
    return None
