from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tuneloop.config import DataConfig
from tuneloop.data.split.assign import same_answers, unit_ids
from tuneloop.data.split.mixture import Mixture
from tuneloop.data.split.split import (
    NEAR_DUPLICATES,
    SAME_PROMPT,
    Split,
    limit_train,
    quotas,
    split_rows,
    strata_of_units,
)
from tuneloop.errors import DataError


def split(
    ids: list[str],
    groups: list[str] | None = None,
    clusters: list[int] | None = None,
    strata: Sequence[str] = (),
    **data: Any,
) -> Split:
    config = DataConfig.model_validate(
        {"sources": [{"path": "x", "format": "question_answer"}], **data}
    )
    labels = np.array(clusters if clusters is not None else range(len(ids)))
    links = {NEAR_DUPLICATES: labels}
    found = split_rows(ids, groups or [""] * len(ids), links, config, strata)
    return limit_train(found, np.array([], dtype=np.int64), config)


IDS = [f"r{i}" for i in range(1000)]


def names(ids: list[str], indices: Any) -> list[str]:
    return [ids[i] for i in indices]


def test_ratio_is_met_and_every_row_has_one_side() -> None:
    found = split(IDS)
    assert len(found.test) == 100
    assert sorted([*found.train, *found.test]) == list(range(1000))


@pytest.mark.parametrize(("count", "ratio", "expected"), [(50, 0.1, 5), (7, 0.1, 1), (30, 0.5, 15)])
def test_a_share_of_few_rows_is_met_for_every_seed(count: int, ratio: float, expected: int) -> None:
    for seed in range(20):
        assert len(split(IDS[:count], seed=seed, split={"test_ratio": ratio}).test) == expected


def test_a_share_is_met_as_closely_as_groups_allow() -> None:
    # One group of a third of the rows, others of 1 to 7.
    groups = ["big"] * 100 + [f"g{i}" for i in range(50) for _ in range(1 + i % 7)]
    ids = [f"r{i}" for i in range(len(groups))]
    for seed in range(20):
        found = split(ids, groups, seed=seed, split={"group_by": "m"})
        assert abs(len(found.test) - len(ids) / 10) <= 1
        assert {groups[i] for i in found.train}.isdisjoint(groups[i] for i in found.test)
    # Where every group is larger than the share, the smallest is tested.
    halves = ["a"] * 6 + ["b"] * 4
    found = split(IDS[:10], halves, split={"group_by": "m"})
    assert {halves[i] for i in found.test} == {"b"}


def test_adding_rows_moves_few_of_the_others() -> None:
    before = split(IDS)
    more = [f"new{i}" for i in range(500)] + IDS
    after = split(more)
    assert len(after.test) == 150
    stayed = set(names(more, after.test)) & set(IDS)
    # The border moves by what chance gives new rows more or less than their share.
    assert len(stayed ^ set(names(IDS, before.test))) <= 20
    one_more = split([*IDS, "new"])
    assert len(set(names(IDS, before.test)) ^ set(names([*IDS, "new"], one_more.test))) <= 1


def test_few_rows_move_when_a_row_joins_them() -> None:
    before = split(IDS)
    # To every second row comes another one with the same prompt.
    more = IDS + [f"new{i}" for i in range(500)]
    after = split(more, clusters=[*range(1000), *range(0, 1000, 2)])
    sides = [np.isin(np.arange(1000), found.test) for found in (before, after)]
    moved = sides[0] != sides[1]
    assert moved[1::2].mean() <= 0.03  # at the border
    # Half of them lead, and of those 2 x 0.1 x 0.9 change sides: one in eleven.
    assert 0.05 <= moved[::2].mean() <= 0.13


