"""What is wrong with an answer, beyond its score: tags that say what to fix."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable

from tuneloop.evals.scoring.metrics import Scorer, parse_object
from tuneloop.records import Conversation, FinishReason, Message
from tuneloop.repetition import is_repetitive
from tuneloop.spelling import capitalised_words, dictionary, is_known, is_slip, prose_words
from tuneloop.words import split_words

ERROR_TAGS: dict[str, str] = {
    "cut_off": "stopped by the token limit, not by the model",
    "empty": "no text at all",
    "wrong_format": "not the form the task asks for",
    "repetitive": "repeats phrases it has used before",
    "too_long": "more than twice the reference's words",
    "misspelt": "words in no dictionary, question, reference or training data",
}
_TOO_LONG_RATIO = 2.0
_ANY_WORD = re.compile(r"[^\W\d_]{3,}")
# One odd word in a long answer is a term or a name; one in twenty is bad spelling.
_MISSPELT_RATIO = 0.05
# A word that so many training rows use is a term of the data, not a slip in one of them.
_TERM_ROWS = 3
# Where the reference itself is mostly not English, an English dictionary says nothing.
_FOREIGN_RATIO = 0.4


def tag_errors(
    scorer: Scorer,
    reference: str,
    completion: str,
    finish_reason: FinishReason,
    prompt: str = "",
    terms: Collection[str] = (),
) -> list[str]:
    """Return the tags of one answer, in the order of `ERROR_TAGS`; empty when nothing is wrong.

    Args:
        prompt: What was asked, as predictions keep it: messages as JSON. Its words, and those
            of the reference, count as well spelt.
        terms: Words that the data uses, in lower case: they count as well spelt too.
    """
    tags = set()
    if finish_reason == "length":
        tags.add("cut_off")
    if not completion.strip():
        tags.add("empty")
    elif (scorer.task.type == "extraction" and parse_object(completion) is None) or (
        scorer.task.type == "classification" and scorer.label(completion) is None
    ):
        tags.add("wrong_format")
    # A reference that repeats itself, a refrain for example, excuses the answer.
    if is_repetitive(completion) and not is_repetitive(reference):
        tags.add("repetitive")
    if _num_words(completion) > _TOO_LONG_RATIO * max(1, _num_words(reference)):
        tags.add("too_long")
    num_words = len(prose_words(completion)) + len(capitalised_words(completion))
    if len(misspelt_words(completion, prompt, reference, terms)) > _MISSPELT_RATIO * num_words:
        tags.add("misspelt")
    return [tag for tag in ERROR_TAGS if tag in tags]


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
    counts = Counter(
        word
        for conversation in conversations
        for word in {
            word.lower()
            for message in conversation.messages
            for word in _ANY_WORD.findall(message.text)
        }
    )
    return frozenset(word for word, count in counts.items() if count >= _TERM_ROWS)


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
