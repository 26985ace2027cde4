"""What is good enough of what a model wrote: rules that people's own rows keep.

A rule that more than 2% of the train rows break says nothing about a generated row, and is not
applied: some tasks want answers that repeat their input, or lists that end anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tuneloop.config import OneTaskConfig
from tuneloop.data.filters.boilerplate import find_self_reference
from tuneloop.data.filters.quality import cut_off
from tuneloop.data.rouge import ALIKE, WordCodes, rouge_l, similarities
from tuneloop.data.schema import ReasonCode
from tuneloop.data.sources.formats import check_answer
from tuneloop.data.sources.row_errors import RowError
from tuneloop.evals.scoring.constrained import schema_of
from tuneloop.evals.scoring.metrics import same_value
from tuneloop.evals.scoring.simple import classifier, vectorizer_of_words
from tuneloop.models.json_form import has_form, why_unusable
from tuneloop.repetition import is_repetitive
from tuneloop.text import folded
from tuneloop.words import find_words

# Of people's rows; with fewer rows than these every rule is applied.
_MOST_BROKEN, _FEWEST_ROWS = 0.02, 20
_ECHO, _SURE = 0.9, 0.7
_FENCED = re.compile(r"\A```[\w-]*[ \t]*\n(.*?)\n?```\Z", re.DOTALL)
_LEAD = re.compile(r"\A(?:the\s+)?(?:new\s+)?(?:example\s+)?input\s*(?:\d+\s*)?:\s*", re.IGNORECASE)
_CHATTY = re.compile(
    r"\A(?:sure|certainly|of course|absolutely|okay|ok)\b[ ,.!:]|\Ahere(?:['’]s| is| are)\b|"
    r"\Ai(?:['’]m| am) (?:sorry|unable|not able)\b|\Ai (?:cannot|can['’]t|apologi[sz]e)\b",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"^\s*(?:user|human|assistant|system|question|answer|input|output)\s*:|<\|[a-z_]+\|>",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


class Rejected(NamedTuple):
    """Why something that a model wrote is not taken.

    Args:
        reason: In words; what follows a colon is this one's own.
        kept_row_id: The row that it is too much like.
    """

    code: ReasonCode
    reason: str
    kept_row_id: str | None = None


class Solved(NamedTuple):
    """An input and its answer, as the row has them; `row_id` of a row of people."""

    input: str
    answer: str
    row_id: str = ""


class _Rule(NamedTuple):
    """A property that rows have; `broken` says how a row lacks it, or nothing."""

    code: ReasonCode
    reason: str
    broken: Callable[[Solved], str]


def cleaned(text: str) -> str:
    """Return a reply without the fence or the title that a model puts around what it was asked."""
    text = text.strip()
    fenced = _FENCED.match(text)
    text = _LEAD.sub("", fenced[1].strip() if fenced else text).strip()
    is_quoted = len(text) > 2 and (text[0], text[-1]) in {('"', '"'), ("“", "”")}
    return text[1:-1].strip() if is_quoted and text[0] not in text[1:-1] else text


class Filters:
    """What inputs and answers have to be like, learned from people's train rows.

    Args:
        task: Of the rows.
        people: Train rows that people wrote.
    """

    def __init__(self, task: OneTaskConfig, people: Sequence[Solved]) -> None:
        self.task = task
        self.schema = _schema(task, people)
        self._inputs = _kept(_input_rules(task, people), people)
        self._answers = _kept(_answer_rules(task, people), people)

    def reject_input(self, text: str) -> Rejected | None:
        """Return why an input is not taken; None if it is."""
        if not text:
            return Rejected(ReasonCode.UNREADABLE, "nothing was written")
        return _first_broken(self._inputs, Solved(text, ""))

    def reject_answer(self, row: Solved) -> Rejected | None:
        """Return why an answer is not taken; None if it is."""
        if not row.answer:
            return Rejected(ReasonCode.UNREADABLE, "nothing was written")
        try:
            check_answer(row.answer, self.task)
        except RowError as error:
            return Rejected(ReasonCode.WRONG_ANSWER, f"{error.what}: {error.got}")
        if self.schema is not None and not has_form(row.answer, self.schema):
            return Rejected(ReasonCode.WRONG_ANSWER, "not built like the answers of the train rows")
        return _first_broken(self._answers, row)


def _kept(rules: Sequence[_Rule], people: Sequence[Solved]) -> list[_Rule]:
    """Return the rules that people's rows keep."""
    if len(people) < _FEWEST_ROWS:
        return list(rules)
    allowed = _MOST_BROKEN * len(people)
    return [rule for rule in rules if sum(bool(rule.broken(row)) for row in people) <= allowed]


