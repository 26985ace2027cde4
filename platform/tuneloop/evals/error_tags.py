"""What is wrong with an answer, beyond its score: tags that say what to mend."""

from __future__ import annotations

from collections import Counter

from tuneloop.evals.metrics import Scorer, parse_object
from tuneloop.records import FinishReason

ERROR_TAGS: dict[str, str] = {
    "cut_off": "stopped by the token limit, not by the model",
    "empty": "no text at all",
    "wrong_format": "not the form the task asks for",
    "repetitive": "says the same thing again and again",
    "too_long": "more than twice the reference's words",
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


def tag_errors(
    scorer: Scorer, reference: str, completion: str, finish_reason: FinishReason
) -> list[str]:
    """Return the tags of one answer, in the order of `ERROR_TAGS`; empty when nothing is wrong."""
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
