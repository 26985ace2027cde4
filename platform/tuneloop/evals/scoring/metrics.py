"""What is measured for each kind of task, and how one answer is scored.

A score is a number for one answer; None where the metric does not apply to that row. To add a
metric, write its function in a module of its own and enter it once in `TASK_METRICS`. Only
`macro_f1` looks at more than one row (`comparison.LabelCounts`).
"""

from __future__ import annotations

import copy
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import regex
from rapidfuzz.distance import LCSseq

from tuneloop.config import OneTaskConfig, TaskConfig, TaskType
from tuneloop.errors import DataError, Problem
from tuneloop.evals.scoring.function_calls import accepted_calls, function_call, without_accepted
from tuneloop.text import counted
from tuneloop.words import WORD_PATTERN, find_words, split_words

Better = Literal["higher", "lower", "neither"]
FIELD_PREFIX = "field_"
MIXTURE_SCORE = "score"
_SHOWN_PROBLEMS = 5
_THOUGHT = re.compile(r"\A.*</(?:think|thinking|thought|reasoning)>\s*", re.DOTALL)


# From the reference, the completion and the task's configuration; None: it does not apply here.
Score = Callable[[str, str, OneTaskConfig], float | None]


MetricKind = Literal["binary", "ratio", "number"]


@dataclass(frozen=True)
class Metric:
    """What a metric means, and how it is computed.

    Args:
        label: What it says, in a few words.
        better: Which direction is an improvement.
        kind: `binary` is 0 or 1 for an answer, `ratio` lies in [0, 1] (both are shown in per
            cent), `number` is shown as it is.
        score: Scores one answer. None where the score comes from elsewhere: from the likelihood
            of a text, from the tasks of a mixture, or from a published evaluation.
    """

    label: str
    better: Better = "higher"
    kind: MetricKind = "ratio"
    score: Score | None = field(default=None, repr=False)

    def meaning(self) -> dict[str, str]:
        """Return what `metrics.json` keeps."""
        return {"label": self.label, "better": self.better, "kind": self.kind}


FUNCTION_CALL = Metric("calls with accepted arguments", kind="binary", score=function_call)
PERPLEXITY, REFERENCE_BITS = "perplexity", "reference_bits_per_byte"
# Of the reference, not of the answer; see `perplexity`.
PERPLEXITY_METRICS = {
    PERPLEXITY: Metric("perplexity of the reference, by tokens", better="lower", kind="number"),
    REFERENCE_BITS: Metric("bits per byte of the reference", better="lower", kind="number"),
}
MACRO_F1 = Metric("mean F1 over the labels")
# Its name: of all answers together, not of one; always there for a classification.
OF_ALL_ROWS = "macro_f1"
PRECISION_PREFIX = "precision_"

