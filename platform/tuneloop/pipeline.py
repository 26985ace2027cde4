"""The loop, readable from top to bottom: prepare, measure the base, train, measure again.

Each step reuses an artifact with the same fingerprint, so a run that was cut short resumes where
it stopped, and a run without changes only looks things up.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from tuneloop.artifacts import Artifact, Published, Workspace
from tuneloop.cluster import connect, refuse_unshared
from tuneloop.config import ServingConfig, TuneloopConfig
from tuneloop.errors import ModelError, Problem
from tuneloop.models.bases.source import BaseModel, resolve_base
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.export.layout import ADAPTER
from tuneloop.models.export.parity import check_served
from tuneloop.records import BASE, FEW_SHOT, FINETUNED, SIMPLE, Arm, Endpoint, Parity
from tuneloop.serving import app
from tuneloop.serving.replica import ServedModel

logger = logging.getLogger("tuneloop.pipeline")


class Contest(NamedTuple):
    """What is evaluated: a dataset's test split, the arms, and the models that answer for them."""

    dataset: Artifact
    arms: list[Arm]
    models: dict[str, ServedModel]


class Trained(NamedTuple):
    """A finetuned model, with the configuration and the dataset it was trained with."""

    config: TuneloopConfig
    dataset: Artifact
    model: Artifact


def prepare(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return the dataset artifact in a list, made or reused."""
    with connect(config.resources):
        return [prepare_dataset(config, workspace, resolve_base(config.model.base))]


def generate(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return the dataset of pairs that a larger model writes, in a list, made or reused."""
    from tuneloop.synthesis.pairs import generate as generate_pairs

    return [_log_published(generate_pairs(config, workspace, resolve_base(config.model.base)))]


def train(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return dataset and model artifact, made or reused."""
    with connect(config.resources):
        base = resolve_base(config.model.base)
        dataset = prepare_dataset(config, workspace, base)
        return [dataset, train_model(config, workspace, base, dataset.artifact)]


def run(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return dataset, baseline, model and evaluation artifact, made or reused.

    The base model is measured before anything is trained: what prompting alone reaches is the
    bar that finetuning has to clear.
    """
    with connect(config.resources):
        base = resolve_base(config.model.base)
        dataset = prepare_dataset(config, workspace, base)
        models = {BASE: _base_model(config, base)}
        arms = _base_arms(config, base, dataset.artifact)
        contest = Contest(dataset.artifact, arms, models)
        baseline = _evaluate(config, workspace, contest, f"{config.name}-baseline")
        model = train_model(config, workspace, base, dataset.artifact)
        if not baseline.artifact.manifest["metrics"]["num_unscored"]:
            models = {}  # all answers of the base model are there and are reused
        contest = Contest(
            dataset.artifact,
            [*arms, _finetuned_arm(model.artifact.fingerprint)],
            {**models, FINETUNED: _finetuned_model(model.artifact)},
        )
        evaluation = _evaluate(config, workspace, contest, config.name, baseline.artifact)
        return [dataset, baseline, model, evaluation]


def evaluate(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return the evaluation of base, few-shot and finetuned model, in a list, made or reused.

    What it needs is made first, as by `run`.
    """
    return run(config, workspace)[-1:]


@contextmanager
def serve(config: TuneloopConfig, workspace: Workspace) -> Iterator[tuple[str, list[str]]]:
    """Serve the base, the model finetuned with this configuration, and `serving.models`.

    Yields:
        The base URL and the names of the models.

    Raises:
        ModelError: A model cannot be loaded, an adapter belongs to another base, or a served
            model answers differently from the trained one.
        ArtifactError: `serving.models` names an artifact that is not there.
        ResourceError: The port is taken, or there is no room for the models.
    """
    app.free_port(config.serving)  # a taken one is an error before Ray starts
    models = served_models(config, workspace)
    with connect(config.resources), app.serve(models, config.serving) as url:
        _check_served(url, models)
        yield url, list(models)


def served_models(config: TuneloopConfig, workspace: Workspace) -> dict[str, ServedModel]:
    """Return what `serve` serves, by name."""
    base = resolve_base(config.model.base)
    models = {BASE: _base_model(config, base)}
    finetuned = _newest_finetuned(config, workspace, base)
    if finetuned is not None:
        models[FINETUNED] = _finetuned_model(finetuned)
        logger.info("%s is %s", FINETUNED, finetuned.ref)
    for name, reference in config.serving.models.items():
        models[name] = _referenced_model(workspace, base, f"serving.models.{name}", reference)
    return models


def _newest_finetuned(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel
) -> Artifact | None:
    """Return the newest model that this configuration makes, else the newest of its name.

    A sweep, or a run with overrides, leaves models of the same name with other settings.
    """
    artifacts = workspace.published()
    trained = [a for a in artifacts if (a.kind, a.name) == ("models", config.name)]
    settings = config.model_dump(mode="json")
    datasets = {
        a.fingerprint
        for a in artifacts
        if a.kind == "datasets"
        and (a.manifest["config"].get("data"), a.manifest["config"].get("task"))
        == (settings["data"], settings["task"])
    }
    same = [
        model
        for model in trained
        if model.manifest["config"]["training"] == settings["training"]
        and model.manifest["config"]["base_fingerprint"] == base.fingerprint
        and model.manifest["config"]["dataset"] in datasets
    ]
    if trained and not same:
        logger.warning("no model was trained with exactly this configuration: serving the newest")
    return workspace.open((same or trained)[-1].ref) if trained else None


def _referenced_model(
    workspace: Workspace, base: BaseModel, where: str, reference: str
) -> ServedModel:
    """Return the model a value of `serving.models` names."""
    if not reference.startswith("models/"):
        return ServedModel(resolve_base(reference).path)
    artifact = workspace.open(reference.removesuffix(f"/{ADAPTER}"))
    if not reference.endswith(f"/{ADAPTER}"):
        return _finetuned_model(artifact)
    merged = f"serve the merged weights: {artifact.ref}"
    if not (artifact.path / ADAPTER).is_dir():
        raise ModelError(
            Problem(
                "the model has no adapter",
                where=where,
                got=f"{reference}, trained with method full",
                remedy=merged,
            )
        )
    trained_on = artifact.manifest["config"]
    if trained_on["base_fingerprint"] != base.fingerprint:
        raise ModelError(
            Problem(
                "the adapter belongs to another base model",
                where=where,
                got=f"{reference}, trained on {trained_on['base']} "
                f"({trained_on['base_fingerprint'][:12]})",
                allowed=f"adapters on {base.name} ({base.fingerprint[:12]})",
                remedy=f"{merged}; or set model.base to {trained_on['base']}",
            )
        )
    return ServedModel(base.path, adapter=artifact.path)


def _check_served(url: str, models: dict[str, ServedModel]) -> dict[str, Parity]:
    """Return, by name, how close each served model is to its recorded answers.

    Raises:
        ModelError: One of them answers differently.
    """
    key = os.environ.get(app.API_KEY_VARIABLE, "")
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
    return _log_published(prepare(config, workspace, base))


def train_model(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, dataset: Artifact
) -> Published:
    """Return the model artifact, made or reused. Needs a running Ray."""
    from tuneloop.training.launch import train

    return _log_published(train(config, workspace, base, dataset))


def evaluate_each(trained: Sequence[Trained], workspace: Workspace) -> list[Published]:
    """Return the evaluation of each finetuned model alone, made or reused. Needs a running Ray.

    They are served one after the other at one address.
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
                    [_finetuned_arm(model.fingerprint)],
                    {FINETUNED: _finetuned_model(model)},
                ),
                f"{config.name}-sweep",
                address=url,
            )
            for config, dataset, model in trained
        ]


