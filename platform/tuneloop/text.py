"""Texts and durations cut to a length that fits a line."""

from __future__ import annotations


def shorten(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters; an ellipsis stands for what was cut off."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def format_duration(seconds: float) -> str:
    """Return a duration as text: `48 s`, `3 min 05 s`, `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