# SQuAD removes these and so joins what they part (`don't`), whichever hyphen or minus stands there;
# other punctuation parts words.
_WITHOUT_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’ʼ\u2010\u2011−"))
_PUNCTUATION = regex.compile(r"\p{P}")
_ONE_SPELLING = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "−": "-"})
_QUOTES = "\"'`“”„‘’‚«»"
_ARTICLES = frozenset({"a", "an", "the"})
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGN_BEFORE_CURRENCY = regex.compile(r"(?<![\p{L}\p{N}])-(\p{Sc})(?=[\d.])")
_NO_WHOLE_PART = regex.compile(r"(?<![\p{L}\p{N}.])\.(?=\d)")
# A number with its sign, a word (`don't`, `c++`, `c#`), or a symbol.
_TOKEN = regex.compile(
    r"(?<![\p{L}\p{N}])-?\d+(?:[.,]\d+)*(?![\p{L}\p{M}\p{N}_])"
    rf"|{WORD_PATTERN}(?:'\p{{L}}+)*(?:\+\+|\#)?"
    r"|[\p{Sm}\p{Sc}\p{So}%‰\#&@]",
    regex.V1,
)


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of a kind of task; the primary one decides the comparison."""

    primary: str
    metrics: dict[str, Metric]


class Scorer:
    """Scores answers of one task, or of the tasks of a mixture.

    In a mixture each answer has the primary metric of its own task as its `score`; the metrics of
    a task are called `TASK/METRIC` and apply to its rows only.

    Args:
        task: The task, as configured.
        references: The reference of every test row by its id; checked at once.
        task_of: In a mixture, the task of every test row by its id.
        metrics: What is measured in place of the task's own metrics.
        primary: The metric that decides in place of the task's own.
        by_task: In a mixture, what is measured in place of a task's own metrics.

    The metric that decides, `decides`, is `primary`, which each answer has by itself; but macro-F1
    looks at all answers together, and single ones go by accuracy then.

    Raises:
        DataError: References that cannot be scored against, for example one that is not JSON.
    """

    of_one: Mapping[str, Metric] | None = None

    def __init__(
        self,
        task: OneTaskConfig,
        references: Mapping[str, str],
        task_of: Mapping[str, str] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        primary: str = "",
        by_task: Mapping[str, Mapping[str, Metric]] | None = None,
    ) -> None:
        self.task = task
        self.parts: dict[str, Scorer] = {}
        if isinstance(task, TaskConfig) and task.tasks:
            self._mix(task, references, task_of or {}, by_task or {})
            return
        definition = TASK_METRICS[task.type]
        self.metrics = dict(metrics or definition.metrics)
        self.primary = primary or definition.primary
        if self.primary == OF_ALL_ROWS:
            usual = definition.primary
            self.primary = usual if usual in self.metrics else next(iter(self.metrics))
        self._is_of_all_rows = primary == OF_ALL_ROWS
        if task.type == "extraction":
            parsed = self._parse_references(references)
            fields = task.fields or dict.fromkeys(name for value in parsed for name in value)
            self.metrics |= {
                FIELD_PREFIX + name: Metric(
                    f"`{name}` right", kind="binary", score=partial(_field_score, name)
                )
                for name in fields
            }
            self.metrics |= {
                PRECISION_PREFIX + name: Metric(
                    f"`{name}` right where it is given",
                    kind="binary",
                    score=partial(_field_precision, name),
                )
                for name in fields
            }
        elif task.type == "classification":
            self._check_labels(references)
        elif task.type == "generation":
            is_call = [accepted_calls(text) is not None for text in references.values()]
            if any(is_call) and not metrics:
                self.metrics["function_call"] = FUNCTION_CALL
                if all(is_call) and not primary:
                    # Words in common say nothing of a call.
                    self.primary, self.metrics = "function_call", {"function_call": FUNCTION_CALL}

    def averaged(self) -> Scorer:
        """Return a scorer of the mean of several answers: right or wrong becomes a share."""
        other = copy.copy(self)
        other.of_one = self.metrics
        other.metrics = {
            name: replace(metric, kind="ratio") if metric.kind == "binary" else metric
            for name, metric in self.metrics.items()
        }
        other.parts = {name: part.averaged() for name, part in self.parts.items()}
        return other

    def metrics_of(self, is_averaged: bool) -> Mapping[str, Metric]:
        """Return what scores mean: an arm that answered each row once has no shares."""
        return self.metrics if is_averaged or self.of_one is None else self.of_one

    @property
    def decides(self) -> str:
        """The metric that the headline reads."""
        return OF_ALL_ROWS if self._is_of_all_rows else self.primary

    def of(self, task: str) -> Scorer:
        """Return the scorer of one of a mixture's tasks; this one where there is no mixture."""
        return self.parts[task] if self.parts else self

    def _mix(
        self,
        task: TaskConfig,
        references: Mapping[str, str],
        task_of: Mapping[str, str],
        by_task: Mapping[str, Mapping[str, Metric]],
    ) -> None:
        self._is_of_all_rows = False
        for name, one in task.tasks.items():
            of_task = {key: text for key, text in references.items() if task_of[key] == name}
            metrics = by_task.get(name)
            self.parts[name] = Scorer(
                one, of_task, metrics=metrics, primary=deciding_of(one, metrics) if metrics else ""
            )
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
                self.metrics[in_task(name, metric)] = replace(
                    meaning, label=f"{name}: {meaning.label}", score=None
                )

    def score(self, reference: str, completion: str, task: str = "") -> dict[str, float | None]:
        """Return every metric of one answer that applies to it, in the order of `metrics`.

        Args:
            task: The row's task in a mixture.
        """
        reference, completion = without_thought(reference), without_thought(completion)
        if self.parts:
            part = self.parts[task]
            scores = part.score(reference, completion)
            return {MIXTURE_SCORE: scores[part.primary]} | {
                in_task(task, name): value for name, value in scores.items()
            }
        # What is accepted beside the reference's own values is no part of what it says.
        said = without_accepted(reference)
        return {
            name: metric.score(
                reference if name == "function_call" else said, completion, self.task
            )
            for name, metric in self.metrics.items()
            if metric.score is not None
        }

    def label(self, text: str) -> str | None:
        """Return the label a text names, or None."""
        return find_label(without_thought(text), self.task.labels)

    def _parse_references(self, references: Mapping[str, str]) -> list[dict[str, Any]]:
        parsed = {row_id: parse_object(text) for row_id, text in references.items()}
        bad = [row_id for row_id, value in parsed.items() if not value]
        _refuse(
            bad,
            references,
            allowed="a JSON object with at least one field",
            remedy="fix the row, or choose another `task.type`",
        )
        return [value for value in parsed.values() if value]

    def _check_labels(self, references: Mapping[str, str]) -> None:
        bad = [row_id for row_id, text in references.items() if self.label(text) is None]
        _refuse(
            bad,
            references,
            allowed=", ".join(self.task.labels),
            remedy="fix the row, or add the label to `task.labels`",
        )


