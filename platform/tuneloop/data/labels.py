"""The labels of a classification: read from the data if not given, and told in the prompt."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

from tuneloop.config import OneTaskConfig, TaskConfig, TuneloopConfig
from tuneloop.data.sources.bad_rows import BadRow, bad_row_problems, refuse_mismatched_formats
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
from tuneloop.errors import DataError, Problem

# The labels may take this share of a row at most. A token of a label has 3 characters or more.
_SHARE_OF_ROW = 0.25
_CHARACTERS_PER_TOKEN = 3.0
_MOST_LABELS = 1_000
_FEW_ROWS = 20
_SHOWN = 5


@dataclass(frozen=True)
class Labelled:
    """A configuration whose labels are known.

    Args:
        config: With `labels` in every classification, and an `instruction` that names them.
        notices: What was read from the data, and which labels the prompt has no room for.
    """

    config: TuneloopConfig
    notices: list[Problem] = field(default_factory=list)


def resolve_labels(config: TuneloopConfig) -> Labelled:
    """Return the configuration with its labels, read from the data where they are left out.

    A model is told the labels by its instruction, which training, serving and scoring share, if
    they take a quarter of `data.max_seq_len` or less and the instruction does not name them yet.
    Doing it twice changes nothing.

    Raises:
        DataError: The answers of the rows are no labels: fewer than two, or hardly any twice.
    """
    tasks = {name: config.task.of(name) for name in config.task.tasks or ("",)}
    unknown = [n for n, t in tasks.items() if t.type == "classification" and not t.labels]
    counts = _read_labels(config) if unknown else {}
    notices: list[Problem] = []
    resolved: dict[str, OneTaskConfig] = {}
    for name, task in tasks.items():
        key = f"task.tasks.{name}" if name else "task"
        if name in unknown:
            found = counts.get(name, Counter())
            _refuse_no_labels(found, f"{key}.labels")
            told = ", ".join(f"{label} ({found[label]:,})" for label in sorted(found))
            notices.append(Problem(f"{key}.labels are read from the data", got=told))
            notices += _nearly_equal(sorted(found), f"{key}.labels")
            task = task.model_copy(update={"labels": sorted(found)})
        if task.type == "classification" and not _names_all(task.instruction, task.labels):
            sentence = _sentence(task.labels)
            room = int(_SHARE_OF_ROW * config.data.max_seq_len * _CHARACTERS_PER_TOKEN)
            if len(sentence) <= room:
                instruction = f"{task.instruction.strip()}\n\n{sentence}".strip()
                task = task.model_copy(update={"instruction": instruction})
            else:
                needed = round(len(sentence) / _CHARACTERS_PER_TOKEN / _SHARE_OF_ROW)
                notices.append(
                    Problem(
                        "the prompt does not name the labels: they would take too much of it",
                        where=f"{key}.labels",
                        got=f"{len(task.labels)} labels, {len(sentence):,} characters",
                        remedy=f"data.max_seq_len of {needed:,} or more has room for them",
                    )
                )
        resolved[name] = task
    if all(resolved[name] is tasks[name] for name in tasks):
        return Labelled(config, notices)
    own = resolved.get("")
    task = (
        own if isinstance(own, TaskConfig) else config.task.model_copy(update={"tasks": resolved})
    )
    return Labelled(config.model_copy(update={"task": task}), notices)


def _read_labels(config: TuneloopConfig) -> dict[str, Counter[str]]:
    """Return how often each answer occurs, by task."""
    refuse_mismatched_formats(config)
    # As free text any answer may stand there.
    free = {"type": "generation", "labels": [], "fields": []}
    tasks = {name: one.model_copy(update=free) for name, one in config.task.tasks.items()}
    update = {"tasks": tasks} if tasks else free
    reading = config.model_copy(update={"task": config.task.model_copy(update=update)})
    counts: dict[str, Counter[str]] = {}
    bad: list[BadRow] = []
    for position, file in enumerate(find_files(config.data.sources)):
        for row in read_source(file, position, reading):
            if row["rejection"] is not None:
                bad.append(BadRow(row["source"], row["rejection"]))
            elif row["messages"]:
                counter = counts.setdefault(row["task"], Counter())
                counter[row["messages"][-1]["content"]] += 1
                if (
                    len(counter) > _MOST_LABELS
                    and config.task.of(row["task"]).type == "classification"
                ):
                    return counts
    if not counts and bad:
        raise DataError(*bad_row_problems(bad, len(bad), config.data))
    return counts


def _refuse_no_labels(found: Counter[str], key: str) -> None:
    num_rows = found.total()
    if len(found) < 2:
        got = f"one answer: {next(iter(found))!r:.80}" if found else "no row that can be read"
    elif len(found) > _MOST_LABELS:
        got = f"more than {_MOST_LABELS:,} different answers"
    elif num_rows >= _FEW_ROWS and 2 * len(found) > num_rows:
        got = f"{len(found):,} different answers in {num_rows:,} rows"
    else:
        return
    raise DataError.of(
        "the answers of the rows are no labels",
        where=key,
        got=got,
        allowed=f"2 to {_MOST_LABELS:,} answers, each of several rows",
        remedy="give `labels`; or, if answers are free text, `task.type: generation`",
    )


def _nearly_equal(labels: list[str], key: str) -> list[Problem]:
    """Return the notice of labels that are one to people, and two to a score."""
    spellings: dict[str, list[str]] = {}
    for label in labels:
        plain = unicodedata.normalize("NFKC", label).casefold()
        spellings.setdefault(" ".join(re.split(r"[\s_]+", plain)), []).append(label)
    alike = [repr(own)[1:-1] for own in spellings.values() if len(own) > 1]
    if not alike:
        return []
    return [
        Problem(
            "labels differ only in case, spaces or underscores",
            where=key,
            got="; ".join(alike[:_SHOWN]),
            remedy="write each label in one way in all rows, if they mean the same",
        )
    ]


def _sentence(labels: list[str]) -> str:
    if any("," in label for label in labels):
        return "\n".join(["Answer with one of these labels only:", *labels])
    return f"Answer with one of these labels only: {', '.join(labels)}"


def _names_all(instruction: str, labels: list[str]) -> bool:
    """Return whether the instruction has every label as a word or words of its own."""
    text = instruction.casefold()
    return all(
        re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", text) is not None
        for label in labels
    )
