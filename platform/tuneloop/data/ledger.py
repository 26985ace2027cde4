"""What becomes of every row: gathered by `prepare`, described by the card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuneloop.data import ray_rows
from tuneloop.data.dedup.minhash import Duplicates
from tuneloop.data.split.split import Split
from tuneloop.models.chat.tokenizer_backends import BackendChoice

if TYPE_CHECKING:
    from tuneloop.data.decontamination.decontaminate import Contamination


@dataclass
class Outcome:
    """What happened to N rows; written down by `write_card`.

    Args:
        table: Small columns of all rows in the order of `key`.
        source: Shape (N,), index in `data.sources`.
        kinds: Shape (N,), place of the task in `task.tasks`; zeros without a mixture.
        row_ids: Arrow array of strings, shape (N,), all different.
        side: Shape (N,), of `ray_rows`.
        rank: Shape (N,), place within the side.
        stage: Shape (N,), where a removed row was removed; empty for the others.
        reason: Shape (N,), likewise.
        twin: By index, id of and similarity to the row that a removed one repeats.
        duplicates: Over the rows at `usable`.
        split: Over all rows; those on no side have been removed.
        contamination: Train rows that repeated what is held out.
        conflicts: Of `find_conflicts`; empty for documents.
        wording: Of `describe_wording`, over the train rows.
        filtered: `changes`, in how many rows which, and `examples` of dropped rows.
        usable: Indices of the rows that could be read and rendered and are not too long.
        seconds: Time of each stage.
        engine: What encoded the rows.
    """

    table: Any
    source: Any
    kinds: Any
    row_ids: Any
    side: Any
    rank: Any
    stage: list[str]
    reason: list[str]
    twin: dict[int, tuple[str | None, float]] = field(default_factory=dict)
    duplicates: Duplicates | None = None
    split: Split | None = None
    contamination: Contamination | None = None
    conflicts: dict[str, Any] = field(default_factory=dict)
    wording: dict[str, Any] = field(default_factory=dict)
    filtered: dict[str, Any] = field(default_factory=dict)
    usable: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    engine: BackendChoice | None = None

    def remove(
        self,
        index: int,
        stage: str,
        reason: str,
        kept_row_id: str | None = None,
        similarity: float | None = None,
    ) -> None:
        """Note that a row goes, why, and which row it repeats."""
        self.side[index] = ray_rows.REMOVED
        self.stage[index], self.reason[index] = stage, reason
        if similarity is not None:
            self.twin[index] = kept_row_id, similarity
