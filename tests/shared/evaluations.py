"""Made-up evaluations, as files of a workspace and in memory."""

from __future__ import annotations

import json
from dataclasses import replace

from tuneloop.artifacts import Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.evals.reporting.actions import Action
from tuneloop.evals.reporting.advice import Situation
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.error_tags import tag_errors
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.predictions import (
    Prediction,
    write_predictions,
)
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.records import TRAIN_LIMIT

TASKS = {
    "extraction": ({"type": "extraction"}, '{"a": 1}', '{"a": 2}'),
    "classification": ({"type": "classification", "labels": ["yes", "no"]}, "yes", "no"),
    "generation": ({"type": "generation"}, "a red fox ran", "a blue whale swam"),
    "language_modeling": ({"type": "language_modeling"}, "", ""),
}


def make_config(task: dict) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": "demo",
            "task": task,
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
        }
    )


def make_evaluation(
    right: dict[str, int],
    n: int = 100,
    task: str = "extraction",
    wrong_answer: str | None = None,
    finish: str = "stop",
) -> Evaluation:
    """Return an evaluation in which each arm has its first `right` examples right."""
    settings, reference, wrong = TASKS[task]
    config = make_config(settings)
    ids = [f"r{index:03d}" for index in range(n)]
    scorer = Scorer(config.task, dict.fromkeys(ids, reference))
    rows = []
    for arm, num_right in right.items():
        for index, example in enumerate(ids):
            good = index < num_right
            text = reference if good else wrong if wrong_answer is None else wrong_answer
            reason = "stop" if good else finish
            plain = task == "language_modeling"
            rows.append(
                Prediction(
                    example, arm, json.dumps([{"role": "user", "content": f"Q {example}"}]),
                    reference, text, reason, 12, 5, 0.2, "scored", "",
                    [] if plain else tag_errors(scorer, reference, text, reason),
                    {"bits_per_byte": 1.0 - good * 0.5 + index / 1000}
                    if plain else scorer.score(reference, text),
                )
            )  # fmt: skip
    resampling = Resampling(num_resamples=300)
    return Evaluation(
        "demo", rows, summarise(rows, scorer, resampling), compare(rows, scorer, resampling)
    )


def situation(evaluation: Evaluation, **more) -> Situation:
    told = {
        "reference": "evaluations/demo@v1", "config_file": "demo.yaml", "took_s": 100.0,
        "num_epochs": 2, "curve": {}, "num_waiting": 0, "trained_s": 60.0, "max_tokens": 80,
    }  # fmt: skip
    return Situation(evaluation, **{**told, **more})


def titles(actions: list[Action]) -> list[str]:
    return [action.title for action in actions]


def publish_version(
    workspace: Workspace,
    evaluation: Evaluation,
    num_rows: int,
    num_epochs: int,
    max_tokens: int = 80,
    source: str = "a",
    **training: float,
) -> None:
    """Publish a dataset, a model and an evaluation of it."""
    dataset, model, own = (f"{len(workspace.published())}{kind}" * 8 for kind in "dme")
    origin = {"file": "demo.yaml", "overrides": ["workspace=here"]}
    origin["overrides"] += [f"training.{name}={value:.0e}" for name, value in training.items()]
    told = {
        "resources": {"configuration": origin, "concurrency": 2},
        "inputs": [],
        "metrics": {"num_train_rows": num_rows},
    }
    with workspace.draft("datasets", "demo", dataset) as draft:
        reason = {"stage": "split", "reason": f"{TRAIN_LIMIT} {num_rows} of the train split"}
        card = {"reasons": [{**reason, "rows": 1000 - num_rows}]}
        (draft.path / "card.json").write_text(json.dumps(card))
        split = {"num_test_examples": 20, "test_ratio": None}
        data = {"num_train_examples": num_rows, "split": split}
        draft.publish(config={"data": data}, **{**told, "inputs": [f"x.jsonl sha256:{source}"]})
    with workspace.draft("models", "demo", model) as draft:
        trained = {"num_epochs": num_epochs, **training}
        draft.publish(config={"dataset": dataset, "training": trained}, **told)
    publish_evaluation(workspace, evaluation, own, dataset, model, told, max_tokens)


def publish_evaluation(
    workspace: Workspace,
    evaluation: Evaluation,
    own: str,
    dataset: str,
    model: str,
    told: dict,
    max_tokens: int = 80,
) -> None:
    with workspace.draft("evaluations", "demo", own) as draft:
        # Macro-F1 is of all rows: it has no column.
        names = [name for name in evaluation.metrics["metrics"] if name != "macro_f1"]
        write_predictions(evaluation.predictions, names, draft.path)
        for name in ("metrics", "comparison"):
            text = json.dumps(getattr(evaluation, name))
            (draft.path / f"{name}.json").write_text(text)
        task = make_config(TASKS[evaluation.metrics["task_type"]][0]).task
        asked = {
            "dataset": dataset,
            "task": task.model_dump(mode="json"),
            "arms": [{"name": "finetuned", "model": model}],
            "evaluation": {"max_tokens": max_tokens},
        }
        draft.publish(config=asked, **told)


def by_macro_f1(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation whose answers macro-F1 decides about."""
    return replace(evaluation, metrics={**evaluation.metrics, "primary": "macro_f1"})
