"""Slices: which rows they hold, their order, and what is told of them by chance."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from tuneloop.artifacts import Workspace
from tuneloop.config import TaskConfig
from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.slices import (
    Slice,
    describe_slices,
    differs_from_rest,
    find_slices,
    is_in,
    read_columns,
    weak_parts,
)

LABELS = TaskConfig(type="classification", labels=["yes", "no"])


def prediction(index: int, arm: str, right: bool, cluster: str = "") -> Prediction:
    question = json.dumps([{"role": "user", "content": "word " * (index + 1)}])
    reference = "yes" if index % 2 else "no"
    return Prediction(
        f"r{index}", arm, question, reference, reference if right else "?", "stop", 1, 1, 0.1,
        "scored", scores={"accuracy": float(right)}, cluster=cluster,
    )  # fmt: skip


def scorer_of(rows: list[Prediction]) -> Scorer:
    return Scorer(LABELS, {p.example_id: p.reference for p in rows})


def test_a_row_is_in_the_slice_that_its_value_names() -> None:
    assert is_in("3 to 5", "3 to 5")
    assert [is_in(value, "3 to 5") for value in (2, 3, 5, 6, None, True, "4")] == [
        False, True, True, False, False, False, False,
    ]  # fmt: skip
    assert [is_in(value, "-1.5 to below 1e+06") for value in (-1.5, 999_999.0, 1e6)] == [
        True, True, False,
    ]  # fmt: skip


def test_a_weak_part_is_worse_in_the_direction_of_its_metric() -> None:
    parts = [{"slice": "x", "value": 0.2, "rest": 0.9}, {"slice": "y", "value": 0.9, "rest": 0.2}]
    told = {"arms": {"a": [part | {"p_adjusted": 0.05} for part in parts]}, "confidence": 0.95}
    assert [part["slice"] for part in weak_parts(told, "a", "higher")] == ["x"]
    assert [part["slice"] for part in weak_parts(told, "a", "lower")] == ["y"]
    told["arms"]["a"][0]["p_adjusted"] = None
    assert weak_parts(told, "a", "higher") == []
    assert weak_parts({}, "a", "higher") == []


def test_a_slice_is_a_value_a_quarter_of_lengths_a_label_or_a_cluster() -> None:
    rows = [prediction(index, "a", True, f"c{index // 10}") for index in range(40)]
    columns = {
        "topic": {f"r{index}": "billing" if index < 12 else "other" for index in range(40)},
        "same": {f"r{index}": "billing" if index < 12 else "other" for index in range(40)},
        "rare": {"r0": "x", "r1": "x"},
        "price": {f"r{index}": float(index % 20) for index in range(40)},
        "all": dict.fromkeys((f"r{index}" for index in range(40)), "everywhere"),
    }
    found = find_slices(rows, columns, scorer_of(rows), "document")
    sizes = {(part.by, part.value): len(part.example_ids) for part in found}
    assert sizes == {
        ("label", "no"): 20,
        ("label", "yes"): 20,
        ("topic", "billing"): 12,
        ("topic", "other"): 28,
        **{("price", f"{start} to {end}"): 10 for start, end in (("0", "below 5"),)},
        ("price", "5 to below 10"): 10,
        ("price", "10 to below 15"): 10,
        ("price", "15 to 19"): 10,
        **{("length", f"{start} to {start + 9}"): 10 for start in (1, 11, 21)},
        ("length", "31 to 40"): 10,
    }
    # Rows 0 to 9 are the first quarter of the lengths: the cluster of the same rows is not told.
    moved = [prediction(index, "a", True, f"c{index % 4}") for index in range(40)]
    by_cluster = [p for p in find_slices(moved, {}, scorer_of(moved), "document") if p.is_cluster]
    assert [len(part.example_ids) for part in by_cluster] == [10] * 4


def test_the_rows_of_a_cluster_have_one_interval_whatever_else_they_have_in_common() -> None:
    rows = [prediction(index, "a", index % 3 > 0, f"c{index // 10}") for index in range(40)]
    # Each customer writes about one topic.
    columns = {"topic": {p.example_id: f"about {p.cluster}" for p in rows}}
    found = [p for p in find_slices(rows, columns, scorer_of(rows), "customer") if p.by == "topic"]
    assert [part.is_cluster for part in found] == [True] * 4
    first, *_ = describe_slices(rows, found, scorer_of(rows), 0.95)["arms"]["a"]
    assert (first["num_clusters"], first["method"]) == (1, "Wilson")


def test_the_columns_of_a_split_are_the_users_own_and_the_files(tmp_path: Path) -> None:
    rows = [
        {
            "row_id": "a",
            "source": "faq.jsonl:12",
            "messages": [{"role": "user", "content": "q"}],
            "num_tokens": 3,
            "split_unit": "a",
            "original_text": "t",
            "tags": ["x"],
            "topic": None,
        }
    ]
    with Workspace(tmp_path).draft("datasets", "faq", "f" * 64) as draft:
        (draft.path / "test").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), draft.path / "test" / "part.parquet")
        dataset = draft.publish(config={}, resources={}, inputs=[], metrics={})
    assert read_columns(dataset, "test") == {
        "source": {"a": "faq.jsonl"},
        "text": {"a": "t"},
        "topic": {"a": None},
    }


def test_the_worst_slice_is_first_and_a_lost_one_is_told() -> None:
    rows = [prediction(index, "old", True) for index in range(120)]
    rows += [prediction(index, "new", index >= 30 or index % 3 == 0) for index in range(120)]
    parts = [
        Slice("topic", name, frozenset(f"r{index}" for index in range(start, end)))
        for name, start, end in (("late", 60, 120), ("early", 0, 30), ("middle", 30, 60))
    ]
    told = describe_slices(rows, parts, scorer_of(rows), 0.95)
    worst = told["arms"]["new"][0]
    assert (worst["slice"], worst["n"], worst["value"], worst["rest"]) == (
        "early", 30, pytest.approx(1 / 3), 1.0,
    )  # fmt: skip
    assert worst["p_adjusted"] == pytest.approx(3 * worst["p_value"])
    assert worst["p_adjusted"] < 0.001
    (pair,) = told["pairs"]
    lost = pair["slices"][0]
    assert (pair["other"], lost["slice"], lost["value"]) == ("old", "early", pytest.approx(-2 / 3))
    assert lost["p_adjusted"] < 0.001
    assert all(one["p_adjusted"] == 1.0 for one in pair["slices"][1:])


def test_a_slice_against_the_rest_is_fishers_test_for_rows_of_their_own() -> None:
    right = np.r_[np.ones(9), np.zeros(21), np.ones(50), np.zeros(20)]
    inside = np.r_[np.ones(30, bool), np.zeros(70, bool)]
    ours = differs_from_rest(right, inside, Clusters.of(range(100)), is_binary=True)
    exact = stats.fisher_exact([[9, 21], [50, 20]]).pvalue
    as_likely = stats.hypergeom.pmf(9, 100, 59, 30)
    assert ours == pytest.approx(exact - as_likely / 2, rel=1e-6)


@pytest.mark.parametrize(("rate", "share"), [(0.5, 0.3), (0.9, 0.1)])
def test_slices_of_no_difference_are_rarely_said_to_differ(rate: float, share: float) -> None:
    generator = np.random.default_rng(3)
    index = np.repeat(np.arange(30), 5)
    clusters = Clusters.of(index)
    wrong = 0
    for _ in range(300):
        rates = generator.beta(rate * 3, (1 - rate) * 3, 30)[index]
        values = (generator.random(150) < rates).astype(float)
        inside = generator.random(150) < share
        p_value = differs_from_rest(values, inside, clusters, is_binary=True)
        wrong += p_value is not None and p_value <= 0.05
    # At a true rate of 5% more than 27 have a chance of 0.1%.
    assert wrong <= 27


def test_parts_by_label_are_the_rows_own_and_not_what_was_answered() -> None:
    rows = [prediction(index, "a", True) for index in range(40)]
    own = {p.example_id: "yes" if index < 20 else "no" for index, p in enumerate(rows)}
    # Both are right for the first ten rows, and they were answered with the other one.
    answered = [replace(p, reference="no") if i < 10 else p for i, p in enumerate(rows)]
    found = find_slices(answered, {}, scorer_of(rows), "", own)
    labels = {p.value: len(p.example_ids) for p in found if p.by == "label"}
    assert labels == {"yes": 20, "no": 20}


def test_what_is_no_number_is_in_no_quarter() -> None:
    rows = [prediction(index, "a", True) for index in range(40)]
    price = {f"r{index}": float(index) if index < 32 else math.nan for index in range(40)}
    found = [p for p in find_slices(rows, {"price": price}, scorer_of(rows), "") if p.by == "price"]
    assert [len(part.example_ids) for part in found] == [8, 8, 8, 8]
    assert {part.value for part in found} >= {"0 to below 8"}
