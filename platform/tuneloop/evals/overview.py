"""What a workspace holds, as rows and series that a page can show without computing anything."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneloop.artifacts import Artifact
from tuneloop.evals.findings import Evaluation, Verdict, format_estimate
from tuneloop.evals.views import format_number, show_pair

_LONGEST_TEXT = 90


@dataclass(frozen=True)
class EvaluationTables:
    """An evaluation as two tables, each a list of rows with the column names as keys."""

    verdict: Verdict
    arms: list[dict[str, Any]]
    pairs: list[dict[str, Any]]


def list_artifacts(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Return one row for each artifact, newest first."""
    return [
        {
            "artifact": artifact.ref,
            "kind": artifact.kind,
            "created": artifact.manifest["created_at"],
            "took_s": round(float(artifact.manifest["duration_s"]), 1),
            "size_mb": round(sum(f["bytes"] for f in artifact.manifest["files"]) / 1e6, 1),
            "metrics": describe_metrics(artifact.manifest["metrics"]),
        }
        for artifact in reversed(artifacts)
    ]


def describe_metrics(metrics: dict[str, Any]) -> str:
    """Return the numbers of a manifest as one short line; nested ones with their own names."""
    parts = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            inner = {k: v for k, v in value.items() if isinstance(v, (int, float, str))}
            parts += [f"{key} {_short(number)}" for key, number in inner.items()]
        elif value is not None:
            parts.append(f"{name} {_short(value)}")
    return ", ".join(parts)


def tabulate(evaluation: Evaluation) -> EvaluationTables:
    """Return an evaluation's arms and paired differences as tables."""
    metric = evaluation.metric(evaluation.primary)
    arms = [
        {
            "arm": arm["name"],
            evaluation.primary: format_estimate(arm["scores"][evaluation.primary], metric),
            "scored": arm["num_scored"],
            "unscored": arm["num_unscored"],
            "prompt tokens, mean": format_number(arm["mean_prompt_tokens"]),
            "answer tokens, median": format_number(arm["median_completion_tokens"]),
            "latency, median s": format_number(arm["median_latency_s"], 2),
        }
        for arm in evaluation.arms
    ]
    pairs = []
    for pair in evaluation.candidate_pairs():
        shown = show_pair(evaluation, pair)
        pairs.append(
            {
                "compared": f"{pair['arm']} − {pair['other']}",
                "difference": shown["difference"],
                "interval": shown["interval"],
                "p": shown["p"],
                "better": shown["num_fixed"],
                "worse": shown["num_worse"],
            }
        )
    return EvaluationTables(evaluation.verdict(), arms, pairs)


def read_training_log(model: Artifact) -> list[dict[str, Any]]:
    """Return the rows of a model's `trainer_log.parquet`, or none where there is none."""
    import pyarrow.parquet as pq

    file = model.path / "trainer_log.parquet"
    return pq.read_table(file).to_pylist() if file.is_file() else []


def read_text(artifact: Artifact, name: str) -> str:
    """Return a text file of an artifact, empty where it has none."""
    file = artifact.path / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def read_card(artifact: Artifact) -> str:
    """Return an artifact's `README.md` without the YAML block that hubs put before it."""
    return re.sub(r"\A---\n.*?\n---\n", "", read_text(artifact, "README.md"), flags=re.DOTALL)


def read_json(artifact: Artifact, name: str) -> Any:
    """Return a JSON file of an artifact, None where it has none."""
    text = read_text(artifact, name)
    return json.loads(text) if text else None


def sample_rows(dataset: Artifact, split: str, limit: int) -> list[dict[str, Any]]:
    """Return the first rows of a split: id, source, and its text or turns in full."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for file in sorted((dataset.path / split).glob("*.parquet")):
        source = pq.ParquetFile(file)
        names = {"row_id", "source", "messages", "text", "num_tokens"} & set(
            source.schema_arrow.names
        )
        for batch in source.iter_batches(limit, columns=sorted(names)):
            rows += batch.to_pylist()
            if len(rows) >= limit:
                return rows[:limit]
    return rows


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