def finetuned_identities(
    config: TuneloopConfig, base: BaseModel, dataset: Artifact
) -> tuple[str, str]:
    """Return the fingerprints of the model and of its evaluation alone, before they are made."""
    from tuneloop.evals import runner
    from tuneloop.training import launch

    model = launch.identity(config, base, dataset)
    return model, runner.identity(config, dataset, [_finetuned_arm(model)])


def _finetuned_arm(model_fingerprint: str) -> Arm:
    return Arm(FINETUNED, Endpoint("", FINETUNED), (), model_fingerprint)


def _base_model(config: TuneloopConfig, base: BaseModel) -> ServedModel:
    return ServedModel(base.path, config.model.chat_template)


def _finetuned_model(model: Artifact) -> ServedModel:
    # Its directory carries the tokenizer and the template it was trained with.
    return ServedModel(model.path)


def _base_arms(config: TuneloopConfig, base: BaseModel, dataset: Artifact) -> list[Arm]:
    """Return the arms that train no model: plain prompt, solved examples before it, simple arm."""
    from tuneloop.evals.scoring.questions import choose_shots
    from tuneloop.evals.scoring.simple import simple_arm

    endpoint = Endpoint("", BASE)
    renderer = Renderer.load(base.path, config.model.chat_template)
    identity = f"{base.fingerprint}/{renderer.hash}"
    arms = [Arm(BASE, endpoint, (), identity)]
    if config.evaluation.num_shots and config.task.type != "language_modeling":
        e = config.evaluation
        shots = choose_shots(dataset, e.num_shots, e.seed, list(config.task.tasks))
        arms.append(Arm(FEW_SHOT, endpoint, shots, identity))
    if config.task.type != "language_modeling":
        arms.append(simple_arm(SIMPLE, dataset))
    return arms


def _evaluate(
    config: TuneloopConfig,
    workspace: Workspace,
    contest: Contest,
    name: str,
    earlier: Artifact | None = None,
    address: Callable[[], str] | None = None,
) -> Published:
    """Serve the models and score the arms; serve nothing if the result is there already.

    Args:
        name: Name of the evaluation artifact.
        earlier: An evaluation whose answers are reused.
        address: Starts to listen and returns the URL, if several evaluations share it.
    """
    from tuneloop.evals.runner import evaluate, find_evaluation

    dataset, arms, models = contest
    existing = find_evaluation(config, workspace, dataset, arms, name)
    if existing is not None:
        return _log_published(Published(existing, reused=True))
    with ExitStack() as stack:
        serving = _any_port(config)
        url = address() if address else stack.enter_context(app.listen(serving))
        app.host(models, serving, url)
        outcomes = _check_served(url, models)
        key = os.environ.get(app.API_KEY_VARIABLE, "")
        arms = [
            replace(
                arm,
                endpoint=Endpoint(url, arm.endpoint.model, key),
                parity=outcomes.get(arm.endpoint.model),
            )
            if arm.endpoint.model in models
            else arm
            for arm in arms
        ]
        return _log_published(evaluate(config, workspace, dataset, arms, name, earlier))


def _any_port(config: TuneloopConfig) -> ServingConfig:
    """Return settings with any free port: `tuneloop serve` may be using the configured one."""
    return config.serving.model_copy(update={"port": 0})


def _log_published(published: Published) -> Published:
    logger.info("%s %s", "reusing" if published.reused else "published", published.artifact.ref)
    return published