def _first_broken(rules: Sequence[_Rule], row: Solved) -> Rejected | None:
    for rule in rules:
        if how := rule.broken(row):
            return Rejected(rule.code, f"{rule.reason}: {how}")
    return None


def _answer_like_rule(task: OneTaskConfig, people: Sequence[Solved]) -> list[_Rule]:
    """Return that an input does not read like an answer, by a classifier of people's texts.

    A weak model answers an input where it was to say it in other words.
    """
    if task.type != "generation" or len(people) < _FEWEST_ROWS:
        return []
    texts = [*(row.input for row in people), *(row.answer for row in people)]
    sides = [0] * len(people) + [1] * len(people)
    vectorizer = vectorizer_of_words()
    fitted = classifier().fit(vectorizer.fit_transform(texts), sides)

    def broken(row: Solved) -> str:
        share = float(fitted.predict_proba(vectorizer.transform([row.input]))[0, 1])
        return f"{share:.0%} sure" * (share > _SURE)

    return [_Rule(ReasonCode.WRONG_LAYOUT, "the input reads like an answer", broken)]


def _input_rules(task: OneTaskConfig, people: Sequence[Solved]) -> list[_Rule]:
    return [
        _Rule(
            ReasonCode.REPETITION,
            "the input repeats itself",
            lambda row: "more than 20% of it" * is_repetitive(row.input),
        ),
        _Rule(
            ReasonCode.AI_SELF_REFERENCE,
            "the input is the model's own talk",
            lambda row: _match(_CHATTY, row.input) or find_self_reference(row.input),
        ),
        _Rule(
            ReasonCode.TEMPLATE_MARKER,
            "the input goes on with further turns",
            lambda row: _match(_TURN, row.input),
        ),
        _length_rule("input", [row.input for row in people], lambda row: row.input),
        *_answer_like_rule(task, people),
    ]


def _answer_rules(task: OneTaskConfig, people: Sequence[Solved]) -> list[_Rule]:
    if task.type == "classification":
        return []
    repetition = _Rule(
        ReasonCode.REPETITION,
        "the answer repeats itself",
        lambda row: "more than 20% of it" * is_repetitive(row.answer),
    )
    if task.type == "extraction":
        return [repetition, _Rule(ReasonCode.UNSUPPORTED, "the input does not say it", _unsaid)]
    return [
        repetition,
        _Rule(ReasonCode.CUT_OFF, "the answer ends too soon", lambda row: cut_off(row.answer)),
        _Rule(ReasonCode.CUT_OFF, "the answer ends within a sentence", _open_end),
        _Rule(
            ReasonCode.AI_SELF_REFERENCE,
            "the answer is the model's own talk",
            lambda row: _match(_CHATTY, row.answer) or find_self_reference(row.answer),
        ),
        _Rule(
            ReasonCode.TEMPLATE_MARKER,
            "the answer goes on with further turns",
            lambda row: _match(_TURN, row.answer),
        ),
        _Rule(ReasonCode.TOO_SIMILAR, "the answer is its input again", _echo),
        _Rule(ReasonCode.UNRELATED, "the answer has no word of its input", _unrelated),
        _length_rule("answer", [row.answer for row in people], lambda row: row.answer),
    ]


