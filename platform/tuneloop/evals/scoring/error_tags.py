"""What is wrong with an answer, beyond its score: tags that say what to fix."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from tuneloop.evals.scoring.function_calls import without_accepted
from tuneloop.evals.scoring.metrics import Scorer, parse_object
from tuneloop.evals.scoring.nearest import TrainRow, contradicts
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.unsupported import find_unsupported
from tuneloop.evals.scoring.wording import find_copied, find_refusal, find_template
from tuneloop.languages import foreign_language, language_of
from tuneloop.records import Conversation, FinishReason, Message
from tuneloop.repetition import first_repetition, is_repetitive, repeated_ratio
from tuneloop.spelling import capitalised_words, dictionary, is_known, is_slip, prose_words
from tuneloop.words import Span, split_words

ERROR_TAGS: dict[str, str] = {
    "cut_off": "stopped by the token limit, not by the model",
    "never_stops": "cut off, and repetitive or more than twice the reference's words",
    "empty": "no text at all",
    "wrong_format": "not the form the task asks for",
    "repetitive": "repeats phrases it has used before",
    "too_long": "more than twice the reference's words",
    "misspelt": "words in no dictionary, question, reference or training data",
    "leaked_template": "a control token, a template's heading or another speaker's turn",
    "refusal": "declines to answer, as the reference does not",
    "wrong_language": "clearly in another language than the reference",
    "copies_prompt": "half of it stands in the prompt, and not in the reference",
    "unsupported": "a number or a name that neither question nor reference has",
    "contradicts_training": "says otherwise than a training row with nearly the same question",
}
_TOO_LONG_RATIO = 2.0
_ANY_WORD = re.compile(r"[^\W\d_]{3,}")
# One odd word in a long answer is a term or a name; one in twenty is bad spelling.
_MISSPELT_RATIO = 0.05
# A word that so many training rows use is a term of the data, not a slip in one of them.
_TERM_ROWS = 3
_SHOWN_ITEMS, _SHOWN_CHARACTERS = 5, 120
# A language of fewer of the references is an exception.
_NOTABLE_LANGUAGE = 0.05
# A millisecond each; rows are in random order.
_FIRST_REFERENCES = 2_000
_COMMON_SHARE = 0.05
_VOCABULARY_WORD = re.compile(r"[^\W\d_]{2,}")
# Where the reference itself is mostly not English, an English dictionary says nothing.
_FOREIGN_RATIO = 0.4


@dataclass(frozen=True)
class Evidence:
    """What a tag rests on.

    Args:
        tag: Name of the tag.
        detail: The number or the words that show it.
        start: Where they begin in the completion, in characters; None where no part of it does.
        end: Where they end.
    """

    tag: str
    detail: str
    start: int | None = None
    end: int | None = None

    def moved(self, count: int) -> Evidence:
        """Return it for a completion with so many characters more before it."""
        if self.start is None or self.end is None:
            return self
        return replace(self, start=self.start + count, end=self.end + count)


@dataclass(frozen=True)
class Background:
    """What is known of the data when the answers to a question are judged.

    Args:
        terms: Words that the data uses, in lower case: they are well spelt.
        vocabulary: Words that so many rows use that to name them says nothing.
        languages: The languages that the references of the test are in.
        twins: Training rows that ask nearly the same as the question.
    """

    terms: Collection[str] = ()
    vocabulary: Collection[str] = ()
    languages: Collection[str] = ()
    twins: Sequence[TrainRow] = ()


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer with what it is judged by.

    Args:
        prompt: What was sent, as predictions keep it: messages as JSON.
        question: The row's own turns, without solved examples; the whole prompt if empty.
        is_right: The primary metric says so: what it says is not doubted then.
        tokens: Of the answer; None where they were not counted.
    """

    reference: str
    completion: str
    finish_reason: FinishReason
    prompt: str = ""
    question: str = ""
    is_right: bool = False
    tokens: int | None = None


