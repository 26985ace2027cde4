"""Which rows are trained on and which are kept unseen.

Rows that belong together (a cluster of near-duplicates, the same prompt, a group of the user's)
go to one side together. Sides and order come from a hash of the seed and of what the rows say,
never from their position: adding rows later leaves the others where they were, up to the border
that `num_test_examples` moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import DataConfig
from tuneloop.data.dedup import Indices, connected
from tuneloop.errors import DataError, Problem

SIDES = ("train", "test", "validation")
_TEST, _VALIDATION = 1, 2


@dataclass(frozen=True)
class Split:
    """The outcome.

    Args:
        train: Indices of the train rows in the order in which they are written.
        test: Indices of the test rows, likewise.
        validation: Indices of the validation rows, likewise; empty unless asked for.
        surplus: Index to reason of the rows that are on no side.
        num_groups: Units that stayed together, on each side.
    """

    train: Indices
    test: Indices
    validation: Indices
    surplus: dict[int, str]
    num_groups: dict[str, int]


def hash_rank(seed: int, name: str) -> int:
    """Return a uniform 64-bit number for a name, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def split_rows(
    row_ids: Sequence[str],
    groups: Sequence[str],
    links: Sequence[NDArray[np.int64]],
    data: DataConfig,
) -> Split:
    """Return the sides of N rows, whatever `num_train_examples` is.

    Args:
        row_ids: Shape (N,), all different.
        groups: Shape (N,), the values of `split.group_by`; all empty without it.
        links: Labels, shape (N,) each; rows with an equal label stay together.
        data: `split` and `seed`.

    Raises:
        DataError: There are not enough rows, or they hang together too much to be split.
    """
    count = len(row_ids)
    ranks = _ranks(data.seed, row_ids)
    labels = list(links)
    names = row_ids
    if data.split.group_by is not None:
        labels.append(np.unique(np.array(groups, dtype=object), return_inverse=True)[1])
        names = groups
    unit = connected(count, np.concatenate([_chain(label) for label in labels]))
    num_units = int(unit.max(initial=-1)) + 1
    sizes = np.bincount(unit, minlength=num_units)

    wanted = data.split.num_test_examples
    place = _unit_places(unit, num_units, _ranks(data.seed, names), data.seed)
    border, order, share = _border(place, sizes, wanted, data.split.test_ratio)
    _refuse_unsplittable(count, num_units, border, data)
    side = np.zeros(num_units, dtype=np.int8)
    side[order[:border]] = _TEST
    surplus: dict[int, str] = {}
    test = _by_rank(np.flatnonzero(side[unit] == _TEST), ranks)
    test = _at_most(test, unit, wanted, share, ("test", surplus))

    validation = np.zeros(0, dtype=np.int64)
    if data.split.validates:
        wanted = data.split.num_validation_examples
        # A hash of its own: what is validated does not depend on how many rows are tested.
        ranks_here = _ranks(data.seed, names, "validation\0")
        place = _unit_places(unit, num_units, ranks_here, data.seed)
        left = np.flatnonzero(side == 0)
        border, order, share = _border(
            place[left], sizes[left], wanted, data.split.validation_ratio or 0.0
        )
        _refuse_too_little_left(len(left), border, data)
        side[left[order[:border]]] = _VALIDATION
        validation = _by_rank(np.flatnonzero(side[unit] == _VALIDATION), ranks)
        validation = _at_most(validation, unit, wanted, share, ("validation", surplus))
    train = _by_rank(np.flatnonzero(side[unit] == 0), ranks)
    num_groups = np.bincount(side, minlength=3).tolist()
    return Split(train, test, validation, surplus, dict(zip(SIDES, num_groups, strict=True)))


def limit_train(split: Split, left_out: Indices, data: DataConfig) -> Split:
    """Return the split with only the first `num_train_examples` train rows.

    Args:
        split: Of all rows.
        left_out: Train rows that may not be trained on.
        data: `num_train_examples`.

    Raises:
        DataError: Fewer are left than asked for, or none.
    """
    train = split.train[~np.isin(split.train, left_out)]
    limit = data.num_train_examples
    if len(train) < (limit or 1):
        held_out = f"the test split{' and the validation split' * data.split.validates}"
        if len(left_out):
            held_out += f", and {len(left_out):,} contaminated rows"
        raise DataError(
            Problem(
                "not enough rows to train on",
                where="data.num_train_examples" if limit else "data",
                got=f"{len(train):,} rows after {held_out}",
                allowed=f"at least {limit or 1:,}",
                remedy="lower it, add data, or leave it out to train on all rows"
                if limit
                else "add data, or check data.decontamination",
            )
        )
    reason = f"not among the first {limit} of the train split"
    surplus = {int(index): reason for index in (train[limit:] if limit else ())}
    return replace(split, train=train[:limit], surplus=split.surplus | surplus)


def _ranks(seed: int, names: Sequence[str], prefix: str = "") -> NDArray[np.uint64]:
    by_name = {name: hash_rank(seed, prefix + name) for name in set(names)}
    return np.array([by_name[name] for name in names], dtype=np.uint64)


