"""What a workspace holds, as rows and series that a page can show without computing anything."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact
from tuneloop.evals.reporting.formatting import format_cost, format_estimate, format_number
from tuneloop.evals.reporting.headline import Headline, describe_rows, write_headline
from tuneloop.evals.reporting.views import describe_trainings, show_pair
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.text import counted, shorten

_LONGEST_TEXT = 90
# As models of several families end a turn.
_END = re.compile(r"(?:<\|[^<>|\s]+\|>|<end_of_turn>|<eos>|</s>)\s*\Z")


@dataclass(frozen=True)
class EvaluationTables:
    """An evaluation as two tables, each a list of rows with the column names as keys."""

    headline: Headline
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

    A sweep scores each of its models alone, a baseline knows no finetuned model, and what an export
    or a gate compares are forms of one model, or two models without what prompting reaches.
    """
    evaluations = [artifact for artifact in artifacts if artifact.kind == "evaluations"]
    compared = [
        artifact
        for artifact in evaluations
        if len(artifact.manifest["config"].get("arms", [])) > 1
        and not artifact.name.endswith(("-baseline", "-export", "-gate"))
    ]
    return next(reversed(compared or evaluations), None)


def describe_metrics(metrics: dict[str, Any]) -> str:
    """Return the numbers of a manifest that tell most, as one short line."""
    if "num_train_rows" in metrics and "num_test_rows" in metrics:
        removed = metrics.get("num_removed", 0)
        return (
            f"{metrics['num_train_rows']:,} train and {metrics['num_test_rows']:,} test rows, "
            f"{removed:,} removed"
        )
    if "final_loss" in metrics:
        return (
            f"loss {metrics['first_loss']:.3f} at first, {metrics['final_loss']:.3f} at the end; "
            f"{counted(metrics['num_steps'], 'step')}"
        )
    if "primary" in metrics and "scores" in metrics:
        # The candidate is the last arm, and what is too long for the column is cut on the right.
        scores = reversed(metrics["scores"].items())
        listed = ", ".join(f"{arm} {_describe(score)}" for arm, score in scores)
        unscored = metrics.get("num_unscored", 0)
        return f"{metrics['primary']}: {listed}" + f"; {unscored:,} not scored" * bool(unscored)
    if "best_model" in metrics:
        return (
            f"{counted(metrics['num_trials'], 'trial')}; best {metrics['best_model']}: "
            f"{_describe(metrics['best_score'])}"
        )
    parts = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            inner = {k: v for k, v in value.items() if isinstance(v, (int, float, str))}
            parts += [f"{key} {_describe(number)}" for key, number in inner.items()]
        elif value is not None:
            parts.append(f"{name} {_describe(value)}")
    return ", ".join(parts)


def tabulate(evaluation: Evaluation) -> EvaluationTables:
    """Return an evaluation's arms and paired differences as tables."""
    metric = evaluation.metric(evaluation.primary)
    arms = [
        {
            "arm": arm["name"],
            evaluation.primary: format_estimate(arm["scores"][evaluation.primary], metric),
            "scored": describe_rows(evaluation, arm["scores"][evaluation.primary]),
            "unscored": arm["num_unscored"],
            "prompt tokens, mean": format_number(arm["mean_prompt_tokens"]),
            "answer tokens, median": format_number(arm["median_completion_tokens"]),
            "latency under load, median s": format_number(arm["median_latency_s"], 2),
            "cost per 1,000 requests": format_cost(arm.get("cost_per_1000_requests")),
        }
        | (
            {"trainings": describe_trainings(arm, evaluation.primary, metric)}
            if evaluation.scores_of_models()
            else {}
        )
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
    return EvaluationTables(write_headline(evaluation), arms, pairs)


def list_instructions(artifacts: Sequence[Artifact]) -> dict[str, str]:
    """Return the instruction of each task that datasets were prepared for, newest first.

    It is the system prompt of every row of the task. Of several versions the newest counts.
    """
    found: dict[str, str] = {}
    for artifact in reversed(artifacts):
        task = artifact.manifest["config"].get("task") if artifact.kind == "datasets" else None
        if not task:
            continue
        for name, one in (task.get("tasks") or {"": task}).items():
            label = f"{artifact.name}: {name}" if name else artifact.name
            if one.get("instruction", "").strip():
                found.setdefault(label, one["instruction"].strip())
    return found


def compare_settings(artifacts: Sequence[Artifact]) -> list[dict[str, str]]:
    """Return the settings in which artifacts differ, with a column for each."""
    flat = {a.ref: dict(_flat(a.manifest["config"])) for a in artifacts}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    return [
        {"setting": key, **{ref: str(settings.get(key, "–")) for ref, settings in flat.items()}}
        for key in keys
        if len({str(settings.get(key, "–")) for settings in flat.values()}) > 1
    ]


def _flat(config: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{key}{name}.")
        else:
            yield f"{key}{name}", value


def read_training_log(model: Artifact) -> list[dict[str, Any]]:
    """Return the rows of a model's `trainer_log.parquet`, or none where there is none."""
    file = model.path / "trainer_log.parquet"
    return pq.read_table(file).to_pylist() if file.is_file() else []


def read_samples(model: Artifact) -> list[dict[str, Any]]:
    """Return a model's answers during training: `step, row_id, prompt, reference, completion`."""
    # As bytes: a line of text also ends at U+2028, which may stand in an answer.
    return [json.loads(line) for line in read_text(model, "samples.jsonl").encode().splitlines()]


def prompt_labels(prompts: Sequence[str]) -> dict[str, str]:
    """Return a short label for each rendered prompt: what it does not share with the others.

    Prompts of a task all begin with the same instruction and end with the same header.
    """
    start = _shared_start(prompts)
    end = _shared_start([prompt[::-1] for prompt in prompts])
    # Whole words: a label must not begin in the middle of one.
    start = start[: max(start.rfind(" "), start.rfind("\n")) + 1]
    end = end[: max(end.rfind(" "), end.rfind("\n")) + 1]
    labels = {}
    for number, prompt in enumerate(dict.fromkeys(prompts), 1):
        own = prompt if len(prompts) == 1 else prompt[len(start) : len(prompt) - len(end)]
        labels[prompt] = f"{number}. {shorten(' '.join(own.split()), _LONGEST_TEXT)}"
    return labels


def _shared_start(texts: Sequence[str]) -> str:
    # What the first and the last in order begin with, all between them begin with.
    first, last = min(texts), max(texts)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(letter for letter, _ in same)


def without_end(text: str) -> str:
    """Return a decoded answer without the token that ended it."""
    return _END.sub("", text)


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


def _describe(value: float | str) -> str:
    return shorten(f"{value:.4g}" if isinstance(value, float) else str(value), _LONGEST_TEXT)
