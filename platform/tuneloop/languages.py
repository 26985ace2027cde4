"""Which language a text is in, where that is clear."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache

import regex
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from tuneloop.errors import DataError

# What is the same in every language says nothing about it. Marks are parts of letters: the vowels
# of Hindi and Thai are such.
_NEUTRAL = regex.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S+@\S+|<[^>\n]{1,200}>|\S*[_/\\{}=]\S*|"
    r"[^\p{L}\p{M}]+",
    regex.DOTALL,
)
_FEWEST_LETTERS = 40
_LARGEST_CHANCE = 0.2
_NO_LANGUAGE = "zxx"
_MOST_CHARACTERS = 2_000


def foreign_language(text: str, allowed: Sequence[str]) -> str:
    """Return the language of a text that is clearly in none of those allowed; empty otherwise.

    A text with fewer than 40 letters, code left out, is not judged. The language is clear where
    the languages allowed have at most a fifth of the probability together. Only the first 2,000
    characters are judged.

    Args:
        text: The text to judge.
        allowed: ISO 639-1 codes, all of them in `known_languages`.
    """
    if not (ranked := _ranked(text)):
        return ""
    # Near languages share the probability: what counts is that none of those allowed has it.
    possible = sum(probability for code, probability in ranked if code in allowed)
    code = str(ranked[0][0])
    return code if code != _NO_LANGUAGE and possible <= _LARGEST_CHANCE else ""


@lru_cache(maxsize=1 << 15)
def language_of(text: str) -> str:
    """Return the language that a text is clearly in, as its ISO 639-1 code; empty otherwise.

    A text with fewer than 40 letters, code left out, is not judged.
    """
    if not (ranked := _ranked(text)):
        return ""
    code, probability = ranked[0]
    is_clear = str(code) != _NO_LANGUAGE and probability >= 1 - _LARGEST_CHANCE
    return str(code) if is_clear else ""


def _ranked(text: str) -> list[tuple[str, float]]:
    """Return the languages of a text with their probabilities; none of one that is not judged."""
    words = str(_NEUTRAL.sub(" ", unicodedata.normalize("NFC", text[:_MOST_CHARACTERS])))
    is_judged = sum(map(len, words.split())) >= _FEWEST_LETTERS
    return _identifier().rank(words) if is_judged else []


def refuse_unknown_languages(codes: Sequence[str]) -> None:
    """Raise DataError for language codes that the identifier does not know."""
    if not codes:
        return
    known = known_languages()
    unknown = [code for code in codes if code not in known]
    if unknown:
        raise DataError.of(
            "unknown language code",
            where="data.filters.languages",
            got=", ".join(unknown),
            allowed=", ".join(sorted(known)),
        )


def known_languages() -> frozenset[str]:
    """Return the ISO 639-1 codes of the languages that the identifier knows."""
    return frozenset(str(code) for code in _identifier().labels) - {_NO_LANGUAGE}


@cache
def _identifier() -> LanguageIdentifier:
    """Return the identifier, loaded once per process in half a second."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
