"""Which rows are trained on when."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.training.batches import Schedule, micro_batches, split_batch


def test_an_epoch_sees_every_row_once_and_ends_with_a_smaller_batch() -> None:
    schedule = Schedule(21, 8, num_epochs=2, max_steps=None, seed=0)
    assert schedule.steps_per_epoch == 3
    assert schedule.num_steps == 6
    first = [schedule.batch(step).tolist() for step in range(3)]
    second = [schedule.batch(step).tolist() for step in range(3, 6)]
    assert [len(batch) for batch in first] == [8, 8, 5]
    assert sorted(chain(*first)) == list(range(21))
    assert sorted(chain(*second)) == list(range(21))
    assert first != second
    assert [schedule.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]


def test_the_order_depends_on_the_seed_and_max_steps_only_cuts_it_off() -> None:
    one = Schedule(21, 8, 2, None, seed=1)
    other = Schedule(21, 8, 2, None, seed=2)
    short = Schedule(21, 8, 2, 4, seed=1)
    assert one.batch(0).tolist() != other.batch(0).tolist()
    assert short.num_steps == 4
    assert [short.batch(s).tolist() for s in range(4)] == [one.batch(s).tolist() for s in range(4)]


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    num_bins=st.integers(1, 8),
    size=st.integers(1, 8),
)
def test_micro_batches_hold_every_row_once_within_their_size(
    lengths: list[int], num_bins: int, size: int
) -> None:
    rows = np.arange(min(len(lengths), num_bins * size))
    bins = split_batch(rows, np.array(lengths), num_bins, size)
    assert len(bins) == num_bins
    assert max(map(len, bins)) <= size
    assert sorted(chain(*bins)) == rows.tolist()
    assert bins == split_batch(rows[::-1], np.array(lengths), num_bins, size)


def test_micro_batches_are_balanced() -> None:
    lengths = np.array([400, 100, 100, 100, 390, 110, 95, 105])
    tokens = [int(lengths[b].sum()) for b in split_batch(np.arange(8), lengths, 2, 4)]
    assert max(tokens) - min(tokens) <= 10


def test_too_many_rows_are_refused_instead_of_dropped() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        split_batch(np.arange(9), np.ones(9), num_bins=2, size=4)


def test_all_ranks_have_the_same_number_of_micro_batches() -> None:
    bins = [[0], [1], [2], []]
    assert micro_batches(bins, 0, 2) == [[0], [2]]
    assert micro_batches(bins, 1, 2) == [[1], []]
    with pytest.raises(ValueError, match="cannot be shared"):
        micro_batches(bins, 0, 3)


def test_a_value_is_summed_over_the_steps_of_the_first_epoch() -> None:
    values = np.arange(21)
    for max_steps in (None, 2, 100):
        schedule = Schedule(21, 8, 2, max_steps, seed=3)
        steps = range(min(3, schedule.num_steps))
        assert schedule.sums(values).tolist() == [int(schedule.batch(s).sum()) for s in steps]