def _unit_places(
    unit: Indices, num_units: int, ranks: NDArray[np.uint64], seed: int
) -> NDArray[np.uint64]:
    """Return each unit's place, uniform whatever its size.

    A lone row stands at its own hash. The lowest hash of several is the lower the more they are,
    and would send most large units to the test; so it is hashed once more.
    """
    lowest = np.full(num_units, np.iinfo(np.uint64).max, dtype=np.uint64)
    highest = np.zeros(num_units, dtype=np.uint64)
    np.minimum.at(lowest, unit, ranks)
    np.maximum.at(highest, unit, ranks)
    for index in np.flatnonzero(lowest != highest).tolist():
        lowest[index] = hash_rank(seed, f"unit {lowest[index]}")
    return lowest


def _border(
    place: NDArray[np.uint64], sizes: Indices, wanted: int | None, ratio: float
) -> tuple[int, Indices, int | None]:
    """Return how many units are held out, the order they are in, and each one's largest share."""
    order = np.argsort(place, kind="stable")
    if wanted is None:
        border = int(np.searchsorted(place[order], np.uint64(ratio * 2**64)))
        return min(max(border, 1), len(order) - 1), order, None
    # Units larger than all that is wanted come last: taking one would throw away most of it.
    order = order[np.argsort(sizes[order] > wanted, kind="stable")]
    share, border = _share_of_a_unit(sizes[order], wanted)
    return border, order, share


def _at_most(
    rows: Indices,
    unit: Indices,
    wanted: int | None,
    share: int | None,
    told: tuple[str, dict[int, str]],
) -> Indices:
    """Return the rows held out; those beyond the number wanted are noted in the surplus."""
    if wanted is None or share is None:
        return rows
    name, surplus = told
    chosen = rows[_occurrence(unit[rows]) < share][:wanted]
    reason = f"its group is in the {name} split, which has its {wanted} rows"
    surplus.update((int(index), reason) for index in np.setdiff1d(rows, chosen))
    return chosen


def _refuse_too_little_left(num_units: int, border: int, data: DataConfig) -> None:
    if num_units >= 2 and border < num_units:
        return
    by_number = data.split.num_validation_examples is not None
    raise DataError(
        Problem(
            "not enough rows for the validation split",
            where="data.split.num_validation_examples"
            if by_number
            else "data.split.validation_ratio",
            got=f"{num_units:,} groups that stay together after the test split",
            allowed="enough for validation, and one more to train on",
            remedy="lower it, or add data",
        )
    )


def _refuse_unsplittable(count: int, num_units: int, border: int, data: DataConfig) -> None:
    if num_units >= 2 and border < num_units:
        return
    wanted = data.split.num_test_examples
    if wanted is not None and wanted >= count:
        raise DataError(
            Problem(
                "not enough rows for the test split",
                where="data.split.num_test_examples",
                got=f"{count:,} rows in all",
                allowed=f"more than {wanted:,}, so that some are left to train on",
                remedy="lower it, or add data",
            )
        )
    grouped = data.split.group_by is not None
    raise DataError(
        Problem(
            "the rows cannot be split",
            where="data.split.group_by" if grouped else "data.split",
            got=f"{count:,} rows in {num_units:,} groups that stay together",
            allowed="enough groups for both sides",
            remedy="group by another column, or keep fewer test rows"
            if grouped
            else "add rows that differ from each other",
        )
    )


def _share_of_a_unit(sizes: Indices, wanted: int) -> tuple[int, int]:
    """Return the most test rows that one unit gives, and how many units the test takes.

    Few large groups make a poor test: its rows resemble each other. So each gives at most a
    twentieth of the test. Its other rows are lost, for training on them would leak; where that
    would cost more than a tenth of all rows beyond what cannot be avoided, units give more.

    Args:
        sizes: Rows of each unit in the order in which the test takes them.
        wanted: Rows in the test.
    """

    def border_for(share: int) -> int:
        return int(np.searchsorted(np.cumsum(np.minimum(sizes, share)), wanted)) + 1

    unavoidable = int(sizes[: border_for(wanted)].sum())
    affordable = max(2 * wanted, unavoidable + int(sizes.sum()) // 10)
    for fraction in (20, 10, 5, 2):
        share = -(-wanted // fraction)
        border = border_for(share)
        if border < len(sizes) and sizes[:border].sum() <= affordable:
            return share, border
    return wanted, border_for(wanted)


def _occurrence(labels: Indices) -> Indices:
    """Return how many equal labels come before each one."""
    order = np.argsort(labels, kind="stable")
    values = labels[order]
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
    counts = np.diff(np.concatenate([starts, [len(values)]]))
    result = np.empty(len(labels), dtype=np.int64)
    result[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return result


def _by_rank(indices: Indices, ranks: NDArray[np.uint64]) -> Indices:
    return indices[np.argsort(ranks[indices], kind="stable")]


def _chain(labels: NDArray[np.int64]) -> Indices:
    """Return edges that link all rows with an equal label, shape (E, 2)."""
    order = np.argsort(labels, kind="stable")
    same = labels[order][1:] == labels[order][:-1]
    return np.stack([order[:-1][same], order[1:][same]], axis=1)
