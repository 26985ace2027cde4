"""Which rows are trained on and which are kept unseen.

Rows that belong together (a cluster of near-duplicates, the same prompt, a group of the user's)
go to one side together. Sides and order come from a hash of the seed and of what the rows say,
never from their position: adding rows later leaves the others where they were, up to the border
that `num_test_examples` moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import DataConfig
from tuneloop.data.dedup import Indices, connected
from tuneloop.errors import DataError, Problem

Side = Literal["train", "test", "removed"]


@dataclass(frozen=True)
class Split:
    """The outcome.

    Args:
        train: Indices of the train rows in the order in which they are written.
        test: Indices of the test rows, likewise.
        surplus: Index to reason of the rows that are on neither side.
        num_groups: Units that stayed together, on the train and on the test side.
    """

    train: Indices
    test: Indices
    surplus: dict[int, str]
    num_groups: tuple[int, int]


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
    """Return the sides of N rows.

    Args:
        row_ids: Shape (N,), all different.
        groups: Shape (N,), the values of `split.group_by`; all empty without it.
        links: Labels, shape (N,) each; rows with an equal label stay together.
        data: `split`, `num_train_examples` and `seed`.

    Raises:
        DataError: There are not enough rows, or they hang together too much to be split.
    """
    count = len(row_ids)
    ranks = np.array([hash_rank(data.seed, row_id) for row_id in row_ids], dtype=np.uint64)
    labels = list(links)
    unit_ranks = ranks
    if data.split.group_by is not None:
        labels.append(np.unique(np.array(groups, dtype=object), return_inverse=True)[1])
        by_group = {group: hash_rank(data.seed, group) for group in set(groups)}
        unit_ranks = np.array([by_group[group] for group in groups], dtype=np.uint64)
    unit = connected(count, np.concatenate([_chain(label) for label in labels]))
    num_units = int(unit.max(initial=-1)) + 1
    # A unit's place is the lowest of its members' hashes.
    place = np.full(num_units, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(place, unit, unit_ranks)
    sizes = np.bincount(unit, minlength=num_units)
    order = np.argsort(place, kind="stable")

    wanted = data.split.num_test_examples
    share = None
    if wanted is None:
        border = int(np.searchsorted(place[order], np.uint64(data.split.test_ratio * 2**64)))
        border = min(max(border, 1), num_units - 1)
    else:
        # Units larger than the whole test come last: taking one would throw away most of it.
        order = order[np.argsort(sizes[order] > wanted, kind="stable")]
        share, border = _share_of_a_unit(sizes[order], wanted)
    _refuse_unsplittable(count, num_units, border, data)
    in_test = np.zeros(num_units, dtype=bool)
    in_test[order[:border]] = True

    test = _by_rank(np.flatnonzero(in_test[unit]), ranks)
    train = _by_rank(np.flatnonzero(~in_test[unit]), ranks)
    surplus: dict[int, str] = {}
    if wanted is not None and share is not None:
        reason = f"its group is in the test split, which has its {wanted} rows"
        within = _occurrence(unit[test]) < share
        chosen = test[within][:wanted]
        surplus.update((int(index), reason) for index in np.setdiff1d(test, chosen))
        test = chosen
    limit = data.num_train_examples
    if limit is not None:
        if limit > len(train):
            raise DataError(
                Problem(
                    "not enough rows to train on",
                    where="data.num_train_examples",
                    got=f"{len(train):,} rows after the test split",
                    allowed=f"at least {limit:,}",
                    remedy="lower it, add data, or leave it out to train on all rows",
                )
            )
        reason = f"not among the first {limit} of the train split"
        surplus.update((int(index), reason) for index in train[limit:])
        train = train[:limit]
    return Split(train, test, surplus, (num_units - border, border))


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
