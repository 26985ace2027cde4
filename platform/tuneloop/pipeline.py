"""The loop, readable from top to bottom: prepare, measure the base, train, measure again.

Each step reuses an artifact with the same fingerprint, so a run that was cut short resumes where
it stopped, and a run without changes only looks things up.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from tuneloop import contest
from tuneloop.artifacts import Artifact, Published, Workspace
from tuneloop.cluster import connect, refuse_unshared
from tuneloop.config import (
    API_KEY_VARIABLE,
    NO_DIFFERENCE,
    DataConfig,
    Section,
    ServingConfig,
    SourceConfig,
    TuneloopConfig,
)
from tuneloop.contest import Contest
from tuneloop.data.labels import resolve_labels
from tuneloop.data.scored_rows import prepare_scored_rows
from tuneloop.errors import ConfigError, ModelError
from tuneloop.evals.scoring.harness import make_environment
from tuneloop.evals.scoring.judging import Judging
from tuneloop.models.bases.source import BaseModel, resolve_base
from tuneloop.models.export.parity import check_served
from tuneloop.records import BASE, FEW_SHOT, FINETUNED, SIMPLE, Arm, Endpoint, Parity
from tuneloop.review.fixes import marks_for
from tuneloop.serving import app
from tuneloop.serving.keys import keyring, refuse_exposed
from tuneloop.serving.loaded import ServedModel
from tuneloop.text import shorten
from tuneloop.training import launch

logger = logging.getLogger("tuneloop.pipeline")

S = TypeVar("S", bound=Section)
_SHOWN_CHARACTERS = 200  # of what was found; `check` and the dataset card have all of it


class Trained(NamedTuple):
    """A finetuned model, with the configuration and the dataset it was trained with."""

    config: TuneloopConfig
    dataset: Artifact
    model: Artifact


def with_labels(config: TuneloopConfig) -> TuneloopConfig:
    """Return the configuration with the labels of its classifications: see `resolve_labels`."""
    labelled = resolve_labels(config)
    for notice in labelled.notices:
        _tell_once(notice.what, notice.got)
    return labelled.config


@cache
def _tell_once(what: str, got: str) -> None:
    """Log what was found: the trials of a sweep find the same."""
    logger.info("%s: %s", what, shorten(got, _SHOWN_CHARACTERS))


def prepare(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return the dataset artifact in a list, made or reused."""
    config = with_labels(config)
    with connect(config.resources):
        return [prepare_dataset(config, workspace, resolve_base(config.model.base))]


