"""Rows that belong together are one cluster."""

from __future__ import annotations

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spelt_words import WORDS, arms, publish_dataset, row, spell
from tuneloop.errors import ConfigError
from tuneloop.evals.runner import evaluate
from tuneloop.evals.scoring.row_clusters import read_clusters

pytestmark = pytest.mark.usefixtures("short_waits")


def test_clusters_come_from_the_column_that_the_dataset_was_split_by(
    model_server, config, workspace
):
    rows = [row(index, word) | {"unit": f"u{index // 3}"} for index, word in enumerate(WORDS)]
    rows[3]["unit"] = None
    with workspace.draft("datasets", "words", "e" * 64) as draft:
        for split in ("train", "test"):
            (draft.path / split).mkdir()
            pq.write_table(pa.Table.from_pylist(rows), draft.path / split / "part-0.parquet")
        split_by = {"data": {"split": {"group_by": "unit"}}}
        dataset = draft.publish(config=split_by, resources={}, inputs=[], metrics={})
    clusters = read_clusters(dataset)
    assert clusters.by == "unit"
    assert [clusters.names[f"row-{i:03d}"] for i in (0, 2, 3, 4)] == ["u0", "u0", "row-003", "u1"]
    assert len(set(clusters.names.values())) == 5

    model_server.reply = spell
    artifact = evaluate(config, workspace, dataset, arms(model_server, dataset), "words").artifact
    table = pq.read_table(artifact.path / "predictions.parquet").to_pylist()
    assert {r["example_id"]: r["cluster"] for r in table} == clusters.names
    score = json.loads((artifact.path / "metrics.json").read_text())["arms"][0]["scores"]
    assert score["exact_match"]["num_clusters"] == 5
    assert "10 answers in 5 units" in (artifact.path / "report.html").read_text()

    with pytest.raises(ConfigError) as caught:
        read_clusters(dataset, "unti")
    assert "unit" in caught.value.problems[0].allowed


def test_rows_with_the_same_question_are_a_cluster(workspace):
    rows = [row(index, word) for index, word in enumerate(["apple", "pear", "apple"])]
    rows[2]["messages"] = [*rows[0]["messages"][:-1], {"role": "assistant", "content": "{}"}]
    clusters = read_clusters(publish_dataset(workspace, rows, []))
    first, second, third = clusters.names.values()
    assert first == third != second
    assert clusters.by == "question"


def test_near_duplicates_are_a_cluster(workspace):
    rows = [row(index, word) for index, word in enumerate(["apple", "apples", "pear", "plum"])]
    units = ["row-000", "row-000", "row-002", None]
    test = [r | {"split_unit": unit} for r, unit in zip(rows, units, strict=True)]
    clusters = read_clusters(publish_dataset(workspace, test, []))
    assert list(clusters.names.values()) == ["row-000", "row-000", "row-002", "row-003"]
    assert clusters.by == "question"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["7", "7.0", "NaN", "nan", " ", "a", " a"], ["7", "7", "#2", "#3", "#4", "a", "a"]),
        (
            [7.0, 7.0, math.nan, math.nan, None, 0.5, 0.5],
            ["7", "7", "#2", "#3", "#4", "0.5", "0.5"],
        ),
    ],
)
def test_rows_without_a_group_are_each_their_own(workspace, values, expected):
    rows = [row(number, f"w{number}") | {"user": value} for number, value in enumerate(values)]
    names = read_clusters(publish_dataset(workspace, rows, []), "user").names
    assert list(names.values()) == [name.replace("#", "row-00") for name in expected]
