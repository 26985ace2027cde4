"""Evaluation: every arm answers a held-out split over HTTP; the result is a published artifact."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.config import BudgetConfig, ForgettingConfig, TuneloopConfig
from tuneloop.errors import ConfigError, EndpointError, Problem, UserError
from tuneloop.evals.reporting.actions import Action
from tuneloop.evals.reporting.report import render_report
from tuneloop.evals.reporting.situation import actions_after, read_versions
from tuneloop.evals.scoring.asking import (
    EvaluationRequest,
    ModelAnswer,
    PartialAnswers,
    arm_identity,
    ask_all,
)
from tuneloop.evals.scoring.budget import cost_per_1000, mean_count
from tuneloop.evals.scoring.calibration import describe_calibration
from tuneloop.evals.scoring.cheapest import find_cheapest
from tuneloop.evals.scoring.choosable import chosen_metrics, metrics_by_task, own_tags, primary_of
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.diagnosis import Diagnosis, read_train
from tuneloop.evals.scoring.forgetting import describe_forgetting
from tuneloop.evals.scoring.harness import FILE as FORGETTING_FILE
from tuneloop.evals.scoring.harness import (
    DocumentScore,
    models_to_compare,
    parts_of,
    read_scores,
    run_harness,
    stored_scores,
    write_scores,
)
from tuneloop.evals.scoring.harness import identity_of as identity_of_scores
from tuneloop.evals.scoring.identity import all_parts, answered_by, sampling
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.judged_pairs import describe_judging
from tuneloop.evals.scoring.judging import (
    Judgement,
    JudgeQuestions,
    Judging,
    are_on_these,
    write_judgements,
)
from tuneloop.evals.scoring.known_answers import (
    count_published,
    may_be_completed,
    missing_in,
    reuse_answers,
)
from tuneloop.evals.scoring.lineage import describe_contamination, find_looks, find_seen
from tuneloop.evals.scoring.metrics import PERPLEXITY, Scorer
from tuneloop.evals.scoring.nearest import open_nearest
from tuneloop.evals.scoring.perplexity import perplexities, reference_requests
from tuneloop.evals.scoring.predictions import (
    Prediction,
    by_model,
    read_predictions,
    write_predictions,
)
from tuneloop.evals.scoring.questions import Question, read_questions
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.row_clusters import read_clusters
from tuneloop.evals.scoring.scored_answers import Context, predict, score_answer, with_samples
from tuneloop.evals.scoring.slices import describe_slices, find_slices, read_columns
from tuneloop.evals.scoring.spending import Spending
from tuneloop.records import Arm, SamplingParams

_log = logging.getLogger("tuneloop.evals")
STEP = "evaluate"
# Raised when a change here or in metrics, error tags, intervals or report changes the results.
CODE_VERSION = 38


def find_evaluation(
    config: TuneloopConfig,
    workspace: Workspace,
    dataset: Artifact,
    arms: Sequence[Arm],
    name: str,
    judging: Judging | None = None,
) -> Artifact | None:
    """Return the published evaluation of these arms, or None.

    One in which answers are missing that another try may bring is not taken: it is asked for
    what is missing. Arms with a `model_fingerprint` need no endpoint for this: nothing has to be
    served to find out that there is nothing to do.
    """
    published = workspace.find("evaluations", name, identity(config, dataset, arms, judging))
    return None if published is None or may_be_completed(published) else published


def _add_perplexity(
    predictions: Sequence[Prediction],
    requests: Sequence[EvaluationRequest],
    answered: PartialAnswers,
    concurrency: int,
) -> None:
    """Add to the answers how probable each arm that can be asked finds the reference."""
    asked = reference_requests(requests)
    # These arms are served here and cost nothing.
    answers = ask_all(asked, answered, concurrency, BudgetConfig(), lambda *_: None)
    found = perplexities(asked, answers)
    for prediction in predictions:
        if prediction.status == "scored":
            prediction.scores.update(found.get((prediction.arm, prediction.example_id), {}))


def _general_scores(
    config: TuneloopConfig, workspace: Workspace, arms: Sequence[Arm], scratch: Path
) -> list[DocumentScore]:
    """Return the scores of the models before and after on general tasks; none unless asked for."""
    settings, models = config.evaluation.forgetting, models_to_compare(arms)
    if settings is None or models is None:
        return []
    scores: list[DocumentScore] = []
    for arm in models:
        known = _known_scores(settings, workspace, arm)
        if not known:
            kept = scratch / f"{identity_of_scores(settings, arm)}.parquet"
            if not kept.exists():
                folder = scratch / f"harness-{identity_of_scores(settings, arm)}"
                folder.mkdir(exist_ok=True)
                write_scores(run_harness(settings, arm, folder), kept.with_suffix(".new"))
                kept.with_suffix(".new").rename(kept)
            known = read_scores(kept)
        scores += [dataclasses.replace(score, arm=arm.name) for score in known]
    return scores


def _known_scores(
    settings: ForgettingConfig, workspace: Workspace, arm: Arm
) -> list[DocumentScore]:
    """Return what a published evaluation has of a model on these tasks; none if there is none."""
    published = [
        workspace.open(artifact.ref)
        for artifact in workspace.published("evaluations")
        if "forgetting" in artifact.manifest["config"]
    ]
    return stored_scores(published, identity_of_scores(settings, arm))


def _add_forgetting(
    evaluation: Evaluation,
    config: TuneloopConfig,
    arms: Sequence[Arm],
    scores: Sequence[DocumentScore],
) -> None:
    """Add to the comparison what was forgotten on general tasks."""
    models, settings = models_to_compare(arms), config.evaluation.forgetting
    assert models is not None, "there are scores"
    assert settings is not None, "there are scores"
    e = config.evaluation
    resampling = Resampling(e.confidence, e.num_resamples, e.seed)
    told = describe_forgetting(scores, models, resampling)
    evaluation.comparison["forgetting"] = told | {"harness": parts_of(settings)}


def find_unanswered(
    config: TuneloopConfig, workspace: Workspace, dataset: Artifact, arms: Sequence[Arm]
) -> list[Arm]:
    """Return the arms that some question has to be put to: no published evaluation has its answer.

    Those that answer themselves are not among them.
    """
    questions = read_questions(dataset, config.task.tasks, config.evaluation.split)
    answered, params = PartialAnswers(), sampling(config.evaluation)
    num_samples = config.evaluation.num_samples
    arms = [one for arm in arms for one in arm.each]
    asked = {
        arm.name: _requests(arm, questions, params, num_samples) for arm in arms if not arm.answer
    }
    reuse_answers(answered, workspace, {r.identity for of in asked.values() for r in of})
    with_perplexity = any(m.name == PERPLEXITY for m in config.evaluation.metrics)

    def lacks(arm: Arm) -> bool:
        requests = asked[arm.name]
        requests = [*requests, *(reference_requests(requests) if with_perplexity else [])]
        settings = config.evaluation.forgetting
        is_compared = settings is not None and arm in (models_to_compare(arms) or ())
        # The harness asks as well.
        if settings and is_compared and not _known_scores(settings, workspace, arm):
            return True
        return any(answered.get(request) is None for request in requests)

    return [arm for arm in arms if arm.answer is None and lacks(arm)]


def identity(
    config: TuneloopConfig, dataset: Artifact, arms: Sequence[Arm], judging: Judging | None = None
) -> str:
    """Return the fingerprint of what `evaluate` makes of arms with a `model_fingerprint`."""
    return fingerprint(STEP, CODE_VERSION, **all_parts(config, dataset, arms, judging))


def evaluate(
    config: TuneloopConfig,
    workspace: Workspace,
    dataset: Artifact,
    arms: Sequence[Arm],
    name: str,
    judging: Judging | None = None,
) -> Published:
    """Score every arm on `evaluation.split` and publish `evaluations/<name>`.

    What any evaluation in the workspace was answered, by the same model with the same shots and
    sampling to the same prompt, is not asked again.

    Args:
        config: `task` and `evaluation` say what is asked and how it is scored.
        workspace: Where the artifact goes.
        dataset: Its `evaluation.split` is answered.
        arms: At least one. Each is compared with all before it; the last one is the candidate
            that the report's headline is about.
        name: Name of the artifact.
        judging: Who compares the answers of the last arm with those of the others; None: nobody.

    Returns:
        The artifact; reused if it exists already.

    Raises:
        ConfigError: No arm, or two of one name.
        DataError: Nothing to score, or references that cannot be scored against.
        EndpointError: An endpoint is unusable, or an arm got no answer at all. Nothing is
            published. Answers are kept, and the same call resumes from there.
    """
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) < len(names):
        raise ConfigError.of(
            "an evaluation needs arms with different names", got=", ".join(names) or "none"
        )
    published = find_evaluation(config, workspace, dataset, arms, name, judging)
    if published is not None:
        return Published(published, reused=True)
    e = config.evaluation
    questions = read_questions(dataset, config.task.tasks, e.split)
    clusters = read_clusters(dataset, e.group_by, e.split)
    each = [one for arm in arms for one in arm.each]
    seen = find_seen(each, questions)
    scorer = make_scorer(config, questions)
    tags = own_tags(e)
    if questions[0].reference:
        for tag in tags:
            tag.find(questions[0].reference, questions[0].reference, questions[0].example_id)
    params = sampling(config.evaluation)
    requests = [
        request for one in each for request in _requests(one, questions, params, e.num_samples)
    ]
    made = identity(config, dataset, arms, judging)
    with workspace.draft("evaluations", name, made) as draft:
        incomplete = workspace.find("evaluations", name, made)
        answered = PartialAnswers(draft.scratch / "answers.jsonl")
        count_published(answered.spending, incomplete)
        answered.spending.warn_of_lost(_log)
        reuse_answers(answered, workspace, {request.identity for request in requests}, judging)
        # Nor what a run with other arms was answered before it was cut short.
        for other in draft.scratch.parent.parent.glob(f"evaluations-{name}-*/scratch"):
            if other != draft.scratch:
                answered.read(other / "answers.jsonl")
        answers = ask_all(
            requests,
            answered,
            config.evaluation.concurrency,
            config.evaluation.budget,
            lambda request, answer: score_answer(scorer, request, answer)[scorer.primary],
        )
        _refuse_many_unscored(requests, answers, config.evaluation.max_unscored_ratio)
        train = read_train(workspace, dataset, arms, list(config.task.tasks))
        context = Context(clusters, seen, Diagnosis(scorer, questions, train, tags))
        first = [
            predict(scorer, request, answer, context)
            for request, answer in zip(requests, answers, strict=True)
        ]
        if PERPLEXITY in scorer.metrics:
            _add_perplexity(first, requests, answered, e.concurrency)
        predictions = with_samples(arms, first, scorer.primary)
        if any(prediction.samples for prediction in predictions):
            scorer = scorer.averaged()
        judgements = []
        if judging:
            asked = JudgeQuestions(judging, predictions, questions)
            judgements = asked.judgements(
                ask_all(asked.requests(), answered, e.concurrency, e.budget, lambda *_: None)
            )
        scores = _general_scores(config, workspace, arms, draft.scratch)
        num_missing = sum(prediction.status != "scored" for prediction in predictions)
        num_missing += sum(bool(judgement.error) for judgement in judgements)
        if incomplete is not None and num_missing >= missing_in(incomplete):
            _log.warning("%d answers are still missing from %s", num_missing, incomplete.ref)
            return Published(incomplete, reused=True)
        free = _free_arms(arms, params)
        own = [arm for arm, of in free.items() if of == arms[-1].name]
        evaluation = _build(config, predictions, scorer, name, context.clusters.by, own)
        looks = find_looks(workspace, dataset, e.split)
        evaluation.metrics.update(
            num_looks=1 + len(looks.evaluations),
            num_arms_scored=len(looks.arm_identities | {arm_identity(one, params) for one in each}),
        )
        columns = read_columns(dataset, e.split)
        own_references = {q.example_id: q.reference for q in questions}
        slices = find_slices(predictions, columns, scorer, clusters.by, own_references)
        evaluation.slices.update(describe_slices(predictions, slices, scorer, e.confidence))
        evaluation.metrics["error_tags"] = context.diagnosis.meanings
        _account(evaluation, arms, free)
        candidates = [p for p in predictions if p.arm == arms[-1].name]
        context.diagnosis.write_nearest(candidates, draft.path)
        evaluation = dataclasses.replace(evaluation, nearest=open_nearest(draft.path))
        if judging:
            _add_judge(evaluation, judging, judgements, workspace)
            write_judgements(judgements, draft.path)
        if scores:
            _add_forgetting(evaluation, config, arms, scores)
            write_scores(scores, draft.path / FORGETTING_FILE)
        write_predictions(predictions, list(scorer.metrics), draft.path)
        parts = all_parts(config, dataset, arms, judging)
        _write_numbers(draft.path, evaluation)
        actions = _actions(config, workspace, evaluation, draft.unpublished(parts))
        report = render_report(evaluation, config, dataset.ref, actions)
        (draft.path / "report.html").write_text(report, encoding="utf-8")
        _write_parity(draft.path, each)
        artifact = draft.publish(
            config=parts,
            resources={
                "configuration": config.origin._asdict(),
                "concurrency": config.evaluation.concurrency,
                "num_looks": evaluation.metrics["num_looks"],
                "looks": looks.evaluations,
                "spent": _spent(answered.spending),
                "endpoints": {one.name: one.endpoint.url for one in each if one.endpoint.url},
            },
            inputs=[dataset.ref, *dict.fromkeys(answered_by(one) for one in each)],
            metrics=evaluation.headline_numbers(),
        )
    return Published(artifact, reused=False)


def make_scorer(config: TuneloopConfig, questions: Sequence[Question]) -> Scorer:
    """Return the scorer of these questions, with the metrics that the configuration chooses.

    Raises:
        ConfigError: A metric that cannot score this task; a scorer of the user's own that fails.
        DataError: References that cannot be scored against.
    """
    metrics = chosen_metrics(config.task, config.evaluation)
    scorer = Scorer(
        config.task,
        {q.example_id: q.reference for q in questions},
        {q.example_id: q.task for q in questions},
        metrics,
        "" if config.task.tasks else primary_of(config.task, config.evaluation, metrics),
        metrics_by_task(config.task, config.evaluation) if config.task.tasks else None,
    )
    # Whatever is wrong with a scorer is told before anything is asked and paid for.
    if config.evaluation.metrics and not questions[0].text:
        for question in {question.task: question for question in reversed(questions)}.values():
            scorer.score(question.reference, question.reference, question.task)
    return scorer


def _refuse_many_unscored(
    requests: Sequence[EvaluationRequest], answers: Sequence[ModelAnswer], max_ratio: float
) -> None:
    """Raise if so many answers of an arm are missing that its score is another test's."""
    problems = []
    for arm in dict.fromkeys(request.arm.name for request in requests):
        of_arm = [a for r, a in zip(requests, answers, strict=True) if r.arm.name == arm]
        errors = Counter(answer.error for answer in of_arm if answer.finish_reason is None)
        # A row of which one of several answers is missing has no score.
        missing = len({answer.example_id for answer in of_arm if answer.finish_reason is None})
        total = len({answer.example_id for answer in of_arm})
        if missing > max_ratio * total:
            reason, count = errors.most_common(1)[0]
            problems.append(
                Problem(
                    f"too many questions of `{arm}` have no answer",
                    got=f"{missing} of {total}; {count} times: {reason}",
                    allowed=f"at most {max_ratio:.0%} (evaluation.max_unscored_ratio)",
                    remedy="run it again: the answers that came are kept, and only the others are "
                    "asked for",
                )
            )
    EndpointError.refuse(problems)


