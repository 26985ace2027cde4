"""What becomes of every row: gathered by `prepare`, described by the card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tuneloop.data.dedup.minhash import Duplicates
from tuneloop.data.hashing.columns import Indices
from tuneloop.data.schema import Reason, Side, Stage
from tuneloop.data.split.split import Split
from tuneloop.errors import Problem
from tuneloop.models.chat.tokenizer_backends import BackendChoice

if TYPE_CHECKING:
    from tuneloop.data.card.composition import FilterEffects, Wording
    from tuneloop.data.decontamination.decontaminate import Contamination
    from tuneloop.data.dedup.conflicts import Conflicts
    from tuneloop.data.fixes import Fixes
    from tuneloop.data.synthetic_rows import SyntheticRows


class Removal(NamedTuple):
    """Where and why a row was removed.

    Args:
        kept_row_id: Row that it repeats, if that is one of the dataset.
        similarity: To what it repeats, 0 to 1; None if it was removed for something else.
    """

    stage: Stage
    reason: Reason
    kept_row_id: str | None = None
    similarity: float | None = None


@dataclass
class Ledger:
    """What happened to N rows.

    Args:
        table: Small columns of all rows in the order of `key`.
        source: Shape (N,), index in `data.sources`.
        task_ids: Shape (N,), position of the task in `task.tasks`; zeros without a mixture.
        row_ids: Shape (N,), all different.
        side: Shape (N,), the number of a `Side`.
        rank: Shape (N,), place within the side.
        removals: By index, of the rows that were removed.
        usable: Indices of the rows that could be read and rendered and are not too long.
        unit_ids: Shape (N,), equal for rows that stay on one side together.
        duplicates: Over the rows at `usable`.
        passages: Shape (N,), equal for rows that quote the same passage; None for documents.
        split: Over all rows; those on no side have been removed.
        contamination: Train rows that repeated what is held out.
        conflicts: Rows with the same prompt and different answers; None for documents.
        fixes: What became of people's marks; None before they are applied.
        wording: How varied the train rows are.
        synthetic: How synthetic train rows differ from people's; None without both.
        filtered: What the filters changed and dropped.
        notices: What is unusual in the files and the user's own columns.
        seconds: Time of each step.
        backend: What encoded the rows.
    """

    table: pa.Table
    source: Indices
    task_ids: Indices
    row_ids: pa.StringArray
    side: Indices
    rank: Indices
    removals: dict[int, Removal] = field(default_factory=dict)
    usable: Indices = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    unit_ids: pa.StringArray | None = None
    duplicates: Duplicates | None = None
    passages: Indices | None = None
    split: Split | None = None
    contamination: Contamination | None = None
    conflicts: Conflicts | None = None
    fixes: Fixes | None = None
    wording: Wording | None = None
    synthetic: SyntheticRows | None = None
    filtered: FilterEffects | None = None
    notices: list[Problem] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    backend: BackendChoice | None = None

    def remove(self, index: int, removal: Removal) -> None:
        """Note that a row goes, why, and which row it repeats."""
        self.side[index] = Side.REMOVED
        self.removals[index] = removal

    def forget_bands(self) -> None:
        """Drop the bands, the largest columns, once no rows are compared any more."""
        names = self.table.column_names
        self.table = self.table.select([name for name in names if not name.endswith("bands")])

    def removed_by(self, stage: Stage) -> Indices:
        """Return the indices of the rows that a stage removed, ascending."""
        found = (index for index, removal in self.removals.items() if removal.stage is stage)
        return np.sort(np.fromiter(found, np.int64))

    def is_on(self, side: Side) -> NDArray[np.bool_]:
        """Return which rows are on a side. Shape (N,)."""
        return self.side == side
