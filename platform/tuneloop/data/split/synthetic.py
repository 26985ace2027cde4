"""Where rows that a model wrote go: people's rows are split as if those were not there.

Models are tested on people's rows only, and generated rows move none of them: a test score before
and after rows were generated is of the same rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tuneloop.data.hashing.columns import Hashes, Indices
from tuneloop.data.schema import Reason, ReasonCode
from tuneloop.errors import DataError, Problem
from tuneloop.text import counted

if TYPE_CHECKING:
    from tuneloop.data.split.split import Split

_OF_HELD_OUT = "synthetic, and belongs with a row that is held out"
_BEYOND = "synthetic, beyond data.max_synthetic_ratio"
SURPLUS = Reason(ReasonCode.SYNTHETIC_SURPLUS, _BEYOND, _BEYOND)


def no_people_problem(num_rows: int) -> Problem:
    """Return what is wrong where a model wrote all rows."""
    return Problem(
        "no row was written by people: there is nothing to test on",
        where="data.sources",
        got=f"{counted(num_rows, 'row')}, all with `synthetic: true`",
        remedy="add rows that people wrote or corrected; rows without a true `synthetic` column "
        "count as such",
    )


def refuse_without_people(is_synthetic: NDArray[np.bool_]) -> None:
    """Raise DataError where no row was written by people, so that there is nothing to test on."""
    if len(is_synthetic) and is_synthetic.all():
        raise DataError(no_people_problem(len(is_synthetic)))


def add_synthetic(
    split: Split,
    is_synthetic: NDArray[np.bool_],
    bonds: Mapping[str, Sequence[object] | NDArray[np.int64]],
    ranks: Hashes,
) -> Split:
    """Return the split of all N rows: synthetic ones are trained on, or on no side.

    Args:
        split: Of people's rows alone, with their numbers among people's rows.
        is_synthetic: Shape (N,).
        bonds: Labels, shape (N,) each; a synthetic row that has one of a held-out row is left out.
        ranks: A hash of each row, by which train rows are ordered. Shape (N,).
    """
    people, synthetic = np.flatnonzero(~is_synthetic), np.flatnonzero(is_synthetic)
    # All rows of a unit that is held out count, those that are in no split too.
    held_out = np.concatenate([split.test, split.validation, [*split.surplus]]).astype(np.int64)
    held_out = people[np.isin(split.unit, split.unit[held_out])]
    reason = Reason(ReasonCode.MADE_OF_HELD_OUT, _OF_HELD_OUT, _OF_HELD_OUT)
    surplus = {int(people[index]): why for index, why in split.surplus.items()}
    for labels in bonds.values():
        known = {labels[index] for index in held_out.tolist()}
        surplus |= {index: reason for index in synthetic.tolist() if labels[index] in known}
    kept = synthetic[~np.isin(synthetic, [*surplus])]
    train = np.concatenate([people[split.train], kept])
    unit = np.empty(len(is_synthetic), dtype=np.int64)
    unit[people] = split.unit
    unit[synthetic] = np.arange(len(synthetic)) + int(split.unit.max(initial=-1)) + 1
    return replace(
        split,
        train=train[np.argsort(ranks[train], kind="stable")],
        test=people[split.test],
        validation=people[split.validation],
        surplus=surplus,
        num_groups=split.num_groups | {"train": split.num_groups["train"] + len(kept)},
        unit=unit,
    )


def cap_synthetic(train: Indices, is_synthetic: NDArray[np.bool_], max_ratio: float) -> Indices:
    """Return train rows in an order of which no prefix has too large a share of synthetic ones.

    Synthetic rows wait until enough of people's are before them; those that wait in the end are
    left out. So a smaller subset is contained in a larger one, and keeps the share too.

    Args:
        train: Indices of train rows, in order.
        is_synthetic: Of all rows. Shape (N,).
        max_ratio: Largest share of synthetic rows, 0 to 1.
    """
    if max_ratio >= 1 or not is_synthetic[train].any():
        return train
    order: list[int] = []
    waiting: deque[int] = deque()
    num_synthetic = 0
    for index in train.tolist():
        if is_synthetic[index]:
            waiting.append(index)
        else:
            order.append(index)
        # A share such as 0.8 has no exact double: four of five rows are not too many.
        while waiting and num_synthetic + 1 <= max_ratio * (len(order) + 1) + 1e-9:
            order.append(waiting.popleft())
            num_synthetic += 1
    return np.array(order, dtype=np.int64)