def _spent(spending: Spending) -> dict[str, Any]:
    """Return what an evaluation cost at endpoints, as the manifest keeps it."""
    return {
        "tokens": spending.spent.tokens,
        "money": round(spending.spent.money, 6),
        "num_lost_replies": spending.num_lost,
    }


def _requests(
    arm: Arm, questions: Sequence[Question], params: SamplingParams, num_samples: int
) -> list[EvaluationRequest]:
    """Return every question to one arm, with the solved examples before it.

    What is no draw has one answer: that of an arm that answers itself, the most probable label, how
    probable a text is.
    """
    own = arm.choose(questions) if arm.choose else {}
    names = [arm_identity(arm, params, sample) for sample in range(num_samples)]
    requests = []
    for question in questions:
        is_drawn = not (
            arm.answer or question.text or "ranking" in arm.forms.get(question.task, {})
        )
        for sample, name in enumerate(names if is_drawn else names[:1]):
            shots = own.get(question.example_id, arm.shots)
            requests.append(EvaluationRequest(arm, name, question, params, shots, sample=sample))
    return requests


def _build(
    config: TuneloopConfig,
    predictions: list[Prediction],
    scorer: Scorer,
    name: str,
    cluster_by: str,
    no_opponents: Collection[str],
) -> Evaluation:
    resampling = Resampling(
        config.evaluation.confidence, config.evaluation.num_resamples, config.evaluation.seed
    )
    _log.info("comparing the arms with %d resamples", resampling.num_resamples)
    return Evaluation(
        name=name,
        predictions=predictions,
        metrics=summarise(predictions, scorer, resampling, cluster_by),
        comparison=compare(predictions, scorer, resampling, config.evaluation.margin, no_opponents),
    )


