"""Which rows are trained on and which are kept unseen.

Rows that belong together (a cluster of near-duplicates, the same prompt or passage, a group of the
user's) are a unit, which goes to one side as a whole. Sides and order come from a hash of the seed
and of the rows' contents, never from their position: adding rows later leaves most of the others
where they were. Two things move a few: the border of what is asked for (a number or share of the
rows, of each stratum with `stratify_by`, no more and no less than units allow), and a new row that
joins a unit and may lead it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import DataConfig, TuneloopConfig
from tuneloop.data.dedup.minhash import connected
from tuneloop.data.hashing.columns import Hashes, Indices
from tuneloop.data.schema import Reason, ReasonCode
from tuneloop.data.split.mixture import Mixture
from tuneloop.data.split.synthetic import SURPLUS, cap_synthetic
from tuneloop.errors import DataError, Problem
from tuneloop.records import TRAIN_LIMIT
from tuneloop.text import counted

SIDES = ("train", "test", "validation")
# What keeps rows together, as an error says it, and what helps.
NEAR_DUPLICATES, SAME_PROMPT = "are near-duplicates", "have the same prompt"
SAME_PASSAGE, SAME_ANSWER = "quote the same passage", "have the same long answer"
_REMEDIES = {
    NEAR_DUPLICATES: "add rows that differ from each other, or raise data.dedup.threshold",
    SAME_PASSAGE: "add rows about other texts: a test on a text that is trained on is none",
    SAME_ANSWER: "add rows with other answers: a test on an answer that is trained on is none",
    SAME_PROMPT: "add rows with other prompts; what tells these apart has to be in the prompt",
}
_TEST, _VALIDATION = 1, 2


@dataclass(frozen=True)
class Split:
    """The sides of all rows.

    Args:
        train: Indices of the train rows in the order in which they are written.
        test: Indices of the test rows, likewise.
        validation: Indices of the validation rows, likewise; empty unless asked for.
        surplus: By index, why a row is on no side.
        num_groups: Number of units on each side.
        unit: Number of each row's unit. Shape (N,).
    """

    train: Indices
    test: Indices
    validation: Indices
    surplus: dict[int, Reason]
    num_groups: dict[str, int]
    unit: Indices


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
    links: Mapping[str, NDArray[np.int64]],
    data: DataConfig,
    strata: Sequence[str] = (),
    places: Sequence[str] = (),
) -> Split:
    """Return the sides of N rows, whatever `num_train_examples` is.

    Args:
        row_ids: Ids of the rows, all different. Shape (N,).
        groups: Values of `split.group_by`; all empty without it. Shape (N,).
        links: Labels, shape (N,) each, by what an error calls rows with an equal one; they stay
            together.
        data: `split` and `seed`.
        strata: Task and value of `split.stratify_by` of each row, shape (N,); empty if rows are
            not stratified.
        places: File and line of each row, for an error. Shape (N,).

    Raises:
        DataError: There are not enough rows, or too many of them stay together.
    """
    count = len(row_ids)
    ranks = rank_rows(data.seed, row_ids)
    bonds = dict(links)
    names = row_ids
    if data.split.group_by is not None:
        group = np.unique(np.array(groups, dtype=object), return_inverse=True)[1]
        bonds[f"have the same `{data.split.group_by}`"] = group
        names = groups
    edges = [np.zeros((0, 2), dtype=np.int64), *(_chain(label) for label in bonds.values())]
    unit = connected(count, np.concatenate(edges))
    num_units = int(unit.max(initial=-1)) + 1
    sizes = np.bincount(unit, minlength=num_units)

    stratum = strata_of_units(unit, num_units, strata) if len(strata) else None
    choice = rank_rows(data.seed, names, "unit\0")
    place = _unit_places(unit, rank_rows(data.seed, names), choice)
    target = _Target(data.split.num_test_examples, data.split.test_ratio)
    chosen = _choose_units(place, sizes, target, stratum)
    if num_units < 2 or not 0 < _num_units(chosen) < num_units:
        raise DataError(_unsplittable_problem(unit, bonds, data, places or row_ids))
    _refuse_used_up(chosen, stratum, strata, data)
    side = np.zeros(num_units, dtype=np.int8)
    test = _held_out_rows("test", chosen, unit, ranks)
    side[_all_units(chosen)] = _TEST

    validation = _HeldOutRows(np.zeros(0, dtype=np.int64), {})
    if data.split.validates:
        # A hash of its own: what is validated does not depend on how many rows are tested.
        place = _unit_places(unit, rank_rows(data.seed, names, "validation\0"), choice)
        left = np.flatnonzero(side == 0)
        target = _Target(data.split.num_validation_examples, data.split.validation_ratio or 0.0)
        stratum_left = None if stratum is None else stratum[left]
        chosen = [
            replace(units, units=left[units.units])
            for units in _choose_units(place[left], sizes[left], target, stratum_left)
        ]
        _refuse_too_little_left(len(left), _num_units(chosen), data)
        validation = _held_out_rows("validation", chosen, unit, ranks)
        side[_all_units(chosen)] = _VALIDATION
    train = _by_rank(np.flatnonzero(side[unit] == 0), ranks)
    num_groups = dict(zip(SIDES, np.bincount(side, minlength=3).tolist(), strict=True))
    surplus = test.surplus | validation.surplus
    return Split(train, test.rows, validation.rows, surplus, num_groups, unit)


def limit_train(
    split: Split,
    left_out: Indices,
    data: DataConfig,
    mixture: Mixture | None = None,
    other_task: Indices | None = None,
    is_synthetic: NDArray[np.bool_] | None = None,
) -> Split:
    """Return the split with only the first `num_train_examples` train rows, in their mixture.

    Of these only the rows of `train_tasks` stay: a task is trained on the same rows alone and
    beside the others.

    Args:
        split: The sides of all rows.
        left_out: Indices of train rows that may not be trained on.
        data: `num_train_examples` and `max_synthetic_ratio`.
        mixture: Weights of sources or tasks, if they have any.
        other_task: Indices of the rows of tasks that are not trained on.
        is_synthetic: Which of all rows a model wrote; None: none. Shape (N,).

    Raises:
        DataError: Fewer rows are left than `num_train_examples`, or none.
    """
    train = everyone = split.train[~np.isin(split.train, left_out)]
    surplus: dict[int, Reason] = {}
    if mixture is not None:
        train = mixture.order(everyone)
        beyond = np.setdiff1d(everyone, train).tolist()
        text = f"beyond its {mixture.what}'s part of the mixture"
        surplus = dict.fromkeys(beyond, Reason(ReasonCode.MIXTURE_SURPLUS, text, text))
    num_mixed = len(train)
    if is_synthetic is not None:
        mixed, train = train, cap_synthetic(train, is_synthetic, data.max_synthetic_ratio)
        surplus |= dict.fromkeys(np.setdiff1d(mixed, train).tolist(), SURPLUS)
    limit = data.num_train_examples
    if len(train) < (limit or 1):
        held_out = f"the test split{' and the validation split' * data.split.validates}"
        if len(left_out):
            held_out += f", and {len(left_out):,} contaminated rows"
        if mixture is not None:
            held_out += f"; {len(everyone):,} without the weights of the {mixture.what}s"
        if len(train) < num_mixed:
            held_out += f"; {num_mixed:,} without data.max_synthetic_ratio"
        raise DataError.of(
            "not enough rows to train on",
            where="data.num_train_examples" if limit else "data",
            got=f"{counted(len(train), 'row')} after {held_out}",
            allowed=f"at least {limit or 1:,}",
            remedy="lower it, add data, or leave it out to train on all rows"
            if limit
            else "add data, or check data.decontamination",
        )
    text = f"{TRAIN_LIMIT} {limit} of the train split"
    reason = Reason(ReasonCode.TRAIN_LIMIT, text, text)
    surplus |= {int(index): reason for index in (train[limit:] if limit else ())}
    kept = everyone[np.isin(everyone, train[:limit])]  # shuffled, as all of them are
    if other_task is not None:
        text = "of a task that is not in data.train_tasks"
        other = np.isin(kept, other_task)
        reason = Reason(ReasonCode.OTHER_TASK, text, text)
        surplus |= {int(index): reason for index in kept[other]}
        kept = kept[~other]
        if not len(kept):
            raise DataError.of(
                "the tasks that are trained on have no train row",
                where="data.train_tasks",
                got=f"{len(other):,} train rows, all of other tasks",
                remedy="raise data.num_train_examples, or name other tasks",
            )
    return replace(split, train=kept, surplus=split.surplus | surplus)


def rank_rows(seed: int, names: Sequence[str], prefix: str = "") -> Hashes:
    """Return a uniform 64-bit number for each name. Shape (N,)."""
    ranks = (hash_rank(seed, prefix + name) for name in names)
    return np.fromiter(ranks, np.uint64, len(names))


def _unit_places(unit: Indices, ranks: Hashes, choice: Hashes) -> Hashes:
    """Return each unit's place: the hash of one of its rows, uniform whatever the unit's size.

    It is the row that a second hash puts first. (The lowest of several hashes would be the lower
    the more they are, and send most large units to the test.) A row that joins n others becomes
    it in one of n + 1 cases, so most units stay where they were.

    Args:
        unit: Number of each row's unit. Shape (N,).
        ranks: A hash of each row. Shape (N,).
        choice: Another hash of each row. Shape (N,).
    """
    order = np.lexsort((choice, unit))
    starts = np.flatnonzero(np.diff(unit[order], prepend=-1))
    return ranks[order[starts]]


class _Target(NamedTuple):
    """How much to hold out: so many rows, or else so large a share of them."""

    num_rows: int | None
    ratio: float


@dataclass(frozen=True)
class _HeldOutUnits:
    """Units held out together: all of them, or those of a stratum.

    Args:
        units: Their numbers.
        num_rows: How many rows they shall give; None: all.
        most_of_one: The most rows that one unit gives; None: all.
        is_all: Nothing of their stratum is left.
    """

    units: Indices
    num_rows: int | None = None
    most_of_one: int | None = None
    is_all: bool = False


class _HeldOutRows(NamedTuple):
    """Rows of a side, in order, and why other rows of their units are on no side."""

    rows: Indices
    surplus: dict[int, Reason]


def _choose_units(
    place: Hashes, sizes: Indices, target: _Target, stratum: Indices | None
) -> list[_HeldOutUnits]:
    """Return the units to hold out, apart for each stratum.

    Args:
        place: Result of `_unit_places`. Shape (U,), U units.
        sizes: Rows of each unit. Shape (U,).
        target: How much to hold out.
        stratum: Number of each unit's stratum, if they are stratified. Shape (U,).
    """
    if stratum is None:
        if target.num_rows is None:
            return [_HeldOutUnits(_share_of_units(place, sizes, target.ratio * int(sizes.sum())))]
        return [_first_units(place, sizes, target.num_rows)]
    strata = [np.flatnonzero(stratum == number) for number in np.unique(stratum)]
    # A stratum of a single unit cannot be on two sides.
    strata = [units for units in strata if len(units) > 1]
    num_rows = np.array([sizes[units].sum() for units in strata], dtype=np.int64)
    wanted = target.num_rows or max(1, round(target.ratio * int(num_rows.sum())))
    chosen = []
    for units, quota in zip(strata, quotas(num_rows, wanted), strict=True):
        if target.num_rows is not None and quota:
            first = _first_units(place[units], sizes[units], quota)
            is_all = len(first.units) == len(units)
            chosen.append(replace(first, units=units[first.units], is_all=is_all))
        elif quota:
            share = _share_of_units(place[units], sizes[units], quota)
            chosen.append(_HeldOutUnits(units[share]))
    return chosen


def _first_units(place: Hashes, sizes: Indices, num_rows: int) -> _HeldOutUnits:
    """Return the units that give a number of rows, where all are of one stratum."""
    order = np.argsort(place, kind="stable")
    # Units larger than all that is asked for come last: taking one would throw away most of it.
    order = order[np.argsort(sizes[order] > num_rows, kind="stable")]
    most_of_one, border = _share_of_a_unit(sizes[order], num_rows)
    return _HeldOutUnits(order[:border], num_rows, most_of_one)


def _share_of_units(place: Hashes, sizes: Indices, wanted: float) -> Indices:
    """Return the units whose rows are as near to the number wanted as whole units allow.

    They are taken in the order of their places, but for those that are too large for what is left;
    in the end the one comes that brings the number nearest. At least one is taken, the smallest,
    and one is left.
    """
    order = np.argsort(place, kind="stable")
    chosen: list[int] = []
    left = wanted
    for unit in order.tolist():
        if left < 0.5 or len(chosen) == len(order) - 1:
            break
        if sizes[unit] <= left + 0.5:
            chosen.append(unit)
            left -= int(sizes[unit])
    others = order[~np.isin(order, chosen)]
    if len(others) > 1 and (left >= 0.5 or not chosen):
        missed = np.abs(sizes[others] - left)
        nearest = int(np.argmin(missed))
        if missed[nearest] < left or not chosen:
            chosen.append(int(others[nearest]))
    return np.array(chosen, dtype=np.int64)


def quotas(num_rows: Indices, total: int) -> list[int]:
    """Return how many rows each stratum gives, by largest remainder, so that the sum is `total`.

    Args:
        num_rows: Rows of each stratum. Shape (S,).
        total: Rows in all, at most as many as there are.
    """
    exact = num_rows * (total / max(1, int(num_rows.sum())))
    floors = np.floor(exact).astype(np.int64)
    # Of equal remainders the larger stratum comes first, then the one named first.
    order = np.lexsort((np.arange(len(exact)), -num_rows, floors - exact))
    floors[order[: max(0, total - int(floors.sum()))]] += 1
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


def _all_units(chosen: Sequence[_HeldOutUnits]) -> Indices:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(units.units for units in chosen)])


def _num_units(chosen: Sequence[_HeldOutUnits]) -> int:
    return sum(len(units.units) for units in chosen)


def _held_out_rows(
    side: str, chosen: Sequence[_HeldOutUnits], unit: Indices, ranks: Hashes
) -> _HeldOutRows:
    """Return the rows of a side; those beyond the number asked for are surplus."""
    found = [np.zeros(0, dtype=np.int64)]
    surplus: dict[int, Reason] = {}
    for units in chosen:
        rows = _by_rank(np.flatnonzero(np.isin(unit, units.units)), ranks)
        if units.num_rows is not None and units.most_of_one is not None:
            kept = rows[occurrence(unit[rows]) < units.most_of_one][: units.num_rows]
            text = f"its group is in the {side} split, which has its {units.num_rows} rows"
            reason = Reason(ReasonCode.GROUP_SURPLUS, text, text)
            surplus |= {int(index): reason for index in np.setdiff1d(rows, kept)}
            rows = kept
        found.append(rows)
    return _HeldOutRows(_by_rank(np.concatenate(found), ranks), surplus)


def _refuse_used_up(
    chosen: Sequence[_HeldOutUnits],
    stratum: Indices | None,
    strata: Sequence[str],
    data: DataConfig,
) -> None:
    if stratum is None or not any(units.is_all for units in chosen):
        return
    names = np.unique(np.array(strata, dtype=object))
    gone = [names[stratum[units.units[0]]] for units in chosen if units.is_all]
    raise DataError.of(
        "the test split would take all rows of a stratum",
        where="data.split" + ".stratify_by" * bool(data.split.stratify_by),
        got=", ".join(f"{data.split.stratify_by or 'task'} {name}" for name in gone[:5]),
        remedy="lower data.split.num_test_examples, or add rows of it",
    )


def _refuse_too_little_left(num_units: int, num_chosen: int, data: DataConfig) -> None:
    if 0 < num_chosen < num_units:
        return
    by_number = data.split.num_validation_examples is not None
    raise DataError.of(
        "not enough rows for the validation split",
        where="data.split.num_validation_examples" if by_number else "data.split.validation_ratio",
        got=f"{counted(num_units, 'group')} left after the test split",
        allowed="enough for validation, and one more to train on",
        remedy="lower it, or add data",
    )


def _unsplittable_problem(
    unit: Indices,
    bonds: Mapping[str, NDArray[np.int64]],
    data: DataConfig,
    places: Sequence[str],
) -> Problem:
    """Return what is wrong where there is no test split: too few rows, or what keeps them together.

    Args:
        unit: Number of each row's unit. Shape (N,).
        bonds: Labels that keep rows together, by what they say of the rows. Shape (N,) each.
        data: `split`.
        places: File and line of each row, or its id. Shape (N,).
    """
    count, wanted = len(unit), data.split.num_test_examples
    if wanted is not None and wanted >= count:
        return Problem(
            "not enough rows for the test split",
            where="data.split.num_test_examples",
            got=f"{counted(count, 'row')} in all",
            allowed=f"more than {wanted:,}, so that some are left to train on",
            remedy="lower it, or add data",
        )
    sizes = np.bincount(unit)
    grouped = data.split.group_by is not None
    units = "1 group that stays" if len(sizes) == 1 else f"{len(sizes):,} groups that stay"
    got = f"{count:,} row{'s' * (count != 1)} in {units} together"
    largest = np.flatnonzero(unit == np.argmax(sizes))
    if len(largest) < 2:
        return Problem("the rows cannot be split", "data.split", got, remedy="add rows")
    # The bond that keeps the most rows of the largest unit together is named, with two of them.
    counts = {
        bond: np.unique(label[largest], return_inverse=True, return_counts=True)[1:]
        for bond, label in bonds.items()
    }
    bond = max(counts, key=lambda name: int(counts[name][1].max()))
    inverse, number = counts[bond]
    first, second = largest[inverse == np.argmax(number)][:2].tolist()
    return Problem(
        "the rows cannot be split",
        where="data.split.group_by" if bond not in _REMEDIES else "data.split",
        got=f"{got}; the largest has {len(largest):,} rows, of which {int(number.max()):,} {bond}, "
        f"for example {places[first]} and {places[second]}",
        allowed="enough groups for both sides",
        remedy=_REMEDIES.get(bond, "group by another column, or keep fewer test rows")
        + " (or group by another column)" * (grouped and bond in _REMEDIES),
    )


def _share_of_a_unit(sizes: Indices, wanted: int) -> tuple[int, int]:
    """Return the most test rows that one unit gives, and how many units the test takes.

    Few large groups make a poor test: its rows resemble each other. So each gives at most a
    twentieth of the test. Its other rows are lost, for training on them would leak; where that
    would cost more than a tenth of all rows beyond what cannot be avoided, units give more.

    Args:
        sizes: Rows of each unit, in the order in which the test takes them.
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


def _by_rank(indices: Indices, ranks: Hashes) -> Indices:
    return indices[np.argsort(ranks[indices], kind="stable")]


def _chain(labels: NDArray[np.int64]) -> Indices:
    """Return edges that link all rows with an equal label, shape (E, 2)."""
    order = np.argsort(labels, kind="stable")
    same = labels[order][1:] == labels[order][:-1]
    return np.stack([order[:-1][same], order[1:][same]], axis=1)
