"""Advice that was given about an evaluation."""

from __future__ import annotations

import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class GivenAdvice:
    """One action that was advised.

    Args:
        evaluation: Reference with version of what it was about.
        title: What to do.
        basis: `at most`, `forecast` or `unknown`.
        gain: JSON of what it may bring: value, low and high; `null` where that is not known.
        command: What does it; empty in advice of earlier versions.
        created_at: ISO 8601, UTC.
        uid: Of evaluation and title: given again, it is kept once, as it was first.
    """

    evaluation: str
    title: str
    basis: str
    gain: str
    command: str = ""
    created_at: str = ""
    uid: str = ""

    @staticmethod
    def of(evaluation: str, title: str, basis: str, gain: str, command: str) -> GivenAdvice:
        """Return advice with its uid."""
        uid = uuid.uuid5(uuid.NAMESPACE_OID, f"{evaluation}\0{title}").hex
        return GivenAdvice(evaluation, title, basis, gain, command, uid=uid)
