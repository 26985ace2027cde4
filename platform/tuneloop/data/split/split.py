"""Which rows are trained on and which are kept unseen.

Rows that belong together (a cluster of near-duplicates, the same prompt, a group of the user's)
go to one side together. Sides and order come from a hash of the seed and of what the rows say,
never from their position: adding rows later leaves the others where they were. Three things move
a few: the border of `num_test_examples`, with `stratify_by` that of each stratum (which gives its
share of rows, no more and no less), and a new row that joins others and may lead them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import DataConfig, TuneloopConfig
from tuneloop.data.dedup.minhash import Indices, connected
from tuneloop.data.schema import Reason, ReasonCode
from tuneloop.data.split.mixture import Mixture
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
        surplus: By index, why a row is on no side.
        num_groups: Units that stayed together, on each side.
    """

    train: Indices
    test: Indices
    validation: Indices
    surplus: dict[int, Reason]
    num_groups: dict[str, int]


def is_stratified(config: TuneloopConfig) -> bool:
    """Return whether each stratum has its share in test and validation; each task has."""
    return config.data.split.stratify_by is not None or bool(config.task.tasks)


def hash_rank(seed: int, name: str) -> int:
    """Return a uniform 64-bit number for a name, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def split_rows(
    row_ids: Sequence[str],
    groups: Sequence[str],
    links: Sequence[NDArray[np.int64]],
    data: DataConfig,
    strata: Sequence[str] = (),
) -> Split:
    """Return the sides of N rows, whatever `num_train_examples` is.

    Args:
        row_ids: Shape (N,), all different.
        groups: Shape (N,), the values of `split.group_by`; all empty without it.
        links: Labels, shape (N,) each; rows with an equal label stay together.
        data: `split` and `seed`.
        strata: Shape (N,), each row's task and value of `split.stratify_by`; empty if rows are
            not stratified.

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

    stratum = strata_of_units(unit, num_units, strata) if len(strata) else None
    choice = _ranks(data.seed, names, "unit\0")
    place = _unit_places(unit, _ranks(data.seed, names), choice)
    taken = _take(place, sizes, (data.split.num_test_examples, data.split.test_ratio), stratum)
    _refuse_unsplittable(count, num_units, _num_units(taken), data)
    _refuse_used_up(taken, stratum, strata, data)
    side = np.zeros(num_units, dtype=np.int8)
    surplus: dict[int, Reason] = {}
    test = _by_rank(_rows_of(taken, unit, ranks, ("test", surplus)), ranks)
    side[_all_units(taken)] = _TEST

    validation = np.zeros(0, dtype=np.int64)
    if data.split.validates:
        # A hash of its own: what is validated does not depend on how many rows are tested.
        ranks_here = _ranks(data.seed, names, "validation\0")
        place = _unit_places(unit, ranks_here, choice)
        left = np.flatnonzero(side == 0)
        asked = data.split.num_validation_examples, data.split.validation_ratio or 0.0
        here = None if stratum is None else stratum[left]
        taken = [
            replace(part, units=left[part.units])
            for part in _take(place[left], sizes[left], asked, here)
        ]
        _refuse_too_little_left(len(left), _num_units(taken), data)
        validation = _by_rank(_rows_of(taken, unit, ranks, ("validation", surplus)), ranks)
        side[_all_units(taken)] = _VALIDATION
    train = _by_rank(np.flatnonzero(side[unit] == 0), ranks)
    num_groups = np.bincount(side, minlength=3).tolist()
    return Split(train, test, validation, surplus, dict(zip(SIDES, num_groups, strict=True)))


def limit_train(
    split: Split, left_out: Indices, data: DataConfig, mixture: Mixture | None = None
) -> Split:
    """Return the split with only the first `num_train_examples` train rows, mixed as asked for.

    Args:
        split: Of all rows.
        left_out: Train rows that may not be trained on.
        data: `num_train_examples`.
        mixture: The parts of sources or tasks, if they have weights.

    Raises:
        DataError: Fewer are left than asked for, or none.
    """
    train = everyone = split.train[~np.isin(split.train, left_out)]
    surplus: dict[int, Reason] = {}
    if mixture is not None:
        train = mixture.order(everyone)
        beyond = np.setdiff1d(everyone, train).tolist()
        text = f"beyond its {mixture.what}'s part of the mixture"
        surplus = dict.fromkeys(beyond, Reason(ReasonCode.MIXTURE_SURPLUS, text, text))
    limit = data.num_train_examples
    if len(train) < (limit or 1):
        held_out = f"the test split{' and the validation split' * data.split.validates}"
        if len(left_out):
            held_out += f", and {len(left_out):,} contaminated rows"
        if mixture is not None:
            held_out += f"; {len(everyone):,} without the weights of the {mixture.what}s"
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
    text = f"not among the first {limit} of the train split"
    reason = Reason(ReasonCode.TRAIN_LIMIT, text, text)
    surplus |= {int(index): reason for index in (train[limit:] if limit else ())}
    kept = everyone[np.isin(everyone, train[:limit])]  # shuffled, as all of them are
    return replace(split, train=kept, surplus=split.surplus | surplus)


def _ranks(seed: int, names: Sequence[str], prefix: str = "") -> NDArray[np.uint64]:
    ranks = (hash_rank(seed, prefix + name) for name in names)
    return np.fromiter(ranks, np.uint64, len(names))