def _free_arms(arms: Sequence[Arm], params: SamplingParams) -> dict[str, str | None]:
    """Return by each arm with constrained answers the one that asks the same without that."""
    names = {arm_identity(arm, params): arm.name for arm in reversed(arms)}
    return {
        arm.name: names.get(
            arm_identity(arm.changed(lambda one: dataclasses.replace(one, forms={})), params)
        )
        for arm in arms
        if arm.each[0].forms
    }


def _account(
    evaluation: Evaluation, arms: Sequence[Arm], free_arms: Mapping[str, str | None]
) -> None:
    """Add what answers cost, scores on rows that were seen, how sure labels are, what is enough."""
    for arm, about in zip(arms, evaluation.metrics["arms"], strict=True):
        rows = [p for p in evaluation.predictions if p.arm == arm.name]
        # What one answer of one model costs, and how sure each was.
        answers = [answer for of_model in by_model(rows).values() for answer in of_model]
        if arm.name in free_arms:
            about["free_arm"] = free_arms[arm.name]
        if calibration := describe_calibration(answers, evaluation.row_metric):
            about["calibration"] = calibration
        about |= {
            "answered_by": _describe_source(arm),
            "mean_completion_tokens": mean_count([p.completion_tokens for p in answers]),
            "cost_per_1000_requests": cost_per_1000(arm, answers),
            "contamination": describe_contamination(rows, evaluation.row_metric),
        }
    metric = evaluation.metric(evaluation.primary)
    evaluation.comparison["enough"] = find_cheapest(
        arms, evaluation.arms, evaluation.comparison, metric
    )


