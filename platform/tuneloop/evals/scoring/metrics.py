"""What is measured for each kind of task, and how one answer is scored.

A score is a number for one answer; None where the metric does not apply to that row. Nothing
here looks at more than one row, except `macro_f1`, which is only defined over many.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tuneloop.config import OneTaskConfig, TaskConfig, TaskType
from tuneloop.errors import DataError, Problem

Better = Literal["higher", "lower", "neither"]
FIELD_PREFIX = "field_"
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Metric:
    """What a metric means.

    Args:
        label: What it says, in a few words.
        better: Which direction is an improvement.
        kind: `binary` is 0 or 1 for an answer, `ratio` lies in [0, 1] (both are shown in per
            cent), `number` is shown as it is.
    """

    label: str
    better: Better = "higher"
    kind: Literal["binary", "ratio", "number"] = "ratio"


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of a kind of task; the primary one decides the comparison."""

    primary: str
    metrics: dict[str, Metric]


TASK_METRICS: dict[TaskType, TaskMetrics] = {
    "extraction": TaskMetrics(
        "exact_match",
        {
            "exact_match": Metric("all fields right", kind="binary"),
            "valid_json": Metric("valid JSON", kind="binary"),
        },
    ),
    "classification": TaskMetrics("accuracy", {"accuracy": Metric("right label", kind="binary")}),
    "generation": TaskMetrics(
        "token_f1",
        {
            "token_f1": Metric("words in common with the reference (F1)"),
            "rouge_l": Metric("longest common word sequence (ROUGE-L)"),
            "exact_match": Metric("same words as the reference", kind="binary"),
            "length_ratio": Metric("length over the reference's", better="neither", kind="number"),
        },
    ),
    "language_modeling": TaskMetrics(
        "bits_per_byte",
        {"bits_per_byte": Metric("bits per byte of text", better="lower", kind="number")},
    ),
}
MACRO_F1 = Metric("mean F1 over the labels")
MIXTURE_SCORE = "score"


class Scorer:
    """Scores answers of one task, or of the tasks of a mixture.

    In a mixture each answer has the primary metric of its own task as its `score`; the metrics of
    a task are called `TASK/METRIC` and apply to its rows only.

    Args:
        task: The task, as configured.
        references: The reference of every test row by its id; checked at once.
        task_of: In a mixture, the task of every test row by its id.

    Raises:
        DataError: References that cannot be scored against, for example one that is not JSON.
    """

    def __init__(
        self,
        task: OneTaskConfig,
        references: Mapping[str, str],
        task_of: Mapping[str, str] | None = None,
    ) -> None:
        self.task = task
        self.fields = list(task.fields)
        self.parts: dict[str, Scorer] = {}
        if isinstance(task, TaskConfig) and task.tasks:
            self._mix(task, references, task_of or {})
            return
        definition = TASK_METRICS[task.type]
        self.primary = definition.primary
        self.metrics = dict(definition.metrics)
        if task.type == "extraction":
            parsed = self._parse_references(references)
            found = [name for value in parsed for name in value]
            self.fields = self.fields or list(dict.fromkeys(found))
            self.metrics |= {
                FIELD_PREFIX + name: Metric(f"`{name}` right", kind="binary")
                for name in self.fields
            }
        elif task.type == "classification":
            self._check_labels(references)

    def of(self, task: str) -> Scorer:
        """Return the scorer of one of a mixture's tasks; this one where there is no mixture."""
        return self.parts[task] if self.parts else self

    def _mix(
        self, task: TaskConfig, references: Mapping[str, str], task_of: Mapping[str, str]
    ) -> None:
        for name, one in task.tasks.items():
            own = {key: text for key, text in references.items() if task_of[key] == name}
            self.parts[name] = Scorer(one, own)
        primaries = [part.metrics[part.primary] for part in self.parts.values()]
        is_binary = all(metric.kind == "binary" for metric in primaries)
        self.primary = MIXTURE_SCORE
        self.metrics = {
            MIXTURE_SCORE: Metric(
                "each answer by the measure of its task", kind="binary" if is_binary else "ratio"
            )
        }
        for name, part in self.parts.items():
            for metric, meaning in part.metrics.items():
                own_label = replace(meaning, label=f"{name}: {meaning.label}")
                self.metrics[in_task(name, metric)] = own_label

    def score(self, reference: str, completion: str, task: str = "") -> dict[str, float | None]:
        """Return every metric of one answer that applies to it, in the order of `metrics`.

        Args:
            task: Of the row, in a mixture.
        """
        if self.parts:
            part = self.parts[task]
            scores = part.score(reference, completion)
            return {MIXTURE_SCORE: scores[part.primary]} | {
                in_task(task, name): value for name, value in scores.items()
            }
        if self.task.type == "extraction":
            return self._score_extraction(reference, completion)
        if self.task.type == "classification":
            return {"accuracy": float(self.label(completion) == self.label(reference))}
        if self.task.type == "generation":
            return score_text(reference, completion)
        raise ValueError("language modelling is scored by log-likelihood, not by an answer")

    def label(self, text: str) -> str | None:
        """Return the label a text names, or None.

        White space at the ends is ignored; then the text must be a label, or, where only one
        label fits, equal it after case, quotes and a final full stop are ignored as well.
        """
        stripped = " ".join(text.split())
        if stripped in self.task.labels:
            return stripped
        loose = _loose(stripped)
        fitting = [label for label in self.task.labels if _loose(label) == loose]
        return fitting[0] if len(fitting) == 1 else None

    def _score_extraction(self, reference: str, completion: str) -> dict[str, float | None]:
        expected = parse_object(reference) or {}
        answer = parse_object(completion)
        # A configured field that the reference lacks is scored as null.
        names = self.task.fields or list(expected)
        right = {
            name: answer is not None
            and name in answer
            and same_value(expected.get(name), answer[name])
            for name in names
        }
        scores: dict[str, float | None] = {
            "exact_match": float(all(right.values())),
            "valid_json": float(answer is not None),
        }
        for name in self.fields:
            scores[FIELD_PREFIX + name] = float(right[name]) if name in right else None
        return scores

    def _parse_references(self, references: Mapping[str, str]) -> list[dict[str, Any]]:
        parsed = {row_id: parse_object(text) for row_id, text in references.items()}
        bad = [row_id for row_id, value in parsed.items() if not value]
        _refuse(
            bad,
            references,
            allowed="a JSON object with at least one field",
            remedy="mend the row, or choose another `task.type`",
        )
        return [value for value in parsed.values() if value]

    def _check_labels(self, references: Mapping[str, str]) -> None:
        bad = [row_id for row_id, text in references.items() if self.label(text) is None]
        _refuse(
            bad,
            references,
            allowed=", ".join(self.task.labels),
            remedy="mend the row, or add the label to `task.labels`",
        )