def tag_errors(
    scorer: Scorer,
    reference: str,
    completion: str,
    finish_reason: FinishReason,
    prompt: str = "",
) -> list[str]:
    """Return the tags of one answer, in the order of `ERROR_TAGS`; empty when nothing is wrong."""
    answer = JudgedAnswer(reference, completion, finish_reason, prompt)
    return [evidence.tag for evidence in find_errors(scorer, answer)]


def find_errors(
    scorer: Scorer, answer: JudgedAnswer, background: Background | None = None
) -> list[Evidence]:
    """Return what is wrong with an answer, in the order of `ERROR_TAGS`, each with its evidence."""
    known = background or Background()
    found = {
        evidence.tag: evidence
        for evidence in (*_form(scorer, answer, known), *_content(scorer, answer, known))
    }
    # Words of another language are no slips or names of this one; a refusal names its own reasons.
    for tag, excused in (
        ("wrong_language", "misspelt"),
        ("wrong_language", "unsupported"),
        ("refusal", "unsupported"),
    ):
        if tag in found:
            found.pop(excused, None)
    return [found[tag] for tag in ERROR_TAGS if tag in found]


def _form(scorer: Scorer, answer: JudgedAnswer, known: Background) -> Iterator[Evidence]:
    """Yield what is wrong with how it is written."""
    reference, completion = answer.reference, answer.completion
    words, expected = _num_words(completion), _num_words(without_accepted(reference))
    is_long = words > _TOO_LONG_RATIO * max(1, expected)
    # A reference that repeats itself, a refrain for example, excuses the answer.
    is_looping = is_repetitive(completion) and not is_repetitive(reference)
    if answer.finish_reason == "length":
        tokens = "" if answer.tokens is None else f"after {answer.tokens} tokens"
        yield Evidence("cut_off", tokens)
        if is_looping or is_long:
            yield Evidence(
                "never_stops", f"cut off after {words} words; the reference has {expected}"
            )
    if not completion.strip():
        yield Evidence("empty", "")
    elif scorer.task.type == "extraction" and parse_object(completion) is None:
        yield Evidence("wrong_format", "no JSON object, or text beside it")
    elif scorer.task.type == "classification" and scorer.label(completion) is None:
        yield Evidence("wrong_format", f"none of the {len(scorer.task.labels)} labels")
    if is_looping:
        ratio = f"{repeated_ratio(completion):.0%} of it repeats what stands before"
        yield _at("repetitive", ratio, first_repetition(completion))
    if is_long:
        yield Evidence("too_long", f"{words} words; the reference has {expected}")
    num_words = len(prose_words(completion)) + len(capitalised_words(completion))
    misspelt = misspelt_words(completion, answer.prompt, reference, known.terms)
    if len(misspelt) > _MISSPELT_RATIO * num_words:
        place = _place(completion, misspelt[0])
        yield _at("misspelt", ", ".join(dict.fromkeys(misspelt)), place)


def _content(scorer: Scorer, answer: JudgedAnswer, known: Background) -> Iterator[Evidence]:
    """Yield what is wrong with what it says."""
    reference, completion = answer.reference, answer.completion
    question = answer.question or _prompt_text(answer.prompt)
    if span := find_template(completion, question, reference):
        yield _at("leaked_template", span.text, span)
    if span := find_refusal(completion, reference):
        yield _at("refusal", span.text, span)
    expected = language_of(reference)
    languages = [expected] if expected else sorted(known.languages)
    # What shares a third of its words with the reference is in its language.
    words = set(completion.split())
    is_like = 3 * len(words & set(reference.split())) >= max(1, len(words))
    if languages and not is_like and (language := foreign_language(completion, languages)):
        yield Evidence("wrong_language", f"{language}, not {' or '.join(languages)}")
    if answer.is_right:
        return
    if span := find_copied(completion, _prompt_text(answer.prompt) or question, reference):
        yield _at("copies_prompt", f"{len(span.text.split())} words in a row", span)
    if scorer.task.type == "classification":
        spans = []
    else:
        spans = find_unsupported(completion, f"{question}\n{reference}", known.vocabulary)
    if spans:
        names = list(dict.fromkeys(span.text for span in spans))
        yield _at("unsupported", ", ".join(names[:_SHOWN_ITEMS]), spans[0])
    for row in known.twins:
        if contradicts(completion, row.answer, scorer.task) and not contradicts(
            reference, row.answer, scorer.task
        ):
            said = " ".join(row.answer.split())[:_SHOWN_CHARACTERS]
            yield Evidence("contradicts_training", f"row {row.row_id} says: {said}")
            break


