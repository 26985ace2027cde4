"""What earlier evaluations were answered: nothing is asked twice, and what is missing is asked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence, Set

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.evals.scoring.asking import ModelAnswer, PartialAnswers, with_reference
from tuneloop.evals.scoring.judging import Judging, keep_judgements, read_judgements
from tuneloop.evals.scoring.metrics import PERPLEXITY, PERPLEXITY_METRICS
from tuneloop.evals.scoring.perplexity import identity_of, stored_answer
from tuneloop.evals.scoring.predictions import read_predictions
from tuneloop.evals.scoring.scored_answers import OF_ANSWERS
from tuneloop.evals.scoring.spending import Cost, Entry, Spending

_REFUSED = re.compile(
    r"HTTP 4(?!08|25|29)\d\d:|the text is a single token|there is no answer to it"
)


def may_be_completed(evaluation: Artifact) -> bool:
    """Return whether an answer is missing for a reason that may pass: a rate limit, not a refusal.

    The endpoint refused a prompt for good with a status from 400 to 499, but for a few.
    """
    if not missing_in(evaluation):
        return False
    metrics = json.loads((evaluation.path / "metrics.json").read_text(encoding="utf-8"))
    reasons = [reason for arm in metrics["arms"] for reason in arm["unscored_reasons"]]
    reasons += [j.error for j in read_judgements(evaluation.path) if j.error]
    return any(not _REFUSED.match(reason) for reason in reasons)


def missing_in(evaluation: Artifact) -> int:
    """Return how many answers of arms and of the judge an evaluation lacks."""
    metrics = evaluation.manifest["metrics"]
    return int(metrics.get("num_unscored", 0)) + int(metrics.get("num_unjudged", 0))


def count_published(spending: Spending, incomplete: Artifact | None) -> None:
    """Count what a published evaluation cost whose missing answers are now asked for."""
    spent = incomplete.manifest["resources"].get("spent") if incomplete else None
    if incomplete is None or not spent or spending.num_requests:
        return
    cost = Cost(spent["tokens"], spent["money"])
    spending.add(Entry(incomplete.ref, cost, {"error": "of an earlier run"}))


def reuse_answers(
    answered: PartialAnswers,
    workspace: Workspace,
    wanted: Set[str],
    judging: Judging | None = None,
) -> None:
    """Add what published evaluations were answered, by arms of these identities or the judge."""
    for artifact in workspace.published("evaluations"):
        config = artifact.manifest["config"]
        identities = {
            (arm["name"], one["name"] if "models" in arm else ""): one.get("samples")
            or [one["identity"]]
            for arm in config.get("arms", [])
            for one in arm.get("models", [arm])
            if one.get("identity") in wanted
        }
        if identities:
            _reuse_arms(answered, workspace.open(artifact.ref), identities)
        if judging and (config.get("judge") or {}).get("identity") == judging.identity:
            keep_judgements(answered, workspace.open(artifact.ref))


def _reuse_arms(
    answered: PartialAnswers, earlier: Artifact, identities: Mapping[tuple[str, str], Sequence[str]]
) -> None:
    """Add the answers that arms gave in an earlier evaluation, and what they knew of references.

    Args:
        identities: By arm, and by model where the arm has several, of each of the answers that were
            sampled.
    """
    every = read_predictions(earlier.path, ["bits_per_byte", *PERPLEXITY_METRICS])
    answers = [(p, model, p.of(model) if model else p) for p in every for model in p.models or [""]]
    for whole, model, prediction in answers:
        own = identities.get((prediction.arm, model))
        if own is None:
            continue
        if model and whole.status != "scored":
            # A row that lacks an answer has those that came in its samples alone.
            kept = [sample for sample in whole.samples if sample["model"] == model]
            prediction = dataclasses.replace(prediction, samples=kept)
        for name, sample in zip(own, prediction.samples, strict=False):
            if sample["finish_reason"] is not None:
                known = {k: v for k, v in sample.items() if k in OF_ANSWERS}
                bits = (sample.get("scores") or {}).get("bits_per_byte")
                answered.put(
                    name,
                    ModelAnswer(
                        prediction.example_id,
                        prediction.prompt,
                        sample["completion"],
                        bits_per_byte=bits,
                        **known,
                    ),
                )
        if prediction.status == "scored":
            if prediction.scores.get(PERPLEXITY):
                asked = with_reference(prediction.prompt, prediction.reference)
                answered.put(identity_of(own[0]), stored_answer(prediction, asked))
            if prediction.samples:
                continue
            answered.put(
                own[0],
                ModelAnswer(
                    prediction.example_id,
                    prediction.prompt,
                    prediction.completion,
                    bits_per_byte=prediction.scores.get("bits_per_byte"),
                    **{name: getattr(prediction, name) for name in OF_ANSWERS},
                ),
            )