def _match(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found.group().strip() if found else ""


def _length_rule(side: str, texts: Sequence[str], read: Callable[[Solved], str]) -> _Rule:
    """Return that a text is no shorter than half of people's shortest, nor twice their longest."""
    lengths = [len(find_words(text)) for text in texts]
    shortest, longest = min(lengths, default=0) / 2, 2 * max(lengths, default=0)

    def broken(row: Solved) -> str:
        count = len(find_words(read(row)))
        outside = lengths and not shortest <= count <= longest
        return f"{count:,} words, people's {min(lengths):,} to {max(lengths):,}" * bool(outside)

    return _Rule(ReasonCode.UNUSUAL_LENGTH, f"the {side} has an unusual length", broken)


def _echo(row: Solved) -> str:
    return "ROUGE-L of 0.9 or more" * (rouge_l(row.input, row.answer) >= _ECHO)


def _open_end(row: Solved) -> str:
    """Return the last word of an answer that ends in a letter, a digit or a comma."""
    last = row.answer.split()[-1]
    return last if last[-1].isalnum() or last[-1] in ",;" else ""


def _unrelated(row: Solved) -> str:
    """Return that input and answer share no word of four letters or more, where both have some."""
    asked, said = ({w.casefold() for w in find_words(t) if len(w) > 3} for t in row[:2])
    return "words of 4 letters and more" * (bool(asked) and bool(said) and not asked & said)


def _unsaid(row: Solved) -> str:
    """Return the first text or number of a JSON answer that its input does not have."""
    asked = folded(row.input)
    for value in _values(json.loads(row.answer)):
        if folded(str(value)) not in asked:
            return str(value)
    return ""


def _values(value: object) -> Iterator[str | int | float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _values(part)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value


def _schema(task: OneTaskConfig, people: Sequence[Solved]) -> dict[str, Any] | None:
    """Return the schema of people's answers of an extraction; None if there is none to hold to."""
    if task.type != "extraction" or not people:
        return None
    schema = schema_of([row.answer for row in people])
    return None if why_unusable(schema) else schema


def lost(seed: Solved, text: str, task: OneTaskConfig) -> str:
    """Return what a paraphrase of a row's input has lost that its answer may rest on; empty if not.

    Numbers have to stay, and so have the values of a JSON answer that the input has.
    """
    said = folded(text)
    missing = sorted(set(_NUMBER.findall(seed.input)) - set(_NUMBER.findall(text)))
    if task.type == "extraction" and not missing:
        asked = folded(seed.input)
        texts = (" ".join(str(value).split()) for value in _values(json.loads(seed.answer)))
        missing = [t for t in texts if t.casefold() in asked and t.casefold() not in said]
    return missing[0] if missing else ""


class Novelty:
    """Tells inputs that say hardly anything new.

    Source: Wang et al. 2022, Self-Instruct, arXiv:2212.10560, section 2.2: ROUGE-L below 0.7.

    Args:
        max_similarity: From here on two inputs are too much alike, 0 to 1.
        known: What the known inputs are, in words.
    """

    def __init__(self, max_similarity: float, known: str = "a known input") -> None:
        self.max_similarity, self._known = max_similarity, known
        self._codes, self._texts, self._ids = WordCodes(), list[str](), list[str]()

    def add(self, text: str, row_id: str) -> None:
        """Count an input among the known ones."""
        self._texts.append(self._codes.encode(text))
        self._ids.append(row_id)

    def reject(self, text: str) -> Rejected | None:
        """Return which known input one is too much like; None if it is like none."""
        if not self._texts:
            return None
        found = similarities([self._codes.encode(text)], self._texts)[0]
        best = int(np.argmax(found))
        if found[best] < self.max_similarity:
            return None
        reason = f"too much like {self._known}: ROUGE-L {found[best]:.2f}"
        return Rejected(ReasonCode.TOO_SIMILAR, reason, self._ids[best])


@dataclass(frozen=True)
class Agreement:
    """What most answers to an input say.

    Args:
        answer: The first of those that say the same.
        ratio: Their share of all that were asked for, 0 to 1.
    """

    answer: str
    ratio: float


def agreement(answers: Sequence[str], num_asked: int, task: OneTaskConfig) -> Agreement:
    """Return what most of several answers say; labels and JSON have to be equal, texts alike.

    Args:
        answers: At least one that can be used.
        num_asked: How many were asked for; those that cannot be used agree with none.
        task: Says when two answers are the same.
    """
    if task.type in ("classification", "extraction"):
        # Of JSON as evaluation compares it: 1 equals 1.0.
        values = answers if task.type == "classification" else [json.loads(one) for one in answers]
        same = [sum(same_value(value, other) for other in values) for value in values]
        most = same.index(max(same))
        return Agreement(answers[most], same[most] / num_asked)
    codes = WordCodes()
    encoded = [codes.encode(answer) for answer in answers]
    # Two texts without words have nothing that could differ.
    counts = (similarities(encoded, encoded) >= ALIKE).sum(axis=1)
    best = int(np.argmax(counts))
    return Agreement(answers[best], int(counts[best]) / num_asked)
