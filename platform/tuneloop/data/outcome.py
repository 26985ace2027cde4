"""What becomes of every row: gathered by `prepare`, described by the card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tuneloop.data import stages
from tuneloop.data.dedup import Duplicates
from tuneloop.data.split import Split


@dataclass
class Outcome:
    """What happened to N rows; written down by `write_card`.

    Args:
        table: Small columns of all rows in the order of `key`.
        side: Shape (N,), of `stages`.
        rank: Shape (N,), place within the side.
        stage: Shape (N,), where a removed row was removed; empty for the others.
        reason: Shape (N,), likewise.
        duplicates: Over the rows at `usable`.
        split: Over those of them that stay.
        usable: Indices of the rows that could be read and rendered and are not too long.
        seconds: Time of each stage.
    """

    table: Any
    row_ids: list[str]
    side: Any
    rank: Any
    stage: list[str]
    reason: list[str]
    duplicates: Duplicates | None = None
    split: Split | None = None
    usable: Any = None
    seconds: dict[str, float] = field(default_factory=dict)

    def remove(self, index: int, stage: str, reason: str) -> None:
        """Note that a row goes, and why."""
        self.side[index] = stages.REMOVED
        self.stage[index], self.reason[index] = stage, reason
