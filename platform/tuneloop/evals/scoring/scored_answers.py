"""Answers scored, with what is wrong with each; several answers to a row become one row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from tuneloop.errors import ConfigError
from tuneloop.evals.scoring.asking import EvaluationRequest, ModelAnswer
from tuneloop.evals.scoring.diagnosis import Diagnosis
from tuneloop.evals.scoring.lineage import is_contaminated
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.predictions import Prediction, mean_scores
from tuneloop.evals.scoring.row_clusters import RowClusters
from tuneloop.records import Arm

# What the samples of a row keep of an answer besides its text.
OF_ANSWERS = (
    *("finish_reason", "prompt_tokens", "completion_tokens", "latency_s", "error", "probability"),
)


class Context(NamedTuple):
    """What is known about the rows: clusters, those an arm has seen, and how errors are found."""

    clusters: RowClusters
    seen: Mapping[str, set[str]]
    diagnosis: Diagnosis


def score_answer(
    scorer: Scorer, request: EvaluationRequest, answer: ModelAnswer
) -> Mapping[str, float | None]:
    """Return an answer's scores by metric, of several right answers those of the nearest.

    Raises:
        ConfigError: A scorer of the user's own fails.
    """
    if request.question.text:
        return {"bits_per_byte": answer.bits_per_byte}
    try:
        reference = _nearest_reference(scorer, request, answer)
        return scorer.score(reference, answer.text, request.question.task)
    except ConfigError as error:
        # A function of the user's own: the answers that came are kept.
        row = f", row {request.question.example_id}"
        problems = [dataclasses.replace(p, where=p.where + row) for p in error.problems]
        raise ConfigError(*problems) from error


def _nearest_reference(scorer: Scorer, request: EvaluationRequest, answer: ModelAnswer) -> str:
    """Return that of the right answers by which an answer scores best; of equals the first.

    By the primary metric, and where that cannot tell, as of wrong answers, by the others.
    """
    question = request.question
    if not question.accepted:
        return question.reference
    sign = -1 if scorer.metrics[scorer.primary].better == "lower" else 1

    def score(reference: str) -> tuple[float, float]:
        scores = scorer.score(reference, answer.text, question.task)
        value = scores[scorer.primary]
        others = [
            known
            for name, known in scores.items()
            if known is not None and scorer.metrics[name].better == "higher"
        ]
        return -math.inf if value is None else sign * value, fmean(others) if others else 0.0

    return max((question.reference, *question.accepted), key=score)


def predict(
    scorer: Scorer, request: EvaluationRequest, answer: ModelAnswer, context: Context
) -> Prediction:
    """Return an answer as a row of `predictions.parquet`, scored, with what is wrong with it.

    Raises:
        ConfigError: A scorer or a tag of the user's own fails.
    """
    reference, finish_reason = request.question.reference, answer.finish_reason
    if finish_reason is not None:
        reference = _nearest_reference(scorer, request, answer)
    seen = context.seen.get(request.arm.name)
    scored = finish_reason is not None
    prediction = Prediction(
        example_id=answer.example_id,
        arm=request.arm.name,
        prompt=answer.prompt,
        reference=reference,
        completion=answer.text,
        finish_reason=finish_reason,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        latency_s=answer.latency_s,
        status="scored" if scored else "unscored",
        error=answer.error,
        scores=dict(score_answer(scorer, request, answer)) if scored else {},
        task=request.question.task,
        cluster=context.clusters.names.get(answer.example_id, answer.example_id),
        contaminated=is_contaminated(request.question, request.shots, seen),
        probability=answer.probability,
    )
    errors = context.diagnosis.find(prediction)
    return dataclasses.replace(
        prediction,
        error_tags=[error.tag for error in errors],
        error_evidence=[dataclasses.asdict(error) for error in errors],
    )


def with_samples(
    arms: Sequence[Arm], answers: Sequence[Prediction], primary: str
) -> list[Prediction]:
    """Return one row for each arm and example, with the means of its answers' scores.

    Args:
        arms: All arms.
        answers: As they were scored one by one, by the names of those that answer.
        primary: The metric whose scores of single answers are kept.
    """
    arm_of = {one.name: arm.name for arm in arms for one in arm.each}
    models = {model.name: model.endpoint.model for arm in arms for model in arm.models}
    rows: dict[tuple[str, str], list[Prediction]] = {}
    for answer in answers:
        rows.setdefault((arm_of[answer.arm], answer.example_id), []).append(answer)
    return [
        dataclasses.replace(_mean_of(of_row, primary, models), arm=arm)
        if len(of_row) > 1
        else of_row[0]
        for (arm, _), of_row in rows.items()
    ]


def _mean_of(answers: Sequence[Prediction], primary: str, models: Mapping[str, str]) -> Prediction:
    first = answers[0]
    samples = [
        {name: getattr(answer, name) for name in ("completion", "scores", *OF_ANSWERS)}
        | {"score": answer.scores.get(primary), "model": models.get(answer.arm, "")}
        for answer in answers
    ]
    # What one of an arm's models was trained on is not unseen by the arm.
    seen = {answer.contaminated for answer in answers}
    contaminated = True if True in seen else None if None in seen else False
    missing = next((answer for answer in answers if answer.status != "scored"), None)
    if missing is not None:
        # With the answers that came alone a row would count as often as one that has them all.
        return dataclasses.replace(missing, samples=samples, contaminated=contaminated)
    scores = mean_scores([answer.scores for answer in answers])
    return dataclasses.replace(first, scores=scores, samples=samples, contaminated=contaminated)