def generate(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return the dataset of rows that a larger model writes, in a list, made or reused.

    Pairs need documents alone; all other kinds need the train rows, which are prepared first.

    Raises:
        ConfigError: There is no `generation` section, or `generation.more_of` names nothing.
    """
    from tuneloop.synthesis.generate import generate_rows
    from tuneloop.synthesis.more_of import more_of_problems
    from tuneloop.synthesis.pairs import generate as generate_pairs

    if config.generation is None:
        raise ConfigError.of(
            "nothing says what to generate",
            where="generation",
            got="no such section",
            remedy="give generation.endpoint, generation.model and generation.sources",
        )
    ConfigError.refuse(more_of_problems(config, workspace))
    base = resolve_base(config.model.base)
    if config.generation.kind == "pairs":
        return [_log_published(generate_pairs(config, workspace, base))]
    config = with_labels(config)
    with connect(config.resources):
        dataset = prepare_dataset(config, workspace, base).artifact
    return [_log_published(generate_rows(config, workspace, base, dataset))]


def train(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return dataset and model artifact, made or reused."""
    config = with_labels(config)
    with connect(config.resources):
        base = resolve_base(config.model.base)
        dataset = prepare_dataset(config, workspace, base)
        return [dataset, train_model(config, workspace, base, dataset.artifact)]


def run(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return dataset, baseline, model and evaluation artifact, made or reused.

    The base model is measured before anything is trained: what prompting alone reaches is the
    bar that finetuning has to clear.
    """
    ConfigError.refuse(contest.judging_problems(config))
    if config.evaluation.arms:
        logger.info("evaluation.arms is for `tuneloop evaluate`; this compares the usual arms")
    _make_environment(config)
    config = with_labels(config)
    judging = contest.build_judging(config, workspace, config.name)
    with connect(config.resources):
        base = resolve_base(config.model.base)
        dataset = prepare_dataset(config, workspace, base)
        models = {BASE: contest.base_model(config, base)}
        arms = contest.base_arms(config, workspace, base, dataset.artifact)
        entered = Contest(dataset.artifact, arms, models)
        baseline = _evaluate(config, workspace, entered, f"{config.name}-baseline")
        model = train_model(config, workspace, base, dataset.artifact)
        finetuned = _finetuned_arm(config, workspace, model.artifact)
        entered = Contest(
            dataset.artifact,
            [*arms, *contest.finetuned_arms(config, finetuned, dataset.artifact)],
            {**models, FINETUNED: contest.finetuned_model(model.artifact)},
        )
        evaluation = _evaluate(config, workspace, entered, config.name, judging)
        return [dataset, baseline, model, evaluation]


def evaluate(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return the evaluation of what the configuration names, in a list; trains nothing.

    Without `evaluation.arms` these are the arms of `run`, `finetuned` only if there is one. The
    dataset is prepared if an arm or the rows come from it.

    Raises:
        ConfigError: An arm of `evaluation.arms` cannot be built.
        ModelError: An arm is the model of this configuration, and there is none.
    """
    return [evaluate_named(config, workspace)]


def gate(
    config: TuneloopConfig, workspace: Workspace, against: str, candidate: str | None = None
) -> Published:
    """Return `evaluations/NAME-gate`: a candidate and what it is held against, on the same rows.

    Without `evaluation.margin` a loss of less than 5 points is taken not to matter, as in the
    headline of a report; bits per byte, which are no points, need one.

    Args:
        config: Says which rows are answered and how they are scored.
        workspace: Holds the models.
        against: An artifact such as `models/faq@v1`, what `model.base` takes, or an arm's name.
        candidate: Likewise. Default: the newest model of this configuration.

    Raises:
        ConfigError: Plain text is scored, and there is no margin.
        ArtifactError: No such model.
        ModelError: There is no model of this configuration.
    """
    if config.evaluation.margin is None and config.task.type == "language_modeling":
        raise ConfigError.of(
            "a gate of plain text needs a margin: bits per byte are no points",
            where="evaluation.margin",
            remedy="set the loss that does not matter, for example 0.01",
        )
    if candidate is None:
        own = _own_models(with_labels(config), workspace, resolve_base(config.model.base))
        if not own:
            raise contest.missing_model(config, workspace)
        candidate = own[-1].ref
    arms = contest.gate_arms(config, workspace, against, candidate)
    margin = config.evaluation.margin or NO_DIFFERENCE
    update = {"arms": arms, "margin": margin, "forgetting": None}
    evaluation = config.evaluation.model_copy(update=update)
    named = config.model_copy(update={"evaluation": evaluation})
    return evaluate_named(named, workspace, f"{config.name}-gate")


def evaluate_named(
    config: TuneloopConfig, workspace: Workspace, name: str = "", rows: Artifact | None = None
) -> Published:
    """Return the evaluation of the arms that the configuration names.

    Args:
        name: Of the artifact; else the configuration's, with `-baseline` for arms without a model.
        rows: The dataset whose held-out rows are answered, for arms that need no other. Default:
            as the configuration says.
    """
    ConfigError.refuse(contest.arm_problems(config, workspace))
    _make_environment(config)
    config = with_labels(config)
    base = cache(partial(resolve_base, config.model.base))
    with ExitStack() as stack:
        if contest.needs_ray(config):
            stack.enter_context(connect(config.resources))
        prepared = scored = None
        if rows is None and contest.needs_dataset(config):
            prepared = prepare_dataset(config, workspace, base()).artifact
        if rows is None and config.evaluation.sources:
            marks = marks_for(config, workspace, scored=True)
            scored = _log_published(prepare_scored_rows(config, workspace, marks)).artifact
        dataset = rows or scored or prepared
        assert dataset is not None, "without `evaluation.sources` the dataset is needed"

        def finetuned() -> Artifact:
            model = prepared and _trained(config, workspace, base(), prepared)
            if not model:
                raise contest.missing_model(config, workspace)
            return model

        named = contest.NamedArms(config, workspace, base, prepared, finetuned)
        arms = named.build()
        is_baseline = not config.evaluation.arms and arms[-1].name != FINETUNED
        own_name = f"{config.name}-baseline" if is_baseline else config.name
        entered = Contest(dataset, arms, named.models)
        # A gate decides by the metric alone.
        judging = None if name else contest.build_judging(config, workspace, own_name)
        return _evaluate(config, workspace, entered, name or own_name, judging)


def _make_environment(config: TuneloopConfig) -> None:
    """Make what the general tasks need, before anything that takes longer."""
    if config.evaluation.forgetting is not None:
        make_environment(config.evaluation.forgetting)


def _trained(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, dataset: Artifact
) -> Artifact | None:
    """Return the model that exactly this configuration trains, or None."""
    return workspace.find("models", config.name, launch.identity(config, base, dataset))


@contextmanager
def serve(config: TuneloopConfig, workspace: Workspace) -> Iterator[tuple[str, list[str]]]:
    """Serve the base, the model finetuned with this configuration, and `serving.models`.

    Yields:
        The base URL and the names of the models.

    Raises:
        ModelError: The engine cannot be used, a model cannot be loaded, an adapter belongs to
            another base, or a served model answers differently from the trained one.
        ArtifactError: `serving.models` names an artifact that is not there.
        ResourceError: The port is taken, or there is no room for the models.
        ConfigError: The keys are wrong, or other machines would reach the models without one.
    """
    ModelError.refuse(contest.engine_problems(config))
    keys, own = keyring(config.serving), ""
    refuse_exposed(config.serving.host, keys)
    if keys:
        # The check of what is served needs a key as well, which ends with this process.
        own = secrets.token_hex(24)
        keys = keys.with_secret("tuneloop", own)
    app.free_port(config.serving)  # a taken one is an error before Ray starts
    models = served_models(config, workspace)
    with connect(config.resources), app.serve(models, config.serving, keys) as url:
        _check_served(url, models, own)
        yield url, list(models)


def served_models(config: TuneloopConfig, workspace: Workspace) -> dict[str, ServedModel]:
    """Return what `serve` serves, by name."""
    config = with_labels(config)
    base = resolve_base(config.model.base)
    models = {BASE: contest.base_model(config, base)}
    finetuned = _newest_finetuned(config, workspace, base)
    if finetuned is not None:
        models[FINETUNED] = contest.finetuned_model(finetuned)
        logger.info("%s is %s", FINETUNED, finetuned.ref)
    for name, reference in config.serving.models.items():
        models[name] = contest.referenced_model(
            workspace, base, f"serving.models.{name}", reference
        )
    return models


def _newest_finetuned(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel
) -> Artifact | None:
    """Return the newest model that this configuration makes, else the newest of its name.

    A sweep, or a run with overrides, leaves models of the same name with other settings.
    """
    trained = workspace.published("models", config.name)
    same = _own_models(config, workspace, base)
    if trained and not same:
        logger.warning("no model was trained with exactly this configuration: serving the newest")
    return workspace.open((same or trained)[-1].ref) if trained else None


def _own_models(config: TuneloopConfig, workspace: Workspace, base: BaseModel) -> list[Artifact]:
    """Return the models that this configuration makes, oldest first."""
    datasets = {
        a.train_fingerprint
        for a in workspace.published("datasets")
        if _is_told(config.data, a.manifest["config"].get("data"), _by_name)
        and _is_told(config.task, a.manifest["config"].get("task"))
    }
    template = launch.template_identity(config.model.chat_template)
    return [
        model
        for model in workspace.published("models", config.name)
        if _is_told(config.training, model.manifest["config"]["training"])
        and model.manifest["config"]["base_fingerprint"] == base.fingerprint
        and model.manifest["config"].get("chat_template", template) == template
        and model.manifest["config"]["dataset"] in datasets
    ]


def _is_told(settings: S, told: object, view: Callable[[S], S] = lambda whole: whole) -> bool:
    """Return whether a manifest tells these settings; what it does not know has its default.

    Args:
        view: Of the settings, what is compared.
    """
    try:
        return view(type(settings).model_validate(told)) == view(settings)
    except ValidationError:
        return False


def _by_name(data: DataConfig) -> DataConfig:
    """Return the settings with the names of files alone: a job has them in another place."""

    def named(source: SourceConfig) -> SourceConfig:
        return source.model_copy(update={"path": PurePath(source.path).name})

    held_out = data.decontamination
    update = {"sources": [named(source) for source in held_out.sources]}
    fixes = PurePath(data.fixes).name if isinstance(data.fixes, str) else data.fixes
    return data.model_copy(
        update={
            "sources": [named(source) for source in data.sources],
            "decontamination": held_out.model_copy(update=update),
            "fixes": fixes,
        }
    )


def _check_served(url: str, models: dict[str, ServedModel], key: str) -> dict[str, Parity]:
    """Return, by name, how close each served model is to its recorded answers.

    Raises:
        ModelError: One of them answers differently.
    """
    outcomes = {}
    for name, model in models.items():
        outcome = check_served(Endpoint(url, name, key), model.folder)
        if outcome is not None:
            outcomes[name] = outcome
            logger.info(
                "%s answers as it did in training: %d tokens, log-probabilities within %.1e",
                name,
                outcome.tokens,
                outcome.max_abs_logprob_diff,
            )
    return outcomes


def prepare_dataset(config: TuneloopConfig, workspace: Workspace, base: BaseModel) -> Published:
    """Return the dataset artifact, made or reused. Needs a running Ray."""
    from tuneloop.data.prepare import prepare

    refuse_unshared(workspace.root, base.path)
    return _log_published(prepare(config, workspace, base, marks_for(config, workspace)))


def train_model(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, dataset: Artifact
) -> Published:
    """Return the model artifact, made or reused. Needs a running Ray."""
    return _log_published(launch.train(config, workspace, base, dataset))


def evaluate_each(trained: Sequence[Trained], workspace: Workspace) -> list[Published]:
    """Return the evaluation of each finetuned model alone, made or reused. Needs a running Ray.

    They are served one after the other at one address. Those on the validation split are named
    apart.
    """
    with ExitStack() as stack:

        @cache
        def url() -> str:
            return stack.enter_context(app.listen(_any_port(trained[0].config)))

        return [
            _evaluate(
                config,
                workspace,
                Contest(
                    dataset,
                    [_finetuned_arm(config, workspace, model)],
                    {FINETUNED: contest.finetuned_model(model)},
                ),
                f"{config.name}-sweep{'-validation' * (config.evaluation.split == 'validation')}",
                address=url,
            )
            for config, dataset, model in trained
        ]


def evaluate_untrained(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, dataset: Artifact
) -> Published | None:
    """Return the evaluation of the few-shot prompt and the simple arm, made or reused.

    None where the task has neither. Needs a running Ray.
    """
    untrained = contest.base_arms(config, workspace, base, dataset)
    arms = [arm for arm in untrained if arm.name in (FEW_SHOT, SIMPLE)]
    if not arms:
        return None
    is_asked = any(arm.name == FEW_SHOT for arm in arms)
    models = {BASE: contest.base_model(config, base)} if is_asked else {}
    entered = Contest(dataset, arms, models)
    return _evaluate(config, workspace, entered, f"{config.name}-sweep-baseline")


def finetuned_identities(
    config: TuneloopConfig, base: BaseModel, dataset: Artifact
) -> tuple[str, str]:
    """Return the fingerprints of the model and of its evaluation alone, before they are made."""
    from tuneloop.evals import runner

    model = launch.identity(config, base, dataset)
    return model, runner.identity(config, dataset, [contest.finetuned_arm(model)])


def _finetuned_arm(config: TuneloopConfig, workspace: Workspace, model: Artifact) -> Arm:
    arm = contest.finetuned_arm(model.fingerprint)
    return contest.with_lineage(arm, workspace, model.path, config.task)


def _evaluate(
    config: TuneloopConfig,
    workspace: Workspace,
    entered: Contest,
    name: str,
    judging: Judging | None = None,
    address: Callable[[], str] | None = None,
) -> Published:
    """Serve the models and score the arms; serve nothing if the result is there already.

    Args:
        name: Name of the evaluation artifact.
        judging: Who compares the answers.
        address: Starts to listen and returns the URL, if several evaluations share it.
    """
    from tuneloop.evals.runner import evaluate, find_evaluation, find_unanswered

    dataset, arms, models = entered
    existing = find_evaluation(config, workspace, dataset, arms, name, judging)
    if existing is not None:
        return _log_published(Published(existing, reused=True))

    def with_tokenizer(arm: Arm) -> Arm:
        return contest.with_tokenizer(arm, entered.models.get(arm.endpoint.model))

    arms = [arm.changed(with_tokenizer) for arm in arms]
    # A model whose answers are all there is not started.
    asked = {arm.endpoint.model for arm in find_unanswered(config, workspace, dataset, arms)}
    models = {model: served for model, served in models.items() if model in asked}
    if not models:
        return _log_published(evaluate(config, workspace, dataset, arms, name, judging))
    with ExitStack() as stack:
        serving = _any_port(config)
        url = address() if address else stack.enter_context(app.listen(serving))
        app.host(models, serving, url)
        key = os.environ.get(API_KEY_VARIABLE, "")
        outcomes = _check_served(url, models, key)

        def served(arm: Arm) -> Arm:
            if arm.endpoint.url or arm.endpoint.model not in models:
                return arm
            endpoint = Endpoint(url, arm.endpoint.model, key)
            return replace(arm, endpoint=endpoint, parity=outcomes.get(arm.endpoint.model))

        arms = [arm.changed(served) for arm in arms]
        return _log_published(evaluate(config, workspace, dataset, arms, name, judging))


def _any_port(config: TuneloopConfig) -> ServingConfig:
    """Return settings with any free port: `tuneloop serve` may be using the configured one.

    Those who may ask `tuneloop serve` do not ask here; without a key nobody from outside does.
    """
    changed: dict[str, Any] = {"port": 0, "api_keys_file": ""}
    if not os.environ.get(API_KEY_VARIABLE):
        changed["host"] = "127.0.0.1"
    return config.serving.model_copy(update=changed)


def _log_published(published: Published) -> Published:
    logger.info("%s %s", "reusing" if published.reused else "published", published.artifact.ref)
    return published
