"""Texts and durations as they fit a line, and what of a text counts."""

from __future__ import annotations

import unicodedata

# Separators, control characters, and marks without width such as the zero-width space.
_INVISIBLE = frozenset(("Zs", "Zl", "Zp", "Cc", "Cf"))

# Letters that searches in any case take for others: upper case does not tell them apart.
ALIKE_IN_SEARCHES = (("ß", "ss"), ("ς", "σ"))


def shorten(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters; an ellipsis stands for what was cut off."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def format_duration(seconds: float) -> str:
    """Return a duration as text: `48 s`, `3 min 05 s`, `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def folded(text: str) -> str:
    """Return a text without regard to case and white space: equal texts say the same."""
    return " ".join(text.casefold().split())


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing, such as `str.strip` leaves of a zero-width space."""
    return all(unicodedata.category(character) in _INVISIBLE for character in text)
