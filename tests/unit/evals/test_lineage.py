"""Rows a model was trained on are marked, looks at a test split counted, and costs told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.contest import with_lineage, with_train_rows
from tuneloop.evals.runner import evaluate
from tuneloop.records import Arm, Conversation, Endpoint, Message, Price


def rows(words: list[str], suffix: str = "") -> list[dict[str, Any]]:
    return [
        {
            "row_id": f"{word}{suffix}",
            "messages": [
                {"role": "user", "content": f"say {word}"},
                {"role": "assistant", "content": word.upper()},
            ],
            "num_tokens": 5,
        }
        for word in words
    ]


def publish(workspace: Workspace, name: str, test: list[Any], train: list[Any]) -> Artifact:
    fingerprint = name[0] * 64
    with workspace.draft("datasets", name, fingerprint) as draft:
        for split, content in (("train", train), ("test", test)):
            (draft.path / split).mkdir()
            if content:
                file = draft.path / split / "part-0.parquet"
                pq.write_table(pa.Table.from_pylist(content), file)
        return draft.publish(config={}, resources={}, inputs=[], metrics={})


@pytest.fixture
def config(tmp_path: Path) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": "words",
            "task": {"type": "generation"},
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "words.jsonl", "format": "messages"}]},
            "evaluation": {"num_resamples": 200},
        }
    )


def test_rows_that_a_model_was_trained_on_are_marked_beside_its_score(
    model_server, config, tmp_path
):
    workspace = Workspace(tmp_path / "workspace")
    # `fig` has the same id; `pear` was asked with another id, in other letters.
    asked = rows(["plum"], "-old") + rows(["pear"], "-old") + rows(["fig"])
    asked[1]["messages"][0]["content"] = "Say  PEAR"
    trained = publish(workspace, "first", rows(["kiwi"]), rows(["fig"]) + rows(["pear"], "-x"))
    scored = publish(workspace, "second", asked, [])
    known = {"fig": "FIG", "pear": "PEAR"}
    model_server.reply = lambda messages: (
        known.get(messages[-1]["content"].lower().split()[-1], "?"),
        "stop",
    )
    base = Arm("base", Endpoint(model_server.url, "parrot"), (), "weights")
    tuned = with_train_rows(replace(base, name="tuned"), [trained], config.task)
    (tmp_path / "elsewhere").mkdir()
    lost = with_lineage(replace(base, name="lost"), workspace, tmp_path / "elsewhere", config.task)
    turns = (Message("user", "say FIG"), Message("assistant", "FIG"))
    shown = replace(base, name="shown", shots=(Conversation(turns, "x"),))
    artifact = evaluate(config, workspace, scored, [base, lost, shown, tuned], "words").artifact
    table = pq.read_table(artifact.path / "predictions.parquet").to_pylist()
    marked = {(row["arm"], row["example_id"]): row["contaminated"] for row in table}
    assert marked["tuned", "fig"] is True
    assert marked["tuned", "pear-old"] is True
    assert marked["tuned", "plum-old"] is False
    assert {marked[arm, row["row_id"]] for arm in ("base", "lost") for row in asked} == {None}
    assert [marked["shown", row["row_id"]] for row in asked] == [None, None, True]
    metrics = json.loads((artifact.path / "metrics.json").read_text())
    base_told, lost_told, shown_told, told = metrics["arms"]
    assert told["contamination"] == {
        "all": {"value": pytest.approx(2 / 3), "n": 3},
        "clean": {"value": 0.0, "n": 1},
        "flagged": {"value": 1.0, "n": 2},
    }
    assert base_told["contamination"] is lost_told["contamination"] is None
    assert shown_told["contamination"]["flagged"] == {"value": 1.0, "n": 1}
    assert shown_told["contamination"]["unknown"] == {"value": 0.5, "n": 2}
    assert "2 of 3: 100.0%; the others 0.0%" in (artifact.path / "report.html").read_text()


def test_each_look_at_a_test_split_is_counted(model_server, config, tmp_path):
    workspace = Workspace(tmp_path)
    dataset = publish(workspace, "first", rows(["fig", "plum", "pear"]), rows(["kiwi"]))
    arm = Arm("base", Endpoint(model_server.url, "parrot"), (), "weights")
    looks = []
    for number in (1, 2, 2, 3):
        other = replace(arm, model_fingerprint=f"weights {number}")
        artifact = evaluate(config, workspace, dataset, [other], f"words-{number}").artifact
        looks.append(artifact.manifest["resources"]["num_looks"])
        assert json.loads((artifact.path / "metrics.json").read_text())["num_looks"] == number
    assert looks == [1, 2, 2, 3]
    assert "3 evaluations in this workspace" in (artifact.path / "report.html").read_text()
    # More train rows and the same test rows: another dataset, and one more look at these rows.
    more = publish(workspace, "more", rows(["fig", "plum", "pear"]), rows(["kiwi", "lime"]))
    artifact = evaluate(config, workspace, more, [arm], "other").artifact
    assert artifact.manifest["resources"]["num_looks"] == 4
    before = [f"evaluations/words-{number}@v1" for number in (1, 2, 3)]
    assert artifact.manifest["resources"]["looks"] == before
    assert json.loads((artifact.path / "metrics.json").read_text())["num_arms_scored"] == 4
    fresh = publish(workspace, "new", rows(["date"]), rows(["kiwi"]))
    artifact = evaluate(config, workspace, fresh, [arm], "fresh").artifact
    assert artifact.manifest["resources"]["num_looks"] == 1


def test_cost_per_thousand_requests_follows_price_and_counted_tokens(
    model_server, config, tmp_path
):
    workspace = Workspace(tmp_path)
    dataset = publish(workspace, "first", rows(["fig", "plum", "pear"]), rows(["kiwi"]))
    free = Arm("free", Endpoint(model_server.url, "parrot"))
    paid = replace(free, name="paid", price=Price(2.0, 10.0))
    artifact = evaluate(config, workspace, dataset, [free, paid], "words").artifact
    told = json.loads((artifact.path / "metrics.json").read_text())["arms"]
    # Two words asked, two words answered.
    assert [arm["mean_completion_tokens"] for arm in told] == [2.0, 2.0]
    assert told[0]["cost_per_1000_requests"] is None
    assert told[1]["cost_per_1000_requests"] == pytest.approx(1000 * (2 * 2 + 2 * 10) / 1e6)
