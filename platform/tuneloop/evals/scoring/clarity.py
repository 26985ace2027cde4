"""How clear a task is from its rows alone, before a model is asked: do the answers agree, are they
built alike, and what does the cheapest thing get right that could do the job."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from tuneloop.config import TaskConfig
from tuneloop.evals.scoring.intervals import wilson
from tuneloop.evals.scoring.metrics import TASK_METRICS, one_value, parse_object
from tuneloop.evals.scoring.questions import Question
from tuneloop.evals.scoring.simple import answer_simply
from tuneloop.records import Conversation, Message
from tuneloop.text import folded, shorten
from tuneloop.words import find_words

# Rows that are looked at: 2,000 with 150 labels take some seconds.
MOST_ROWS = 2_000
_FOLDS = 5
_FEWEST_ROWS = 50
_FEW_OF_LABEL = 10
_MANY_CONFLICTS = 0.05
_ENOUGH_CLASSIFIER, _ENOUGH_LOOKUP = 0.95, 0.8
_CONFIDENCE = 0.95
_EXAMPLES, _SHOWN_CHARACTERS = 3, 50
_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)


class Conflict(NamedTuple):
    """An input that rows answer differently."""

    input: str
    answers: list[str]


@dataclass(frozen=True)
class Clarity:
    """What rows say about their task.

    Args:
        num_rows: How many were looked at.
        num_conflicting: Rows with an input that another row answers differently.
        most_right_ratio: Share of the rows that a model can get right at most: those with the most
            frequent answer to their input, 0 to 1.
        conflicts: Some of the inputs with several answers.
        forms: How answers are built, and in which share of the rows, the most frequent first.
        answer_words: Length of the answers in words: 5%, half and 95% of the rows are no longer.
        labels: Of a classification, how many rows have each label, the most frequent first.
        metric: What the scores are of.
        lookup: What the simple arm gets, by cross-validation: a classifier of words, or the answer
            of the row whose input is most alike.
        lookup_low: Lower end of its 95% interval.
        num_learned: Rows that it learned from.
        floor: What the most frequent answer gets, or without labels any other row's.
    """

    num_rows: int
    num_conflicting: int
    most_right_ratio: float
    conflicts: list[Conflict]
    forms: dict[str, float]
    answer_words: list[int]
    labels: dict[str, int]
    metric: str
    lookup: float | None
    lookup_low: float | None
    num_learned: int
    floor: float | None

    @property
    def is_one_sided(self) -> bool:
        """Whether one label is so frequent that accuracy says little."""
        shares = [count / self.num_rows for count in self.labels.values()]
        return bool(shares) and shares[0] >= max(0.5, min(0.8, 2 / len(shares)))

    @property
    def advice(self) -> str:
        """What to do with such rows: `label`, `agree`, `classifier`, `lookup` or `finetune`."""
        if self.num_rows < _FEWEST_ROWS:
            return "label"
        if self.num_conflicting > _MANY_CONFLICTS * self.num_rows:
            return "agree"
        enough = _ENOUGH_CLASSIFIER if self.labels else _ENOUGH_LOOKUP
        if self.lookup_low is not None and self.lookup_low >= enough:
            return "classifier" if self.labels else "lookup"
        return "finetune"

    def as_dict(self) -> dict[str, Any]:
        """Return it for `--json`."""
        conflicts = [conflict._asdict() for conflict in self.conflicts]
        told = {"advice": self.advice, "told": self.lines()}
        return asdict(self) | {"conflicts": conflicts} | told

    def lines(self) -> list[str]:
        """Return what people read, a sentence or two on each line."""
        lines = [self._of_conflicts(), self._of_labels() if self.labels else self._of_forms()]
        if self.lookup is not None and self.floor is not None:
            what = "a classifier of words" if self.labels else "the answer of the nearest row"
            base = "the most frequent label" if self.labels else "any other row's answer"
            lines.append(
                f"{what} gets {self.metric} {self.lookup:.0%} on rows that it has not seen "
                f"(learned from {self.num_learned:,}), {base} {self.floor:.0%}"
            )
        return [*lines, self._of_advice()]

    def _of_conflicts(self) -> str:
        if not self.num_conflicting:
            return "no input is answered in two ways"
        shown = self.conflicts[0]
        answers = " and ".join(f"`{_short(answer)}`" for answer in shown.answers[:2])
        return (
            f"{self.num_conflicting:,} rows ({self.num_conflicting / self.num_rows:.1%}) have an "
            f"input that another row answers differently, such as “{_short(shown.input)}”: "
            f"{answers}; no model can give more than {self.most_right_ratio:.1%} of these answers"
        )

    def _of_forms(self) -> str:
        (first, share), *others = self.forms.items()
        rest = f", {others[0][1]:.0%} {others[0][0]}" if others else ""
        low, half, high = self.answer_words
        return f"{share:.0%} of the answers are {first}{rest}; {low} to {high} words, mostly {half}"

    def _of_labels(self) -> str:
        few = [label for label, count in self.labels.items() if count < _FEW_OF_LABEL]
        most, count = next(iter(self.labels.items()))
        text = f"{len(self.labels)} labels; `{most}` has {count / self.num_rows:.0%} of the rows"
        if few:
            named = ", ".join(f"`{label}`" for label in few[:_EXAMPLES])
            text += f"; {len(few)} of them have fewer than {_FEW_OF_LABEL} rows, such as {named}"
        return text

    def _of_advice(self) -> str:
        return {
            "label": f"{self.num_rows} rows are too few to finetune or to show a gain: begin with "
            "prompting (`tuneloop evaluate` scores the base model with and without examples), and "
            "collect more",
            "agree": "agree on the answers first: what rows contradict is learned as well",
            "classifier": "a classifier may be enough: compare with the arm `simple` before you "
            "serve a model",
            "lookup": "looking up the nearest row may be enough: compare with the arm `simple` "
            "before you serve a model",
            "finetune": "worth finetuning; `tuneloop run` measures first what prompting reaches, "
            "which may be enough",
        }[self.advice]


class AnsweredRow(NamedTuple):
    """An input and its answer.

    Args:
        context: What else the answer rests on: earlier turns, tools.
    """

    input: str
    answer: str
    context: str = ""

    @property
    def key(self) -> str:
        """Equal for rows that ask the same."""
        return folded(f"{self.input}\0{self.context}")


def measure_clarity(rows: Sequence[AnsweredRow], task: TaskConfig) -> Clarity:
    """Return how clear a task is.

    Args:
        rows: At least one. The simple arm learns from 2,000 spread evenly, if there are more.
        task: A single task with answers, and its labels if it is a classification.
    """
    by_input: dict[str, Counter[str]] = defaultdict(Counter)
    texts: dict[str, str] = {}
    for row in rows:
        said = _said(row.answer, task)
        by_input[row.key][said] += 1
        texts.setdefault(row.key, row.input)
        texts.setdefault(said, row.answer)
    several = {asked: given for asked, given in by_input.items() if len(given) > 1}
    kinds = Counter(_form(row.answer, task) for row in rows)
    lengths = sorted(len(find_words(row.answer)) for row in rows)
    labels = Counter(row.answer for row in rows) if task.type == "classification" else Counter()
    metric = TASK_METRICS[task.type].primary
    learned = rows[:: max(1, -(-len(rows) // MOST_ROWS))]
    scores = _cross_validate(learned, task)
    return Clarity(
        num_rows=len(rows),
        num_conflicting=sum(given.total() for given in several.values()),
        most_right_ratio=sum(max(given.values()) for given in by_input.values()) / len(rows),
        conflicts=[
            Conflict(texts[asked], [texts[answer] for answer, _ in given.most_common()])
            for asked, given in [*several.items()][:_EXAMPLES]
        ],
        forms={form: count / len(rows) for form, count in kinds.most_common()},
        answer_words=[lengths[int(q * (len(lengths) - 1))] for q in (0.05, 0.5, 0.95)],
        labels=dict(labels.most_common()),
        metric=metric,
        lookup=fmean(scores) if scores else None,
        lookup_low=_low(scores) if scores else None,
        num_learned=round(len(learned) * (1 - 1 / _FOLDS)),
        floor=_floor(rows, task),
    )


def _said(answer: str, task: TaskConfig) -> str:
    """Return an answer without what makes no difference: case, white space, how JSON is written."""
    if task.type == "extraction" and (record := parse_object(answer)) is not None:
        given = {name: one_value(value) for name, value in record.items() if value is not None}
        return json.dumps(given, sort_keys=True)
    return folded(answer)


def _short(text: str) -> str:
    return shorten(" ".join(text.split()), _SHOWN_CHARACTERS)


def _form(answer: str, task: TaskConfig) -> str:
    """Return how an answer is built."""
    if task.type == "classification":
        return "labels"
    if task.type == "extraction":
        try:
            record = json.loads(answer)
        except ValueError:
            return "no JSON"
        return (
            f"JSON with {', '.join(sorted(record))}" if isinstance(record, dict) else "no objects"
        )
    if "```" in answer:
        return "text with code"
    if answer.lstrip()[:1] in ("{", "["):
        return "JSON"
    if len(_LIST_ITEM.findall(answer)) > 1:
        return "lists"
    return "several paragraphs" if "\n" in answer.strip() else "a single paragraph"


def _cross_validate(rows: Sequence[AnsweredRow], task: TaskConfig) -> list[float]:
    """Return the simple arm's score on each row, learned from the rows of other folds.

    Rows with the same input are in one fold.
    """
    score = TASK_METRICS[task.type].metrics[TASK_METRICS[task.type].primary].score
    folds = [_fold(row.key) for row in rows]
    if score is None or len(set(folds)) < 2:
        return []
    references = {str(number): row.answer for number, row in enumerate(rows)}
    found: list[float] = []
    questions = [
        Question(str(number), (Message("user", row.input),), row.answer)
        for number, row in enumerate(rows)
    ]
    for fold in set(folds):
        train = [
            Conversation((*one.messages, Message("assistant", one.reference)), one.example_id)
            for one, own in zip(questions, folds, strict=True)
            if own != fold
        ]
        asked = [one for one, own in zip(questions, folds, strict=True) if own == fold]
        for name, answer in answer_simply(train, asked, task).items():
            value = score(references[name], answer, task)
            if value is not None:
                found.append(value)
    return found


def _fold(text: str) -> int:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[0] % _FOLDS


def _low(scores: Sequence[float]) -> float:
    """Return the lower end of the interval of a mean of scores from 0 to 1."""
    if set(scores) <= {0.0, 1.0}:
        return wilson(sum(scores), len(scores), _CONFIDENCE)[0]
    spread = stdev(scores) if len(scores) > 1 else 1.0
    return max(0.0, fmean(scores) - 1.96 * spread / len(scores) ** 0.5)


def _floor(rows: Sequence[AnsweredRow], task: TaskConfig) -> float | None:
    """Return what an answer gets that does not look at the input."""
    score = TASK_METRICS[task.type].metrics[TASK_METRICS[task.type].primary].score
    if score is None:
        return None
    answers = [row.answer for row in rows]
    if task.type == "classification":
        most = Counter(answers).most_common(1)[0][0]
        given: Mapping[int, str] = dict.fromkeys(range(len(rows)), most)
    else:
        given = {index: answers[index - len(rows) // 2] for index in range(len(rows))}
    values = [score(row.answer, given[index], task) for index, row in enumerate(rows)]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
