"""What is wrong with an answer, beyond its score: tags that say what to mend."""

from __future__ import annotations

import json
import re
from collections import Counter

from tuneloop.evals.scoring.metrics import Scorer, parse_object
from tuneloop.records import FinishReason
from tuneloop.spelling import dictionary, is_known, prose_words

ERROR_TAGS: dict[str, str] = {
    "cut_off": "stopped by the token limit, not by the model",
    "empty": "no text at all",
    "wrong_format": "not the form the task asks for",
    "repetitive": "says the same thing again and again",
    "too_long": "more than twice the reference's words",
    "misspelt": "words in no dictionary, question or reference",
}
_TOO_LONG_RATIO = 2.0

# Largest share of a text's characters in repeated n-grams, by n in words: for n of 2 to 4 in the
# most frequent n-gram, from 5 on in all that occur more than once.
# Source: Rae et al. 2021 (Gopher, arXiv:2112.11446), table A1.
_TOP_NGRAM_SHARE = {2: 0.20, 3: 0.18, 4: 0.16}
_REPEATED_NGRAM_SHARE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
# The thresholds were set on web pages. An answer is shorter, and one phrase said twice is normal
# in it, so the most frequent n-gram counts from its third occurrence.
_MIN_TOP_COUNT = 3

_ANY_WORD = re.compile(r"[^\W\d_]{3,}")
# One odd word in a long answer is a term or a name; one in twenty is bad spelling.
_MISSPELT_RATIO = 0.05
# Where the reference itself is mostly not English, an English dictionary says nothing.
_FOREIGN_RATIO = 0.4


def tag_errors(
    scorer: Scorer,
    reference: str,
    completion: str,
    finish_reason: FinishReason,
    prompt: str = "",
) -> list[str]:
    """Return the tags of one answer, in the order of `ERROR_TAGS`; empty when nothing is wrong.

    Args:
        prompt: What was asked, as predictions keep it: messages as JSON. Its words, and those
            of the reference, count as well spelt.
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
    # A reference that repeats itself (a list of like things) excuses the answer.
    if is_repetitive(completion) and not is_repetitive(reference):
        tags.add("repetitive")
    if len(completion.split()) > _TOO_LONG_RATIO * max(1, len(reference.split())):
        tags.add("too_long")
    num_words = len(prose_words(completion))
    if len(misspelt_words(completion, prompt, reference)) > _MISSPELT_RATIO * num_words:
        tags.add("misspelt")
    return [tag for tag in ERROR_TAGS if tag in tags]


def is_repetitive(text: str) -> bool:
    """Return whether repeated n-grams take a larger share of a text than Gopher allows."""
    words = text.split()
    total = sum(map(len, words))
    for size, limit in (_TOP_NGRAM_SHARE | _REPEATED_NGRAM_SHARE).items():
        ngrams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
        counts = Counter(ngrams)
        if not counts:
            break
        if size in _TOP_NGRAM_SHARE:
            top = max(counts, key=lambda ngram: (counts[ngram], sum(map(len, ngram))))
            repeated = {top} if counts[top] >= _MIN_TOP_COUNT else set()
        else:
            repeated = {ngram for ngram, count in counts.items() if count > 1}
        covered = {
            start + offset
            for start, ngram in enumerate(ngrams)
            if ngram in repeated
            for offset in range(size)
        }
        if sum(len(words[index]) for index in covered) > limit * total:
            return True
    return False


def misspelt_words(text: str, prompt: str, reference: str) -> list[str]:
    """Return the words of a text that nobody knows, in reading order, with repetitions.

    A word is known when an English dictionary has it, in American or British spelling, when it
    is made of two words of the dictionary (`filename`), or when the prompt or the reference uses
    it. Code between backticks is not looked at. Where the reference is not English, nothing is
    misspelt.
    """
    known = dictionary()
    given = [word.lower() for word in _ANY_WORD.findall(f"{_prompt_text(prompt)} {reference}")]
    expected = [word.lower() for word in _ANY_WORD.findall(reference)]
    foreign = sum(word not in known for word in expected)
    if foreign > _FOREIGN_RATIO * len(expected):
        return []
    allowed = set(given)
    return [word for word in prose_words(text) if word not in allowed and not is_known(word)]


def _prompt_text(prompt: str) -> str:
    """Return the turns of a stored prompt; in JSON an escaped line end would join a word."""
    try:
        return "\n".join(str(turn["content"]) for turn in json.loads(prompt))
    except (ValueError, TypeError, KeyError):
        return prompt
