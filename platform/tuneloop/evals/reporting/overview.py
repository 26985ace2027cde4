"""What a workspace holds, as rows and series that a page can show without computing anything."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneloop.artifacts import Artifact
from tuneloop.evals.reporting.findings import Evaluation, Verdict, format_estimate
from tuneloop.evals.reporting.views import format_number, show_pair

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


def newest_comparison(artifacts: Sequence[Artifact]) -> Artifact | None:
    """Return the newest evaluation that compares arms, else the newest one, or None.

    A sweep scores each of its models alone, and a baseline knows no finetuned model.
    """
    evaluations = [artifact for artifact in artifacts if artifact.kind == "evaluations"]
    compared = [
        artifact
        for artifact in evaluations
        if len(artifact.manifest["config"].get("arms", [])) > 1
        and not artifact.name.endswith("-baseline")
    ]
    found = compared or evaluations
    return found[-1] if found else None


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


def read_samples(model: Artifact) -> list[dict[str, Any]]:
    """Return a model's answers during training: `step, row_id, prompt, reference, completion`."""
    return [json.loads(line) for line in read_text(model, "samples.jsonl").splitlines()]


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


def read_rows(dataset: Artifact, folder: str) -> list[dict[str, Any]]:
    """Return the rows of `train`, `test` or `removed`, without their token ids."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for file in sorted((dataset.path / folder).glob("*.parquet")):
        source = pq.ParquetFile(file)
        names = [n for n in source.schema_arrow.names if n not in {"input_ids", "loss_mask"}]
        rows += source.read(columns=names).to_pylist()
    return rows


def search_rows(rows: Sequence[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    """Return the rows that contain every word, in any column and any case."""
    wanted = words.casefold().split()
    if not wanted:
        return list(rows)
    texts = (json.dumps(row, ensure_ascii=False, default=str).casefold() for row in rows)
    return [
        row for row, text in zip(rows, texts, strict=True) if all(word in text for word in wanted)
    ]


def describe_parity(parity: dict[str, Any]) -> str:
    """Return in one sentence whether the exported model is the trained one."""
    if "max_abs_logprob_diff" not in parity:
        return "The export was compared with the trained model."
    if not parity["passed"]:
        return "The exported model is NOT the trained one."
    same = "the same tokens" if parity["greedy_equal"] else "the same tokens but for exact ties"
    return (
        f"The exported model picks {same} as the trained one over {parity['tokens']:,} tokens of "
        f"{parity['prompts']} prompts; log-probabilities differ by at most "
        f"{parity['max_abs_logprob_diff']:.1e} (allowed {parity['tolerance']:.0e})."
    )


@dataclass(frozen=True)
class SweepView:
    """A sweep, ready to draw.

    Args:
        keys: The swept dotted keys.
        points: One for each scored trial: `rows, score, low, high, series, trial, best`.
        lines: The ends of every fitted line: `rows, score, series`.
        sentences: What each line says.
        trials: The table, with readable column names.
        problems: Trials without a score, and why.
        best: Reference of the best trial's model; empty when no trial finished.
        percent: Scores are shares.
    """

    metric: str
    keys: list[str]
    points: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    sentences: list[str]
    trials: list[dict[str, Any]]
    problems: list[tuple[str, str]]
    best: str
    best_words: str
    percent: bool


def read_sweep(sweep: Artifact) -> SweepView:
    """Return a sweep's trials, points and fitted lines from its two files."""
    import pyarrow.parquet as pq

    trials = pq.read_table(sweep.path / "trials.parquet").to_pylist()
    curve = read_json(sweep, "curve.json")
    keys = list(curve["keys"])
    best = curve.get("best") or {}
    others = [key for key in keys if key != "data.num_train_examples"]
    scores = [trial["score"] for trial in trials if trial["score"] is not None]
    percent = bool(scores) and all(0 <= score <= 1 for score in scores)
    points, rows, problems = [], [], []
    any_failed = any(trial["status"] != "done" for trial in trials)
    for number, trial in enumerate(trials):
        name = ", ".join(f"{key}={trial[key]}" for key in keys)
        is_best = number == best.get("trial")
        if trial["score"] is None:
            problems.append((name, str(trial.get("problem") or trial.get("status"))))
        else:
            points.append(
                {
                    "rows": trial["num_train_examples"],
                    "place": trial["num_train_examples"],
                    "score": trial["score"],
                    "low": trial["low"],
                    "high": trial["high"],
                    "series": _series(", ".join(f"{key}={trial[key]}" for key in others)),
                    "trial": name,
                    "best": is_best,
                }
            )
        rows.append(
            {
                "": "best" if is_best else "",
                **{key: str(trial[key]) for key in keys},
                **(
                    {}
                    if "data.num_train_examples" in keys
                    else {"train rows": format_number(trial["num_train_examples"])}
                ),
                "parameters": _millions(trial["num_parameters"]),
                curve["metric"]: _score(trial["score"], percent),
                "95% interval": (
                    "–"
                    if trial["low"] is None
                    else f"{_score(trial['low'], percent)} to {_score(trial['high'], percent)}"
                ),
                "loss": format_number(trial["loss"], 3),
                "time, s": format_number(trial["wall_s"]),
                **({"status": trial["status"]} if any_failed else {}),
                "model": trial["model"] or "–",
            }
        )
    _move_apart(points)
    return SweepView(
        metric=curve["metric"],
        keys=keys,
        points=points,
        lines=_line_ends(curve["curves"]),
        sentences=[_line_in_words(line, percent) for line in curve["curves"]],
        trials=rows,
        problems=problems,
        best=str(best.get("model") or ""),
        best_words=next(
            (f"{_score(p['score'], percent)} with {p['trial']}" for p in points if p["best"]), ""
        ),
        percent=percent,
    )


def _move_apart(points: list[dict[str, Any]]) -> None:
    """Draw points of one size beside each other: intervals on one line cannot be told apart."""
    series = sorted({point["series"] for point in points})
    for point in points:
        steps = series.index(point["series"]) - (len(series) - 1) / 2
        point["place"] = point["rows"] * 2 ** (0.012 * steps)


def _line_ends(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    ends = []
    for line in curves:
        if line["slope"] is None:
            continue
        sizes = [size for size, _ in line["points"]]
        for size in (min(sizes), max(sizes)):
            score = line["intercept"] + line["slope"] * math.log2(size)
            ends.append({"rows": size, "score": score, "series": _series(line["series"])})
    return ends


def _line_in_words(line: dict[str, Any], percent: bool) -> str:
    name = _series(line["series"])
    if line["slope"] is None:
        return f"{name}: one size only, so there is no line."
    gain = f"{100 * line['slope']:+.1f} points" if percent else f"{line['slope']:+.3f}"
    words = f"{name}: {gain.replace('-', '−')} for each doubling of the training rows"
    if line["residual"] is None:
        return words + " (two sizes: the line goes through both points)."
    spread = f"{100 * line['residual']:.1f} points" if percent else f"{line['residual']:.3f}"
    return words + f"; the points lie {spread} from the line on average."


def _series(label: str) -> str:
    return label or "all trials"


def _millions(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.0f} M"


def _score(value: float | None, percent: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if percent else f"{value:.3f}"


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
