"""All that changes the result of an evaluation, as its manifest keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuneloop.artifacts import Artifact
from tuneloop.config import EvaluationConfig, TuneloopConfig
from tuneloop.evals.scoring.asking import arm_identity
from tuneloop.evals.scoring.choosable import code_of_own_scorers
from tuneloop.evals.scoring.harness import models_to_compare, parts_of
from tuneloop.evals.scoring.judging import Judging
from tuneloop.records import Arm, SamplingParams


def sampling(evaluation: EvaluationConfig) -> SamplingParams:
    """Return how answers are sampled."""
    return SamplingParams(
        max_tokens=evaluation.max_tokens,
        temperature=evaluation.temperature,
        seed=evaluation.seed,
    )


def all_parts(
    config: TuneloopConfig, dataset: Artifact, arms: Sequence[Arm], judging: Judging | None
) -> dict[str, Any]:
    """Return all that changes the result, as the manifest keeps it."""
    params = sampling(config.evaluation)
    scorers = code_of_own_scorers(config.evaluation)
    no_results = {
        *("concurrency", "max_unscored_ratio", "arms", "sources", "budget", "floors"),
        *("judge", "forgetting"),
    }
    if config.evaluation.split == "test":
        no_results.add("split")  # evaluations from before there was a choice
    if config.evaluation.num_samples == 1:
        no_results.add("num_samples")
    return {
        "dataset": dataset.fingerprint,
        "task": config.task.model_dump(mode="json"),
        "evaluation": config.evaluation.model_dump(mode="json", exclude=no_results),
        **({"scorers": scorers} if scorers else {}),
        **({"judge": judging.parts()} if judging else {}),
        **_forgetting_parts(config, arms),
        "arms": [
            {
                "name": arm.name,
                "identity": arm_identity(arm, params),
                # Of several trainings of one recipe the first stands for its settings.
                "model": answered_by(arm.each[0]),
                "shots": [shot.row_id for shot in arm.each[0].shots],
            }
            | _sample_identities(arm, params, config.evaluation.num_samples)
            | ({"price": arm.price._asdict()} if arm.price else {})
            | _model_parts(arm, params, config.evaluation.num_samples)
            for arm in arms
        ],
    }


def _model_parts(arm: Arm, params: SamplingParams, num_samples: int) -> dict[str, Any]:
    if not arm.models:
        return {}
    return {
        "models": [
            {
                "name": model.endpoint.model,
                "identity": arm_identity(model, params),
                "model": answered_by(model),
            }
            | _sample_identities(model, params, num_samples)
            for model in arm.models
        ]
    }


def _sample_identities(arm: Arm, params: SamplingParams, num_samples: int) -> dict[str, Any]:
    if num_samples == 1:
        return {}
    return {"samples": [arm_identity(arm, params, sample) for sample in range(num_samples)]}


def _forgetting_parts(config: TuneloopConfig, arms: Sequence[Arm]) -> dict[str, Any]:
    settings = config.evaluation.forgetting
    return {"forgetting": parts_of(settings)} if settings and models_to_compare(arms) else {}


def answered_by(arm: Arm) -> str:
    """Return who answers for an arm that is one model, as lineage names it."""
    return arm.model_fingerprint or f"{arm.endpoint.model} at {arm.endpoint.url}"
