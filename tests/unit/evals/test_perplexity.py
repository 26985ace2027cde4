"""How probable references are: asked with the model's own ids, and not asked twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.errors import ConfigError
from tuneloop.evals.runner import evaluate, find_unanswered
from tuneloop.evals.scoring.choosable import chosen_metrics
from tuneloop.records import Arm, Endpoint, Message, Sample


def encode(messages: list[Message], tools: str) -> Sample:
    """A token for each message before the last, and one for each of its letters; ids tell which."""
    *before, answer = messages
    assert all(m.weight == 0 for m in before if m.role == "assistant")
    letters = [1 + "abc".index(letter) for letter in answer.content]
    return Sample([7] * len(before) + letters, [0] * len(before) + [1] * len(letters))


@pytest.fixture
def dataset(tmp_path: Path) -> Artifact:
    turns = [("user", "first?"), ("assistant", "c"), ("user", "second?")]
    rows = [
        {
            "row_id": answer,
            "messages": [
                {"role": role, "content": text} for role, text in [*turns, ("assistant", answer)]
            ],
            "num_tokens": 5,
        }
        for answer in ("abc", "aa")
    ]
    with Workspace(tmp_path).draft("datasets", "letters", "d" * 64) as draft:
        for split in ("train", "test"):
            (draft.path / split).mkdir()
            pq.write_table(pa.Table.from_pylist(rows), draft.path / split / "part-0.parquet")
        return draft.publish(config={}, resources={}, inputs=[], metrics={})


def config(*metrics: str, primary: str | None = None) -> TuneloopConfig:
    evaluation: dict[str, Any] = {"num_resamples": 200, "metrics": metrics, "primary": primary}
    return TuneloopConfig.model_validate(
        {
            "name": "letters",
            "task": {"type": "generation"},
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "letters.jsonl", "format": "messages"}]},
            "evaluation": evaluation,
        }
    )


def test_references_are_scored_by_the_models_own_ids_once(model_server, tmp_path, dataset):
    asked = config("perplexity", "token_f1")
    own = Arm("own", Endpoint(model_server.url, "parrot"), (), "weights", encode=encode)
    other = replace(own, name="elsewhere", model_fingerprint="", encode=None)
    workspace = Workspace(tmp_path)
    artifact = evaluate(asked, workspace, dataset, [other, own], "letters").artifact
    prompts = [body["prompt"] for body in model_server.requests if "prompt" in body]
    assert sorted(prompts) == [[7, 7, 7, 1, 1], [7, 7, 7, 1, 2, 3]]
    rows = pq.read_table(artifact.path / "predictions.parquet").to_pylist()
    scored = {row["example_id"]: row for row in rows if row["arm"] == "own"}
    # The server's model finds a token with id n to have probability exp(-n).
    assert scored["abc"]["perplexity"] == pytest.approx(math.exp(2))
    assert scored["abc"]["reference_bits_per_byte"] == pytest.approx(6 / math.log(2) / 3)
    assert scored["aa"]["perplexity"] == pytest.approx(math.exp(1))
    assert {row["perplexity"] for row in rows if row["arm"] == "elsewhere"} == {None}
    metrics = json.loads((artifact.path / "metrics.json").read_text())
    assert metrics["primary"] == "token_f1"
    value = metrics["arms"][1]["scores"]["perplexity"]["value"]
    assert value == pytest.approx((math.exp(2) + math.exp(1)) / 2)
    report = (artifact.path / "report.html").read_text()
    assert "perplexity of the reference, by tokens" in report

    num_asked = len(model_server.requests)
    assert find_unanswered(asked, workspace, dataset, [own]) == []
    again = evaluate(asked, workspace, dataset, [own], "again").artifact
    assert len(model_server.requests) == num_asked
    rows = pq.read_table(again.path / "predictions.parquet").to_pylist()
    assert [row["perplexity"] for row in rows] == [
        scored[r["example_id"]]["perplexity"] for r in rows
    ]


@pytest.mark.parametrize(
    ("metrics", "primary", "told"),
    [
        (["perplexity"], None, "add `token_f1`"),
        (["perplexity", "chrf"], "perplexity", "this metric cannot decide"),
    ],
)
def test_perplexity_alone_decides_nothing(metrics, primary, told):
    asked = config(*metrics, primary=primary)
    with pytest.raises(ConfigError) as refused:
        chosen_metrics(asked.task, asked.evaluation)
    assert told in str(refused.value)