def _unit_places(
    unit: Indices, ranks: NDArray[np.uint64], choice: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Return each unit's place: the hash of one of its rows, uniform whatever the unit's size.

    It is the row that a second hash puts first. (The lowest of several hashes would be the lower
    the more they are, and send most large units to the test.) A row that joins n others becomes
    it in one of n + 1 cases, so most units stay where they were.

    Args:
        unit: Number of each row's unit. Shape (N,).
        ranks: A hash of each row. Shape (N,).
        choice: Another one. Shape (N,).
    """
    order = np.lexsort((choice, unit))
    starts = np.flatnonzero(np.diff(unit[order], prepend=-1))
    return ranks[order[starts]]


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


@dataclass(frozen=True)
class _Taken:
    """Units held out together.

    Args:
        units: Indices of them.
        wanted: How many rows they shall give; None: all.
        share: The most rows that one of them gives; None: all.
        is_all: Nothing of their stratum is left.
    """

    units: Indices
    wanted: int | None = None
    share: int | None = None
    is_all: bool = False


def _take(
    place: NDArray[np.uint64],
    sizes: Indices,
    asked: tuple[int | None, float],
    stratum: Indices | None,
) -> list[_Taken]:
    """Return the units to hold out, apart for each stratum.

    Args:
        place: Of `_unit_places`. Shape (U,), U units.
        sizes: Rows of each. Shape (U,).
        asked: How many rows to hold out, or else which ratio of them.
        stratum: Number of each one's stratum. Shape (U,).
    """
    wanted, ratio = asked
    if stratum is None:
        border, order, share = _border(place, sizes, wanted, ratio)
        return [_Taken(order[:border], wanted, share)]
    parts = [np.flatnonzero(stratum == number) for number in np.unique(stratum)]
    # One that hangs together as a whole cannot be on two sides.
    parts = [part for part in parts if len(part) > 1]
    num_rows = np.array([sizes[part].sum() for part in parts], dtype=np.int64)
    total = int(num_rows.sum())
    taken = []
    shares = quotas(num_rows, wanted or max(1, round(ratio * total)))
    for part, quota in zip(parts, shares, strict=True):
        if wanted is not None and quota:
            border, order, share = _border(place[part], sizes[part], quota, ratio)
            taken.append(_Taken(part[order[:border]], quota, share, border >= len(part)))
        elif quota:
            order = part[np.argsort(place[part], kind="stable")]
            missed = np.abs(np.cumsum([0, *sizes[order]]) - quota)
            border = len(part) - int(np.argmin(missed[::-1]))  # of two as near the larger
            taken.append(_Taken(order[: min(border, len(part) - 1)]))
    return taken


def quotas(num_rows: Indices, wanted: int) -> list[int]:
    """Return how many rows each stratum gives, by largest remainder, so that the sum is `wanted`.

    Args:
        num_rows: Rows of each stratum. Shape (S,).
        wanted: Rows in all, at most as many as there are.
    """
    exact = num_rows * (wanted / max(1, int(num_rows.sum())))
    floors = np.floor(exact).astype(np.int64)
    # Of equal remainders the larger stratum comes first, then the one named first.
    order = np.lexsort((np.arange(len(exact)), -num_rows, floors - exact))
    floors[order[: max(0, wanted - int(floors.sum()))]] += 1
    return floors.tolist()


def strata_of_units(unit: Indices, num_units: int, strata: Sequence[str]) -> Indices:
    """Return the number of the stratum that most rows of each unit are in. Shape (num_units,)."""
    names, number = np.unique(np.array(strata, dtype=object), return_inverse=True)
    pairs, counts = np.unique(unit * len(names) + number, return_counts=True)
    # Ascending by count, and the name that comes first last: the last one written stays.
    order = np.lexsort((-pairs, counts))
    result = np.zeros(num_units, dtype=np.int64)
    for pair in pairs[order].tolist():
        result[pair // len(names)] = pair % len(names)
    return result


def _all_units(taken: Sequence[_Taken]) -> Indices:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(part.units for part in taken)])


def _num_units(taken: Sequence[_Taken]) -> int:
    return sum(len(part.units) for part in taken)


def _rows_of(
    taken: Sequence[_Taken],
    unit: Indices,
    ranks: NDArray[np.uint64],
    told: tuple[str, dict[int, Reason]],
) -> Indices:
    """Return the rows held out; those beyond the number wanted are noted in the surplus."""
    name, surplus = told
    found = [np.zeros(0, dtype=np.int64)]
    for part in taken:
        rows = _by_rank(np.flatnonzero(np.isin(unit, part.units)), ranks)
        if part.wanted is not None and part.share is not None:
            chosen = rows[occurrence(unit[rows]) < part.share][: part.wanted]
            text = f"its group is in the {name} split, which has its {part.wanted} rows"
            reason = Reason(ReasonCode.GROUP_SURPLUS, text, text)
            surplus.update((int(index), reason) for index in np.setdiff1d(rows, chosen))
            rows = chosen
        found.append(rows)
    return np.concatenate(found)


def _refuse_used_up(
    taken: Sequence[_Taken], stratum: Indices | None, strata: Sequence[str], data: DataConfig
) -> None:
    if stratum is None or not any(part.is_all for part in taken):
        return
    names = np.unique(np.array(strata, dtype=object))
    gone = [names[stratum[part.units[0]]] for part in taken if part.is_all]
    raise DataError(
        Problem(
            "the test split would take all rows of a stratum",
            where="data.split" + ".stratify_by" * bool(data.split.stratify_by),
            got=", ".join(f"{data.split.stratify_by or 'task'} {name}" for name in gone[:5]),
            remedy="lower data.split.num_test_examples, or add rows of it",
        )
    )


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
    if num_units >= 2 and 0 < border < num_units:
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


def occurrence(labels: Indices) -> Indices:
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