def test_train_subsets_are_nested_whatever_the_order_of_rows() -> None:
    small = split(IDS, num_train_examples=100, split={"num_test_examples": 50})
    large = split(IDS[::-1], num_train_examples=300, split={"num_test_examples": 50})
    assert names(IDS, small.train) == names(IDS[::-1], large.train)[:100]
    assert names(IDS, small.test) == names(IDS[::-1], large.test)
    assert len(small.surplus) == 850
    assert "first 100" in next(iter(small.surplus.values())).text


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
    assert len(stayed ^ set(names(IDS, before.validation))) <= 40
    larger_test = split(IDS, split={"validation_ratio": 0.2, "test_ratio": 0.3})
    moved = set(before.validation.tolist()) - set(larger_test.validation.tolist())
    # The validation is a share of what the test leaves: it is smaller, and nothing joins it.
    assert len(larger_test.validation) == 140
    assert moved >= set(larger_test.test.tolist()) & set(before.validation.tolist())
    assert len(set(larger_test.validation.tolist()) - set(before.validation.tolist())) <= 40


def test_rows_left_out_make_room_for_others() -> None:
    config = DataConfig.model_validate(
        {"sources": [{"path": "x", "format": "question_answer"}], "num_train_examples": 100}
    )
    found = split_rows(IDS, [""] * 1000, {}, config)
    left_out = found.train[:7]
    limited = limit_train(found, left_out, config)
    assert limited.train.tolist() == found.train[7:107].tolist()
    assert set(limited.surplus).isdisjoint(left_out)
    with pytest.raises(DataError, match="contaminated rows"):
        limit_train(found, found.train[:-50], config)


LABELS = [("rare" if i % 50 == 0 else "some" if i % 5 == 0 else "most") for i in range(1000)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({}, {"most": 80, "some": 18, "rare": 2}),
        ({"num_test_examples": 200}, {"most": 160, "some": 36, "rare": 4}),
        ({"num_test_examples": 33}, {"most": 26, "some": 6, "rare": 1}),
    ],
)
def test_every_stratum_gives_its_share(size: dict[str, Any], expected: dict[str, int]) -> None:
    asked = {"stratify_by": "label", "num_validation_examples": 50, **size}
    found = split(IDS, strata=LABELS, split=asked)
    assert Counter(LABELS[i] for i in found.test) == expected
    assert Counter(LABELS[i] for i in found.validation) == {"most": 40, "some": 9, "rare": 1}
    everyone = [*found.train, *found.test, *found.validation, *found.surplus]
    assert sorted(everyone) == list(range(1000))
    # Each stratum gives the rows that it would give if it were alone.
    alone = [i for i, label in enumerate(LABELS) if label == "rare"]
    order = split([IDS[i] for i in alone], split={"num_test_examples": expected["rare"]})
    assert {alone[i] for i in order.test} == {i for i in found.test if LABELS[i] == "rare"}