def deciding_of(task: OneTaskConfig, metrics: Mapping[str, Metric]) -> str:
    """Return which of the chosen metrics decides: the task's own, else the first that can."""
    usual = TASK_METRICS[task.type].primary
    if usual in metrics:
        return usual
    answers = {name: m for name, m in metrics.items() if name not in PERPLEXITY_METRICS}
    return next((n for n, m in answers.items() if m.better != "neither"), next(iter(answers)))


def without_thought(text: str) -> str:
    """Return an answer without what a model that thinks wrote before it, up to the closing tag."""
    return _THOUGHT.sub("", text, count=1)


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
        problems.append(Problem(f"and {counted(len(bad) - _SHOWN_PROBLEMS, 'more such row')}"))
    raise DataError(*problems)


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object a text is, or None; as strict as `parse_json`."""
    value = parse_json(text)
    return value if isinstance(value, dict) else None


def parse_json(text: str) -> Any:
    """Return the JSON value a text is, or None.

    Strict: the whole text must be one value. White space around it is ignored, and so is one
    Markdown code fence around all of it, because models trained on chats add it and every
    consumer strips it. Text before or after, NaN and Infinity make it invalid.
    """
    stripped = text.strip()
    fenced = re.fullmatch(r"```[A-Za-z]*[ \t]*\n(.*?)\n?[ \t]*```", stripped, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else stripped, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return None


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def same_value(expected: object, got: object) -> bool:
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


def one_value(value: object) -> object:
    """Return a JSON value that is the same for all that `same_value` takes for equal."""
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [one_value(item) for item in value]
    if isinstance(value, dict):
        return {name: one_value(item) for name, item in value.items()}
    return value


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _loose(text: str) -> str:
    plain = unicodedata.normalize("NFC", text)
    return plain.removesuffix(".").strip(_QUOTES).removesuffix(".").casefold()


def find_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the label a text names, or None.

    White space at the ends is ignored; then the text must be a label, or, where only one
    label fits, equal it after case, quotes and a final full stop are ignored as well.
    """
    stripped = " ".join(text.split())
    if stripped in labels:
        return stripped
    loose = _loose(stripped)
    fitting = [label for label in labels if _loose(label) == loose]
    return fitting[0] if len(fitting) == 1 else None


