from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tuneloop.config import DataConfig
from tuneloop.data.split import Split, limit_train, split_rows
from tuneloop.errors import DataError


def split(
    ids: list[str], groups: list[str] | None = None, clusters: list[int] | None = None, **data: Any
) -> Split:
    config = DataConfig.model_validate(
        {"sources": [{"path": "x", "format": "question_answer"}], **data}
    )
    labels = np.array(clusters if clusters is not None else range(len(ids)))
    found = split_rows(ids, groups or [""] * len(ids), [labels], config)
    return limit_train(found, np.array([], dtype=np.int64), config)


IDS = [f"r{i}" for i in range(1000)]


def names(ids: list[str], indices: Any) -> list[str]:
    return [ids[i] for i in indices]


def test_ratio_is_met_and_every_row_has_one_side() -> None:
    found = split(IDS)
    assert 70 <= len(found.test) <= 130
    assert sorted([*found.train, *found.test]) == list(range(1000))


def test_adding_rows_moves_none_of_the_others() -> None:
    before = split(IDS)
    more = [f"new{i}" for i in range(500)] + IDS
    after = split(more)
    assert set(names(IDS, before.test)) == set(names(more, after.test)) & set(IDS)


def test_train_subsets_are_nested_whatever_the_order_of_rows() -> None:
    small = split(IDS, num_train_examples=100, split={"num_test_examples": 50})
    large = split(IDS[::-1], num_train_examples=300, split={"num_test_examples": 50})
    assert names(IDS, small.train) == names(IDS[::-1], large.train)[:100]
    assert names(IDS, small.test) == names(IDS[::-1], large.test)
    assert len(small.surplus) == 850
    assert "first 100" in next(iter(small.surplus.values()))


def test_another_seed_gives_another_split() -> None:
    one, two = (set(split(IDS, seed=seed).test.tolist()) for seed in (0, 1))
    assert len(one & two) < 40


def test_clusters_never_straddle() -> None:
    clusters = [i // 5 for i in range(1000)]
    found = split(IDS, clusters=clusters, split={"num_test_examples": 97})
    assert len(found.test) == 97
    train = {clusters[i] for i in found.train}
    assert train.isdisjoint(clusters[i] for i in found.test)
    # Rows of test clusters beyond 97 are nowhere, least of all in train.
    assert all(clusters[i] not in train for i in found.surplus)


def test_large_clusters_go_to_the_test_no_more_often_than_small_ones() -> None:
    shares = []
    for seed in range(10):
        found = split(IDS, clusters=[i // 5 for i in range(1000)], seed=seed)
        shares.append(len(found.test) / 1000)
    assert 0.07 <= np.mean(shares) <= 0.13


def test_groups_never_straddle_even_when_a_cluster_links_two() -> None:
    groups = [f"g{i % 40}" for i in range(1000)]
    clusters = list(range(1000))
    clusters[1] = clusters[0]  # links g0 and g1
    found = split(IDS, groups, clusters, split={"group_by": "m", "num_test_examples": 100})
    sides = {"train": {groups[i] for i in found.train}, "test": {groups[i] for i in found.test}}
    assert sides["train"].isdisjoint(sides["test"])
    assert any({"g0", "g1"} <= side for side in sides.values())
    assert sum(found.num_groups.values()) == 39


def test_a_large_group_does_not_fill_the_test() -> None:
    groups = ["big"] * 400 + [f"g{i}" for i in range(150) for _ in range(20)]
    ids = [f"r{i}" for i in range(len(groups))]
    for seed in range(12):
        found = split(ids, groups, seed=seed, split={"group_by": "m", "num_test_examples": 100})
        assert len(found.test) == 100
        counts = np.unique([groups[i] for i in found.test], return_counts=True)[1]
        assert len(counts) >= 20
        assert max(counts) <= 5
        assert "big" in {groups[i] for i in found.train}
        assert {groups[i] for i in found.train}.isdisjoint(groups[i] for i in found.test)


def test_large_groups_are_tested_where_there_are_no_others() -> None:
    groups = [f"g{i % 5}" for i in range(1000)]
    found = split(IDS, groups, split={"group_by": "m", "num_test_examples": 50})
    assert len(found.test) == 50
    assert len({groups[i] for i in found.train}) >= 3
    assert {groups[i] for i in found.train}.isdisjoint(groups[i] for i in found.test)


def test_validation_is_apart_and_moves_no_test_row() -> None:
    clusters = [i // 5 for i in range(1000)]
    without = split(IDS, clusters=clusters)
    for size in ({"validation_ratio": 0.2}, {"num_validation_examples": 130}):
        found = split(IDS, clusters=clusters, split=size)
        assert found.test.tolist() == without.test.tolist()
        assert 130 <= len(found.validation) <= 250
        everyone = [*found.train, *found.test, *found.validation, *found.surplus]
        assert sorted(everyone) == list(range(1000))
        sides = [{clusters[i] for i in s} for s in (found.train, found.test, found.validation)]
        assert sum(map(len, sides)) == len(set.union(*sides))


def test_validation_rows_stay_when_rows_are_added_or_the_test_grows() -> None:
    before = split(IDS, split={"validation_ratio": 0.2})
    more = [f"new{i}" for i in range(500)] + IDS
    after = split(more, split={"validation_ratio": 0.2})
    stayed = set(names(more, after.validation)) & set(IDS)
    assert stayed == set(names(IDS, before.validation))
    larger_test = split(IDS, split={"validation_ratio": 0.2, "test_ratio": 0.3})
    moved = set(before.validation.tolist()) - set(larger_test.validation.tolist())
    assert moved <= set(larger_test.test.tolist())


def test_rows_left_out_make_room_for_others() -> None:
    config = DataConfig.model_validate(
        {"sources": [{"path": "x", "format": "question_answer"}], "num_train_examples": 100}
    )
    found = split_rows(IDS, [""] * 1000, [np.arange(1000)], config)
    left_out = found.train[:7]
    limited = limit_train(found, left_out, config)
    assert limited.train.tolist() == found.train[7:107].tolist()
    assert set(limited.surplus).isdisjoint(left_out)
    with pytest.raises(DataError, match="contaminated rows"):
        limit_train(found, found.train[:-50], config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": IDS[:10], "split": {"num_test_examples": 10}}, "not enough rows for the test"),
        ({"ids": IDS[:10], "num_train_examples": 10}, "not enough rows to train on"),
        ({"ids": IDS[:1]}, "cannot be split"),
        (
            {"ids": IDS[:10], "split": {"num_test_examples": 3, "num_validation_examples": 7}},
            "not enough rows for the validation",
        ),
        (
            {"ids": IDS[:10], "groups": ["g"] * 10, "split": {"group_by": "m"}},
            "cannot be split",
        ),
    ],
)
def test_impossible_splits_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(**arguments)