def test_strata_keep_clusters_and_groups_together() -> None:
    clusters = [i // 4 for i in range(1000)]
    groups = [f"g{i // 20}" for i in range(1000)]
    labels = ["a" if i // 20 % 5 else "b" for i in range(1000)]  # of one label in a group
    found = split(IDS, groups, clusters, labels, split={"stratify_by": "l", "group_by": "g"})
    assert {groups[i] for i in found.train}.isdisjoint(groups[i] for i in found.test)
    assert Counter(labels[i] for i in found.test) == {"a": 80, "b": 20}
    # A few large units give no more than their share of a number that is asked for.
    found = split(
        IDS, clusters=clusters, strata=labels, split={"stratify_by": "l", "num_test_examples": 100}
    )
    assert Counter(labels[i] for i in found.test) == {"a": 80, "b": 20}
    assert {clusters[i] for i in found.train}.isdisjoint(clusters[i] for i in found.test)


def test_adding_rows_moves_only_rows_at_the_border_of_a_stratum() -> None:
    before = split(IDS, strata=LABELS, split={"stratify_by": "label"})
    more = [f"new{i}" for i in range(500)] + IDS
    labels = ["most"] * 400 + ["some"] * 100 + LABELS
    after = split(more, strata=labels, split={"stratify_by": "label"})
    assert Counter(labels[i] for i in after.test) == {"most": 120, "some": 28, "rare": 2}
    stayed = set(names(more, after.test)) & set(names(IDS, before.test))
    assert len(stayed) >= 90
    rare = {name for name, label in zip(IDS, LABELS, strict=True) if label == "rare"}
    assert set(names(more, after.test)) & rare == set(names(IDS, before.test)) & rare


def test_the_stratum_of_a_unit_is_that_of_most_of_its_rows() -> None:
    unit = np.array([0, 0, 0, 1, 1, 2])
    assert strata_of_units(unit, 3, ["b", "a", "b", "b", "a", "c"]).tolist() == [1, 0, 2]


def test_quotas_add_up_and_are_within_one_of_the_exact_share() -> None:
    for wanted in range(1, 40):
        rows = np.array([1, 2, 5, 13, 40])
        found = quotas(rows, wanted)
        assert sum(found) == wanted
        assert np.abs(np.array(found) - rows * wanted / 61).max() < 1


def mixture(source: list[int], weights: list[float], size: list[int] | None = None) -> Mixture:
    names = [f"s{number}" for number in range(len(weights))]
    size = size or [1] * len(source)
    return Mixture(np.array(source), np.array(size), weights, names, "source", "data.sources")


def test_sources_are_mixed_by_weight_without_taking_a_row_twice() -> None:
    source = [0] * 100 + [1] * 700 + [2] * 200
    data: dict[str, Any] = {"sources": [{"path": "x", "format": "question_answer"}]}
    config = DataConfig.model_validate(data)
    everyone = split_rows(IDS, [""] * 1000, {}, config)
    given = Counter(source[i] for i in everyone.train)
    mixed = limit_train(everyone, np.array([], dtype=np.int64), config, mixture(source, [1, 2, 1]))
    kept = Counter(source[i] for i in mixed.train)
    # The first source ends first: all of it is taken, and twice as much of the second.
    assert kept == {0: given[0], 1: 2 * given[0], 2: given[0]}
    assert mixed.test.tolist() == everyone.test.tolist()
    assert sorted([*mixed.train, *mixed.test, *mixed.surplus]) == list(range(1000))
    assert {reason.text for reason in mixed.surplus.values()} == {
        "beyond its source's part of the mixture"
    }
    # The order is the shuffled one, and a smaller subset with the same parts is contained.
    assert mixed.train.tolist() == [i for i in everyone.train if i in set(mixed.train)]
    small = DataConfig.model_validate({**data, "num_train_examples": 100})
    fewer = limit_train(everyone, np.array([], dtype=np.int64), small, mixture(source, [1, 2, 1]))
    assert Counter(source[i] for i in fewer.train) == {0: 25, 1: 50, 2: 25}
    assert set(fewer.train) < set(mixed.train)
    # A part trained alone has exactly those of its rows that it has beside the others.
    other = np.flatnonzero(np.array(source) != 1)
    no_rows = np.array([], dtype=np.int64)
    alone = limit_train(everyone, no_rows, small, mixture(source, [1, 2, 1]), other)
    assert alone.train.tolist() == [i for i in fewer.train if source[i] == 1]
    assert {alone.surplus[i].code for i in set(fewer.train) - set(alone.train)} == {"other_task"}
    with pytest.raises(DataError, match="the tasks that are trained on have no train row"):
        limit_train(everyone, no_rows, config, None, np.arange(1000))
    with pytest.raises(DataError, match="without the weights"):
        large = DataConfig.model_validate({**data, "num_train_examples": 600})
        limit_train(everyone, np.array([], dtype=np.int64), large, mixture(source, [1, 2, 1]))
    with pytest.raises(DataError, match="no train row to mix"):
        limit_train(everyone, everyone.train[:0], config, mixture(source, [1, 2, 1, 1]))


def test_documents_are_mixed_by_what_they_fill() -> None:
    source = [0, 1] * 300
    size = [100, 25] * 300
    order = mixture(source, [1, 1], size).order(np.arange(600))
    tokens = [sum(size[i] for i in order if source[i] == number) for number in (0, 1)]
    assert tokens[1] == 300 * 25
    assert abs(tokens[0] - tokens[1]) <= 100
    for length in (20, 100, 200):
        tokens = [sum(size[i] for i in order[:length] if source[i] == n) for n in (0, 1)]
        assert abs(tokens[0] - tokens[1]) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {
                "ids": IDS[:10],
                "strata": ["a"] * 8 + ["b"] * 2,
                "split": {"stratify_by": "l", "num_test_examples": 9},
            },
            "all rows of a stratum",
        ),
        (
            {"ids": IDS[:10], "strata": IDS[:10], "split": {"stratify_by": "l"}},
            "cannot be split",
        ),
        ({"ids": IDS[:10], "split": {"num_test_examples": 10}}, "not enough rows for the test"),
        ({"ids": IDS[:10], "num_train_examples": 10}, "not enough rows to train on"),
        ({"ids": IDS[:1]}, "cannot be split"),
        (
            {"ids": IDS[:10], "split": {"num_test_examples": 3, "num_validation_examples": 7}},
            "not enough rows for the validation",
        ),
        (
            # Each stratum has one row left beside the test.
            {
                "ids": IDS[:8],
                "strata": ["a", "b", "c", "d"] * 2,
                "split": {"stratify_by": "l", "test_ratio": 0.5, "validation_ratio": 0.25},
            },
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


def test_a_refused_split_names_what_keeps_rows_together() -> None:
    config = DataConfig.model_validate({"sources": [{"path": "x", "format": "question_answer"}]})
    places = [f"faq.jsonl:{i + 1}" for i in range(10)]
    links = {NEAR_DUPLICATES: np.arange(10), SAME_PROMPT: np.array([5, *[7] * 8, 5])}
    links[NEAR_DUPLICATES][9] = 1
    with pytest.raises(DataError) as told:
        split_rows(IDS[:10], [""] * 10, links, config, (), places)
    problem = told.value.problems[0]
    assert problem.got == (
        "10 rows in 1 group that stays together; the largest has 10 rows, of which 8 have the same "
        "prompt, for example faq.jsonl:2 and faq.jsonl:3"
    )
    assert "prompt" in problem.remedy


def test_rows_that_stay_together_have_one_unit_named_by_the_first_id() -> None:
    ids = pa.array(["d", "b", "removed", "c", "a", "e"])
    rows = np.array([0, 1, 3, 4, 5])
    assert unit_ids(ids, rows, np.array([0, 0, 1, 1, 2])).to_pylist() == [
        *("b", "b", "removed", "a", "a", "e")
    ]
    found = split(["r1", "r2", "r3", "r4"], ["x", "y", "y", "z"], [0, 1, 2, 0],
                  split={"group_by": "g", "test_ratio": 0.5})  # fmt: skip
    assert found.unit.tolist() == [0, 1, 1, 0]


def test_rows_with_the_same_long_answer_stay_together_unless_it_is_a_stock_phrase() -> None:
    answers = np.array([7, 7, 8, 9, 9, *[5] * 21, 7, 6, 6])
    is_compared = np.array([True, True, True, False, True, *[True] * 21, True, True, True])
    is_synthetic = np.zeros(len(answers), dtype=bool)
    is_synthetic[[-3, -1]] = True
    labels = same_answers(answers, is_compared, is_synthetic).tolist()
    together = {
        tuple(row for row, other in enumerate(labels) if other == label) for label in labels
    }
    assert {own for own in together if len(own) > 1} == {(0, 1, 26), (27, 28)}
    # Rows that a model wrote do not make a stock phrase of what people have answered.
    is_synthetic[5:25] = True
    assert len(set(same_answers(answers, is_compared, is_synthetic)[5:26])) == 1