def accuracy(reference: str, completion: str, task: OneTaskConfig) -> float:
    """Return 1 where an answer names the reference's label, else 0."""
    return float(find_label(completion, task.labels) == find_label(reference, task.labels))


def all_fields_right(reference: str, completion: str, task: OneTaskConfig) -> float:
    """Return 1 where every field of the reference, or every configured one, is right, else 0.

    A field that the answer invents makes it wrong: one with a value that neither the reference nor
    the configuration has.
    """
    expected, answer = parse_object(reference) or {}, parse_object(completion)
    if answer is None:
        return 0.0
    known = {*expected, *task.fields}
    is_invented = any(value is not None and name not in known for name, value in answer.items())
    return float(
        not is_invented
        and all(_is_right(name, expected, answer) for name in task.fields or expected)
    )


def fields_precision(reference: str, completion: str, task: OneTaskConfig) -> float | None:
    """Return the share of an answer's fields that are right; None where it has none."""
    counts = _count_fields(reference, completion, task)
    return counts.right / counts.answered if counts.answered else None


def fields_recall(reference: str, completion: str, task: OneTaskConfig) -> float | None:
    """Return the share of the reference's fields that are right; None where it has none."""
    counts = _count_fields(reference, completion, task)
    return counts.right / counts.expected if counts.expected else None


def fields_f1(reference: str, completion: str, task: OneTaskConfig) -> float:
    """Return the F1 of the fields that are right."""
    counts = _count_fields(reference, completion, task)
    return _f1(counts.right, counts.expected, counts.answered)


class _FieldCounts(NamedTuple):
    """Fields with a value: those that are right, those of the reference, those of the answer."""

    right: int
    expected: int
    answered: int


def _count_fields(reference: str, completion: str, task: OneTaskConfig) -> _FieldCounts:
    expected, answer = parse_object(reference) or {}, parse_object(completion) or {}
    scored = task.fields or {*expected, *answer}
    names = [name for name in scored if expected.get(name) is not None]
    given = [name for name in scored if answer.get(name) is not None]
    right = sum(_is_right(name, expected, answer) for name in given)
    return _FieldCounts(right, len(names), len(given))