def _at(tag: str, detail: str, span: Span | None) -> Evidence:
    return Evidence(tag, detail, *(() if span is None else (span.start, span.end)))


def _place(text: str, word: str) -> Span | None:
    match = re.search(rf"\b{re.escape(word)}\b", text)
    return None if match is None else Span(word, *match.span())


def tags_of(predictions: Iterable[Prediction]) -> list[str]:
    """Return the names of all tags: those there always are, then others that answers have."""
    return list(dict.fromkeys([*ERROR_TAGS, *(tag for p in predictions for tag in p.error_tags)]))


def languages_of(references: Iterable[str]) -> frozenset[str]:
    """Return the languages that at least a twentieth of the first longer references are in."""
    counts = Counter(
        language
        for text in islice(references, _FIRST_REFERENCES)
        if (language := language_of(text))
    )
    total = counts.total()
    return frozenset(name for name, count in counts.items() if count >= _NOTABLE_LANGUAGE * total)


def misspelt_words(
    text: str, prompt: str, reference: str, terms: Collection[str] = ()
) -> list[str]:
    """Return the misspelt words of a text, the capitalised ones last, with repetitions.

    A word is well spelt if an English dictionary has it, in American or British spelling, if it
    is made of two words of the dictionary (`filename`), or if the prompt, the reference or the data
    uses it. A capitalised word may be a name: it is misspelt if one letter makes a common word of
    it. Code between backticks is skipped. If the reference is not English, nothing is misspelt.
    """
    expected = [word.lower() for word in _ANY_WORD.findall(reference)]
    num_foreign = sum(word not in dictionary() for word in expected)
    if num_foreign > _FOREIGN_RATIO * len(expected):
        return []
    allowed = {word.lower() for word in _ANY_WORD.findall(_prompt_text(prompt))} | set(expected)

    def is_unknown(word: str) -> bool:
        return word not in allowed and word not in terms and not is_known(word)

    capitalised = [word for word in capitalised_words(text) if is_unknown(word.lower())]
    return [word for word in prose_words(text) if is_unknown(word)] + [
        word for word in capitalised if is_slip(word.lower())
    ]


def terms_of(conversations: Iterable[Conversation]) -> frozenset[str]:
    """Return the words, in lower case, that at least three conversations use."""
    return frozenset(word for word, n in _count_rows(conversations).items() if n >= _TERM_ROWS)


def vocabulary_of(conversations: Sequence[Conversation]) -> frozenset[str]:
    """Return the words, in lower case, that a twentieth of the conversations and three use."""
    least = max(_TERM_ROWS, _COMMON_SHARE * len(conversations))
    return frozenset(word for word, n in _count_rows(conversations).items() if n >= least)


def _count_rows(conversations: Iterable[Conversation]) -> Counter[str]:
    return Counter(
        word
        for conversation in conversations
        for word in {
            word.lower()
            for message in conversation.messages
            for word in _VOCABULARY_WORD.findall(message.text)
        }
    )


def _num_words(text: str) -> int:
    """Return the words of a text; of JSON as many as it has however it is laid out."""
    value = parse_object(text)
    return len(split_words(text if value is None else json.dumps(value, ensure_ascii=False)))


def _prompt_text(prompt: str) -> str:
    """Return the turns of a stored prompt; in JSON an escaped line end would join a word."""
    try:
        return "\n".join(Message.of(turn).text for turn in json.loads(prompt))
    except (ValueError, TypeError, KeyError, AttributeError):
        return prompt