def in_task(task: str, metric: str) -> str:
    """Return what a metric of one of a mixture's tasks is called."""
    return f"{task}/{metric}"


def _refuse(bad: Sequence[str], references: Mapping[str, str], allowed: str, remedy: str) -> None:
    if not bad:
        return
    problems = [
        Problem(
            "a test row's reference cannot be scored against",
            where=f"row {row_id}",
            got=repr(references[row_id][:200]),
            allowed=allowed,
            remedy=remedy,
        )
        for row_id in bad[:_SHOWN_PROBLEMS]
    ]
    if len(bad) > _SHOWN_PROBLEMS:
        problems.append(Problem(f"and {len(bad) - _SHOWN_PROBLEMS} more such rows"))
    raise DataError(*problems)


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object a text is, or None.

    Strict: the whole text must be one object. White space around it is ignored, and so is one
    Markdown code fence around all of it, because models trained on chats add it and every
    consumer strips it. Text before or after, NaN and Infinity make it invalid.
    """
    stripped = text.strip()
    fenced = re.fullmatch(r"```[A-Za-z]*[ \t]*\n(.*?)\n?[ \t]*```", stripped, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else stripped, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def same_value(expected: Any, got: Any) -> bool:
    """Return whether two JSON values are equal.

    Strings are compared in Unicode NFC with runs of white space as one space and none at the
    ends; numbers by value (1 equals 1.0, never true); lists in order; objects by key.
    """
    if isinstance(expected, str) and isinstance(got, str):
        return _plain(expected) == _plain(got)
    if isinstance(expected, bool) or isinstance(got, bool):
        return expected is got
    if isinstance(expected, (int, float)) and isinstance(got, (int, float)):
        return expected == got
    if isinstance(expected, list) and isinstance(got, list):
        return len(expected) == len(got) and all(map(same_value, expected, got))
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(
            same_value(value, got[name]) for name, value in expected.items()
        )
    return expected is None and got is None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _loose(text: str) -> str:
    return text.removesuffix(".").strip("\"'`").removesuffix(".").casefold()


def score_text(reference: str, completion: str) -> dict[str, float | None]:
    """Return the metrics of a free text against its reference."""
    expected, answer = reference_words(reference), reference_words(completion)
    common = sum((Counter(expected) & Counter(answer)).values())
    return {
        "token_f1": _f1(common, len(expected), len(answer)),
        "rouge_l": rouge_l(reference, completion),
        "exact_match": float(expected == answer),
        "length_ratio": len(completion.split()) / max(1, len(reference.split())),
    }


def reference_words(text: str) -> list[str]:
    """Return the words of a text as the SQuAD score sees them: no case, punctuation, articles.

    Source: Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1 and its evaluation script.
    """
    lowered = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", lowered).split()


def rouge_l(reference: str, completion: str) -> float:
    """Return ROUGE-L F1: the longest common subsequence of words, over both lengths.

    Words are runs of letters and digits in any script, without case and stemming.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1.
    """
    expected = re.findall(r"\w+", reference.lower())
    answer = re.findall(r"\w+", completion.lower())
    return _f1(_longest_common_subsequence(expected, answer), len(expected), len(answer))


def _f1(common: int, num_expected: int, num_answered: int) -> float:
    if num_expected == num_answered == 0:
        return 1.0
    return 2 * common / (num_expected + num_answered)


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by bit-parallel dynamic programming.

    Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited": row i of the classical
    table is kept as one integer whose zero bits are the positions where it steps up.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(left):
        positions[word] = positions.get(word, 0) | 1 << index
    mask = (1 << len(left)) - 1
    row = mask
    for word in right:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & mask
    return len(left) - row.bit_count()