def _is_right(name: str, expected: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
    """Return whether a field is right; a field that is left out is the same as null."""
    return same_value(expected.get(name), answer.get(name))


def valid_json(reference: str, completion: str, task: OneTaskConfig) -> float:
    """Return 1 where an answer is one JSON object, else 0."""
    return float(parse_object(completion) is not None)


def _field_score(name: str, reference: str, completion: str, task: OneTaskConfig) -> float | None:
    """Return whether a field of the reference is right: its recall over the rows."""
    expected, answer = parse_object(reference) or {}, parse_object(completion)
    if name not in (task.fields or expected):
        return None
    return float(answer is not None and _is_right(name, expected, answer))


def _field_precision(
    name: str, reference: str, completion: str, task: OneTaskConfig
) -> float | None:
    """Return whether a field of the answer is right: its precision over the rows."""
    expected, answer = parse_object(reference) or {}, parse_object(completion) or {}
    return None if answer.get(name) is None else float(_is_right(name, expected, answer))


def token_f1(reference: str, completion: str, task: OneTaskConfig) -> float:
    """Return the F1 of the words in common; articles count where the reference has no others."""
    expected, answer = reference_words(reference), reference_words(completion)
    if not expected:  # as the letter A of a choice, which an empty answer does not name
        expected, answer = split_words(_bare(reference)), split_words(_bare(completion))
    if not expected:
        return _same_signs(reference, completion)
    common = sum((Counter(expected) & Counter(answer)).values())
    return _f1(common, len(expected), len(answer))


def same_words(reference: str, completion: str, task: OneTaskConfig) -> float:
    """Return 1 where both have the same words, numbers and signs in the same order, else 0."""
    return float(words_and_signs(reference) == words_and_signs(completion))


def length_ratio(reference: str, completion: str, task: OneTaskConfig) -> float:
    """Return the words of an answer over those of the reference."""
    return len(split_words(completion)) / max(1, len(split_words(reference)))


def rouge_l(reference: str, completion: str, task: OneTaskConfig) -> float:
    """Return ROUGE-L F1: the longest common subsequence of words, over both lengths.

    Words are runs of letters and digits in any script, without case and stemming; in scripts
    without spaces characters.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1.
    """
    expected, answer = find_words(reference.lower()), find_words(completion.lower())
    if not expected:
        return _same_signs(reference, completion)
    return _f1(LCSseq.similarity(expected, answer), len(expected), len(answer))


def reference_words(text: str) -> list[str]:
    """Return the words of a text as the SQuAD score sees them: no case, punctuation, articles.

    Beyond its script: Unicode NFC, typographic quotes and the punctuation of other scripts are
    punctuation too, and characters of scripts without spaces are words.

    Source: Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1 and its evaluation script.
    """
    return split_words(re.sub(r"\b(a|an|the)\b", " ", _bare(text)))


def _same_signs(reference: str, completion: str) -> float:
    """Return 1 where a reference without words, such as an operator, is said as it is, else 0."""
    return float(_plain(reference) == _plain(completion))


def _bare(text: str) -> str:
    """Return a text without case and punctuation."""
    lowered = unicodedata.normalize("NFC", text).lower().translate(_WITHOUT_PUNCTUATION)
    return str(_PUNCTUATION.sub(" ", lowered))


def words_and_signs(text: str) -> list[str]:
    """Return the words of a text with what makes another value of them: signs, decimals, symbols.

    Case, articles, quotes and other punctuation do not count. `-5` is not `5`, `3.14` not `314`,
    `.5` not `5`, `5%` not `5` and `C++` not `C#`; `1,000` is `1000`. A text of articles alone, as
    the letter A of a choice, keeps them, and one of punctuation alone, such as `/`, as well.
    """
    plain = plain_numbers(unicodedata.normalize("NFC", text).casefold().translate(_ONE_SPELLING))
    words = _TOKEN.findall(_THOUSANDS.sub("", plain))
    return [word for word in words if word not in _ARTICLES] or words or plain.split()


def plain_numbers(text: str) -> str:
    """Return a text with `-$5` as `$-5` and `.5` as `0.5`: numbers keep their sign and point."""
    return str(_NO_WHOLE_PART.sub("0.", _SIGN_BEFORE_CURRENCY.sub(r"\1-", text)))


def _f1(common: int, num_expected: int, num_answered: int) -> float:
    if num_expected == num_answered == 0:
        return 1.0
    return 2 * common / (num_expected + num_answered)


TASK_METRICS: dict[TaskType, TaskMetrics] = {
    "extraction": TaskMetrics(
        "exact_match",
        {
            "exact_match": Metric(
                "all fields right, none invented", kind="binary", score=all_fields_right
            ),
            "valid_json": Metric("valid JSON", kind="binary", score=valid_json),
            "fields_precision": Metric("fields given that are right", score=fields_precision),
            "fields_recall": Metric("fields of the reference that are right", score=fields_recall),
            "fields_f1": Metric("F1 of the fields", score=fields_f1),
        },
    ),
    "classification": TaskMetrics(
        "accuracy", {"accuracy": Metric("right label", kind="binary", score=accuracy)}
    ),
    "generation": TaskMetrics(
        "token_f1",
        {
            "token_f1": Metric("words in common with the reference (F1)", score=token_f1),
            "rouge_l": Metric("longest common word sequence (ROUGE-L)", score=rouge_l),
            "exact_match": Metric(
                "same words, numbers and signs as the reference", kind="binary", score=same_words
            ),
            "length_ratio": Metric(
                "length over the reference's", "neither", "number", score=length_ratio
            ),
        },
    ),
    "language_modeling": TaskMetrics(
        "bits_per_byte", {"bits_per_byte": Metric("bits per byte of text", "lower", "number")}
    ),
}