def _add_judge(
    evaluation: Evaluation,
    judging: Judging,
    judgements: Sequence[Judgement],
    workspace: Workspace,
) -> None:
    """Add to the comparison what the judge said of each pair of arms, and people with it."""
    voted = {
        artifact.ref: read_predictions(workspace.open(artifact.ref).path, [])
        for artifact in workspace.published("evaluations")
        if artifact.ref in {vote.evaluation for vote in judging.votes}
    }
    counts = are_on_these(judging.votes, evaluation.predictions, voted)
    votes = [vote for vote, is_on_these in zip(judging.votes, counts, strict=True) if is_on_these]
    evaluation.comparison["judge"] = describe_judging(evaluation, judging, judgements, votes)


def _describe_source(arm: Arm) -> str:
    """Return what answered, in words."""
    if arm.models:
        named = [f"{m.endpoint.model} ({m.model_fingerprint[:12]})" for m in arm.models]
        how = _describe_source(arm.models[0]).partition(", ")[2].partition(", ")[2]
        text = f"served here, {len(named)} trainings of one recipe: {', '.join(named)}"
        return f"{text}; {how}" if how else text
    if arm.answer is not None:
        return (
            f"answers in {arm.endpoint.url}" if arm.endpoint.url else "learned from the train rows"
        )
    if arm.model_fingerprint:
        text = f"served here, model {arm.model_fingerprint[:12]}"
    else:
        text = f"{arm.endpoint.model} at {arm.endpoint.url}"
    if arm.price:
        text += f", {arm.price.input:g} in and {arm.price.output:g} out for a million tokens"
    if arm.forms:
        text += ", answers held to their form"
    if arm.choose:
        return f"{text}, with the solved train rows most like each question"
    if arm.shots:
        # A mixture's question is shown those of its own task.
        num_shots = max(Counter(shot.task for shot in arm.shots).values())
        same = " of the same task" if any(shot.task for shot in arm.shots) else ""
        return f"{text}, with {num_shots} solved train rows{same} before each question"
    return text


def _actions(
    config: TuneloopConfig, workspace: Workspace, evaluation: Evaluation, artifact: Artifact
) -> list[Action]:
    """Return what to do next; of a gate, a baseline or a trial of a sweep nothing."""
    if artifact.name != config.name:
        return []
    try:
        versions = read_versions(workspace, artifact.name, [artifact])
    except (UserError, OSError, ValueError) as error:
        _log.warning("the report has no advice, since an earlier version cannot be read: %s", error)
        return []
    return actions_after(workspace, evaluation, versions, config)


def _write_numbers(folder: Path, evaluation: Evaluation) -> None:
    for file, content in (
        ("metrics.json", evaluation.metrics),
        ("comparison.json", evaluation.comparison),
        ("slices.json", evaluation.slices),
    ):
        (folder / file).write_text(
            json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8"
        )


def _write_parity(folder: Path, arms: Sequence[Arm]) -> None:
    """Store how served models answered compared with the trained ones: `parity.json`, by arm."""
    outcomes = {arm.name: dataclasses.asdict(arm.parity) for arm in arms if arm.parity is not None}
    if outcomes:
        (folder / "parity.json").write_text(json.dumps(outcomes, indent=2), encoding="utf-8")
