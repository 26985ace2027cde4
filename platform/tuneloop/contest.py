"""What an evaluation compares: the arms that `run` has, or those that the configuration names."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import ArmConfig, TaskConfig, TrainingConfig, TuneloopConfig
from tuneloop.data.decontamination.seen import datasets_of, find_seen
from tuneloop.errors import DataError, ModelError, Problem, UserError
from tuneloop.evals.scoring.budget import price_of
from tuneloop.evals.scoring.constrained import KINDS, constrain, constrainable
from tuneloop.evals.scoring.given import given_arm
from tuneloop.evals.scoring.harness import forgetting_problems
from tuneloop.evals.scoring.judging import Judging
from tuneloop.evals.scoring.questions import Question, choose_shots
from tuneloop.evals.scoring.simple import simple_arm, with_nearest_shots
from tuneloop.models.bases.source import BaseModel, refuse_missing, resolve_base
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.client.client import api_key_of
from tuneloop.models.export.layout import ADAPTER
from tuneloop.records import (
    ARMS,
    BASE,
    BASE_CONSTRAINED,
    FEW_SHOT,
    FINETUNED,
    FINETUNED_CONSTRAINED,
    SIMPLE,
    Arm,
    Endpoint,
    Message,
    Sample,
    Vote,
)
from tuneloop.review.store import ReviewStore, has_store
from tuneloop.review.verdicts import as_vote
from tuneloop.serving.loaded import ServedModel
from tuneloop.serving.openvino import environment as openvino
from tuneloop.serving.vllm import environment as vllm

_CONSTRAINED = (BASE_CONSTRAINED, FINETUNED_CONSTRAINED)
_HASHES = {"base_fingerprint": "the base model", "dataset": "the train rows"}
logger = logging.getLogger("tuneloop.pipeline")


class Contest(NamedTuple):
    """What is evaluated: a dataset's held-out rows, the arms, and the models that answer."""

    dataset: Artifact
    arms: list[Arm]
    models: dict[str, ServedModel]


def finetuned_arm(model_fingerprint: str) -> Arm:
    """Return the arm of a model that was trained, or will be."""
    return Arm(FINETUNED, Endpoint("", FINETUNED), (), model_fingerprint)


def finetuned_arms(config: TuneloopConfig, finetuned: Arm, dataset: Artifact) -> list[Arm]:
    """Return the arms of the finetuned model: constrained where the task has a form, then free."""
    return [*_constrained(config, finetuned, FINETUNED_CONSTRAINED, dataset), finetuned]


def _constrained(config: TuneloopConfig, arm: Arm, name: str, dataset: Artifact) -> list[Arm]:
    """Return an arm with constrained answers, if the task has a form to bind them to."""
    if config.task.type not in KINDS:
        return []
    try:
        bound = constrain(arm, config.task, dataset, config.evaluation.calibration)
        return [replace(bound, name=name)]
    except DataError as error:
        logger.warning("scored without `%s`: %s", name, error.problems[0])
        return []


def with_lineage(arm: Arm, workspace: Workspace, model: Path, task: TaskConfig) -> Arm:
    """Return the arm of a model with the train rows that are known of it.

    Args:
        model: Directory of the model: of an artifact, or of a base model.
        task: Of the questions it will be asked.
    """
    return with_train_rows(arm, datasets_of(workspace, model) or (), task)


def with_train_rows(arm: Arm, datasets: Sequence[Artifact], task: TaskConfig) -> Arm:
    """Return the arm with the datasets whose train rows its answers were learned from."""
    if not datasets:
        return arm

    def find(questions: Sequence[Question]) -> set[str]:
        rows = [question.as_row() for question in questions]
        return set().union(*(find_seen(dataset, rows, task) for dataset in datasets))

    return replace(arm, trained_on=" ".join(d.fingerprint for d in datasets), find_seen=find)


def with_tokenizer(arm: Arm, model: ServedModel | None) -> Arm:
    """Return the arm with its model's tokenizer, for those who ask by token ids."""
    if model is None or arm.endpoint.url:
        return arm
    # Loading a tokenizer takes a second, and few evaluations ask.
    renderer = cache(lambda: Renderer.load(model.folder, model.chat_template))

    def encode(messages: Sequence[Message], tools: str) -> Sample:
        return renderer().sample(messages, json.loads(tools) if tools else ())

    return replace(arm, encode=encode, tokenizer=model.folder)


def base_model(config: TuneloopConfig, base: BaseModel) -> ServedModel:
    """Return the base model as it is served."""
    return ServedModel(base.path, config.model.chat_template)


def finetuned_model(model: Artifact) -> ServedModel:
    """Return a model artifact as it is served."""
    # Its directory carries the tokenizer and the template it was trained with.
    return ServedModel(model.path)


def base_identity(config: TuneloopConfig, base: BaseModel) -> str:
    """Return what the answers of the base model depend on."""
    return f"{base.fingerprint}/{Renderer.load(base.path, config.model.chat_template).hash}"


def base_arms(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, dataset: Artifact
) -> list[Arm]:
    """Return the arms that train no model.

    The plain prompt, solved examples before it, the plain prompt with constrained answers, and the
    simple arm.
    """
    plain = Arm(BASE, Endpoint("", BASE), (), base_identity(config, base))
    # A base that was trained here has seen what it was trained on.
    plain = with_lineage(plain, workspace, base.path, config.task)
    arms = [plain]
    if config.task.type == "language_modeling":
        return arms
    if config.evaluation.num_shots:
        e = config.evaluation
        shots = choose_shots(dataset, e.num_shots, e.seed, list(config.task.tasks))
        arms.append(replace(plain, name=FEW_SHOT, shots=shots))
    arms += _constrained(config, plain, BASE_CONSTRAINED, dataset)
    simple = simple_arm(SIMPLE, dataset, config.task)
    arms.append(with_train_rows(simple, [dataset], config.task))
    return arms


def referenced_model(
    workspace: Workspace, base: BaseModel, where: str, reference: str
) -> ServedModel:
    """Return the model that a value of `serving.models` or an arm's `model` names.

    Args:
        base: The base model of the configuration, to which an adapter has to belong.
        where: Dotted key of the value.
        reference: `models/NAME[@vN][/adapter]`, or what `model.base` takes.

    Raises:
        ArtifactError: No such artifact.
        ModelError: No such base model; or no adapter, or one of another base model.
    """
    if not reference.startswith("models/"):
        return ServedModel(resolve_base(reference).path)
    artifact = _open(workspace, reference)
    if not reference.endswith(f"/{ADAPTER}"):
        return finetuned_model(artifact)
    merged = f"serve the merged weights: {artifact.ref}"
    if not (artifact.path / ADAPTER).is_dir():
        raise ModelError.of(
            "the model has no adapter",
            where=where,
            got=f"{reference}, trained with method full",
            remedy=merged,
        )
    trained_on = artifact.manifest["config"]
    if trained_on["base_fingerprint"] != base.fingerprint:
        raise ModelError.of(
            "the adapter belongs to another base model",
            where=where,
            got=f"{reference}, trained on {trained_on['base']} "
            f"({trained_on['base_fingerprint'][:12]})",
            allowed=f"adapters on {base.name} ({base.fingerprint[:12]})",
            remedy=f"{merged}; or set model.base to {trained_on['base']}",
        )
    return ServedModel(base.path, adapter=artifact.path)


def needs_dataset(config: TuneloopConfig) -> bool:
    """Return whether the arms of `tuneloop evaluate` or its rows come from a prepared dataset."""
    e = config.evaluation
    reads_json = "extraction" in {config.task.of(n).type for n in config.task.tasks or ("",)}
    learned = any(
        arm.simple or arm.shots or arm.choose or (not arm.given and name != BASE)
        or arm.model == FINETUNED or (arm.constrain and reads_json)
        for name, arm in e.arms.items()
    )  # fmt: skip
    return not e.arms or not e.sources or learned


def needs_ray(config: TuneloopConfig) -> bool:
    """Return whether `tuneloop evaluate` prepares a dataset or serves a model of our own."""
    elsewhere = all(arm.endpoint or arm.answers for arm in config.evaluation.arms.values())
    return needs_dataset(config) or not elsewhere


def gate_arms(
    config: TuneloopConfig, workspace: Workspace, against: str, candidate: str
) -> dict[str, ArmConfig]:
    """Return the two arms of `tuneloop gate` by name, the candidate last.

    Args:
        against: An artifact such as `models/faq@v1`, what `model.base` takes, or an arm's name.
        candidate: Likewise.

    Raises:
        ArtifactError: No such artifact.
    """
    (first, held), (name, judged) = (
        _gate_arm(config, workspace, reference) for reference in (against, candidate)
    )
    return {first: held, name if name != first else f"{name} (candidate)": judged}


def _gate_arm(
    config: TuneloopConfig, workspace: Workspace, reference: str
) -> tuple[str, ArmConfig]:
    named = config.evaluation.arms
    if reference in named or reference in ARMS:
        return reference, named.get(reference, ArmConfig())
    if not reference.startswith("models/"):
        return reference, ArmConfig(model=reference)
    pinned = _pinned(workspace, reference)
    return pinned.removeprefix("models/"), ArmConfig(model=pinned)


def _open(workspace: Workspace, reference: str) -> Artifact:
    """Return the model of a reference that may name its adapter."""
    return workspace.open(reference.removesuffix(f"/{ADAPTER}"))


def _pinned(workspace: Workspace, reference: str) -> str:
    """Return a reference with its version as it is now: what is published later is another."""
    adapter = f"/{ADAPTER}" * reference.endswith(f"/{ADAPTER}")
    return _open(workspace, reference).ref + adapter


def engine_problems(config: TuneloopConfig) -> list[Problem]:
    """Return why `serving.engine` cannot serve the base model, or what was trained from it."""
    try:
        if config.serving.engine == "openvino":
            openvino.require()
        if config.serving.engine == "vllm":
            vllm.require(resolve_base(config.model.base).path)
    except UserError as error:
        return [*error.problems]
    return []


def judging_problems(config: TuneloopConfig) -> list[Problem]:
    """Return what is wrong with judge, general tasks and engine, before anything runs."""
    problems = engine_problems(config)
    if judge := config.evaluation.judge:
        try:
            api_key_of(judge.api_key_env, "evaluation.judge")
        except UserError as error:
            problems += error.problems
        if config.task.type == "language_modeling":
            problems.append(
                Problem(
                    "plain text is not answered: there is nothing to judge",
                    where="evaluation.judge",
                    remedy="leave it out",
                )
            )
    if forgetting := config.evaluation.forgetting:
        problems += forgetting_problems(forgetting)
    return problems


def _refuse_reference(
    config: TuneloopConfig, workspace: Workspace, where: str, reference: str
) -> None:
    """Raise UserError for a model that cannot be served, without fetching or loading it."""
    if reference in (BASE, FINETUNED, config.model.base):
        return
    if reference.startswith("models/") and reference.endswith(f"/{ADAPTER}"):
        referenced_model(workspace, resolve_base(config.model.base), where, reference)
    elif reference.startswith("models/"):
        _open(workspace, reference)
    else:
        refuse_missing(reference)


def served_model_problems(config: TuneloopConfig, workspace: Workspace) -> list[Problem]:
    """Return why `serve` cannot serve what `serving.models` names."""
    problems = list[Problem]()
    for name, reference in config.serving.models.items():
        where = f"serving.models.{name}"
        try:
            _refuse_reference(config, workspace, where, reference)
        except UserError as error:
            problems += _placed(where, error)
    return problems


def arm_problems(config: TuneloopConfig, workspace: Workspace) -> list[Problem]:
    """Return what is wrong with what `evaluate` names that can be known before anything runs."""
    problems = judging_problems(config)
    for name, spec in config.evaluation.arms.items():
        where = f"evaluation.arms.{name}"
        try:
            if spec.endpoint:
                api_key_of(spec.api_key_env, where)
            elif spec.answers:
                given_arm(name, spec.answers)
            elif isinstance(spec.model, list):
                problems += trainings_problems(workspace, f"{where}.model", spec.model)
            elif spec.model:
                _refuse_reference(config, workspace, f"{where}.model", spec.model)
        except UserError as error:
            problems += _placed(where, error)
        if config.task.type == "language_modeling" and (
            spec.simple or spec.answers or spec.shots or spec.choose
        ):
            problems.append(
                Problem(
                    "plain text is not answered: only its likelihood is scored",
                    where=where,
                    allowed="`model` or `endpoint`, without shots",
                )
            )
        is_bound = spec.constrain or (name in _CONSTRAINED and not spec.given)
        if is_bound and not constrainable(config.task):
            problems.append(
                Problem(
                    "the task's answers have no form that they could be bound to",
                    where=where,
                    got=f"task.type {config.task.type}",
                    allowed=f"`constrain` for {' and '.join(KINDS)}",
                )
            )
    return problems


def trainings_problems(workspace: Workspace, where: str, models: Sequence[str]) -> list[Problem]:
    """Return why these models are not several trainings of one recipe.

    They are trained from one base model on the same rows with the same settings, but for the seed.

    Args:
        where: Dotted key of the list.
        models: References.
    """
    problems, opened = list[Problem](), list[Artifact]()
    for reference in models:
        try:
            opened.append(_open(workspace, reference))
        except UserError as error:
            problems += _placed(where, error)
    references = [artifact.ref for artifact in opened]
    if twice := [ref for number, ref in enumerate(references) if ref in references[:number]]:
        problems.append(
            Problem(
                "the same model stands in the list twice",
                where=where,
                got=f"{twice[0]}, by {', '.join(models)}",
                remedy="name each training once",
            )
        )
    recipes = [_recipe(artifact) for artifact in opened]
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = {a.ref: recipe.get(key) for a, recipe in zip(opened, recipes, strict=True)}
        if len({json.dumps(value) for value in values.values()}) > 1:
            told = (f"{value[:12] if key in _HASHES and value else value} in {ref}"
                    for ref, value in values.items())  # fmt: skip
            problems.append(
                Problem(
                    "the models of one arm differ in more than their seed",
                    where=where,
                    got=f"{_HASHES.get(key, key)}: {', '.join(told)}",
                    allowed="trainings of one recipe: the same base, rows and settings but for "
                    "training.seed",
                    remedy="name each recipe as an arm of its own",
                )
            )
            break  # the others mostly follow from it
    seeds = [(artifact.manifest["config"].get("training") or {}).get("seed") for artifact in opened]
    if not problems and len(set(seeds)) < len(seeds):
        named = ", ".join(f"{seed} in {ref}" for seed, ref in zip(seeds, references, strict=True))
        problems.append(
            Problem(
                "two models of one arm were trained with the same seed: they are one training",
                where=where,
                got=f"training.seed: {named}",
                remedy="leave one of them out",
            )
        )
    return problems


def _recipe(model: Artifact) -> dict[str, Any]:
    """Return what a model was made of but for the seed; what its manifest lacks has its default."""
    config = model.manifest["config"]
    told = config.get("training") or {}
    with contextlib.suppress(ValidationError):  # of a version with other settings
        told = TrainingConfig.model_validate(told).model_dump(mode="json")
    settings = {f"training.{key}": value for key, value in told.items() if key != "seed"}
    return {key: config.get(key) for key in (*_HASHES, "chat_template")} | settings


def _placed(key: str, error: UserError) -> list[Problem]:
    """Return an error's problems, each with the key of the arm that has it."""
    return [
        problem
        if problem.where.startswith(key)
        else replace(problem, where=f"{key} ({problem.where})")
        for problem in error.problems
    ]


def build_judging(config: TuneloopConfig, workspace: Workspace, name: str) -> Judging | None:
    """Return who judges the answers of an evaluation, with the votes on earlier ones of its name.

    Raises:
        ConfigError: The judge's key is missing.
        ArtifactError: The votes cannot be read.
    """
    judge = config.evaluation.judge
    if judge is None:
        return None
    key, url = api_key_of(judge.api_key_env, "evaluation.judge"), judge.endpoint.rstrip("/")
    arm = Arm(
        "judge",
        Endpoint(judge.endpoint, judge.model, key),
        price=price_of(judge.price),
        timeout_s=judge.timeout_s,
    )
    itself = (
        name
        for name, spec in config.evaluation.arms.items()
        if spec.endpoint and (spec.endpoint.rstrip("/"), spec.model) == (url, judge.model)
    )
    return Judging(judge, arm, tuple(_votes(workspace, name)), next(itself, None))


def _votes(workspace: Workspace, name: str) -> list[Vote]:
    if not has_store(workspace.location):
        return []
    references = [artifact.ref for artifact in workspace.published("evaluations", name)]
    return [as_vote(v) for v in ReviewStore(workspace.location).verdicts(references)]


@dataclass
class NamedArms:
    """Builds the arms of `evaluation.arms`, and collects the models that have to be served.

    Args:
        base: Returns the base model; called only where an arm needs it.
        dataset: Whose train split gives solved examples and trains the simple arm; None where no
            arm needs it.
        finetuned: Returns the model of this configuration; raises ModelError where there is none.
    """

    config: TuneloopConfig
    workspace: Workspace
    base: Callable[[], BaseModel]
    dataset: Artifact | None
    finetuned: Callable[[], Artifact]
    models: dict[str, ServedModel] = field(default_factory=dict)

    def build(self) -> list[Arm]:
        """Return the arms in the order of the configuration; without any, those of `run`.

        Raises:
            ConfigError: The key of an endpoint is missing.
            ModelError: A named arm is the model of this configuration, and there is none.
        """
        if named := self.config.evaluation.arms:
            return [self._arm(name, spec) for name, spec in named.items()]
        arms = base_arms(self.config, self.workspace, self.base(), self._train())
        self.models[BASE] = base_model(self.config, self.base())
        try:
            finetuned = self._finetuned(self.finetuned(), FINETUNED)
            arms += finetuned_arms(self.config, finetuned, self._train())
        except ModelError as error:
            logger.warning("scored without `%s`: %s", FINETUNED, error.problems[0])
        return arms

    def _trainings(self, name: str, spec: ArmConfig, references: Sequence[str]) -> Arm:
        """Return the arm of several trainings of one recipe."""
        models = []
        for reference in references:
            pinned = _pinned(self.workspace, reference)
            one = self._arm(name, spec.model_copy(update={"model": pinned}))
            models.append(replace(one, name=f"{name} ({pinned})"))
        trained_on = " ".join(dict.fromkeys(" ".join(m.trained_on for m in models).split()))
        return Arm(name, Endpoint("", ""), trained_on=trained_on, models=tuple(models))

    def _arm(self, name: str, spec: ArmConfig) -> Arm:
        if isinstance(spec.model, list):
            return self._trainings(name, spec, spec.model)
        e = self.config.evaluation
        known = name if not spec.given else ""
        if spec.simple or known == SIMPLE:
            arm = simple_arm(name, self._train(), self.config.task)
            return with_train_rows(arm, [self._train()], self.config.task)
        if spec.answers:
            return given_arm(name, spec.answers)
        num_shots = e.num_shots if spec.choose or known == FEW_SHOT else 0
        num_shots = num_shots if spec.shots is None else spec.shots
        if spec.endpoint:
            where = f"evaluation.arms.{name}"
            arm = Arm(
                name,
                Endpoint(spec.endpoint, spec.model or "", api_key_of(spec.api_key_env, where)),
                price=price_of(spec.price),
                timeout_s=spec.timeout_s,
            )
        else:
            own = FINETUNED if known in (FINETUNED, FINETUNED_CONSTRAINED) else BASE
            arm = replace(self._served(name, spec.model or own), name=name)
        if spec.constrain or known in _CONSTRAINED:
            arm = constrain(arm, self.config.task, self.dataset, e.calibration)
        if not num_shots:
            return arm
        tasks = list(self.config.task.tasks)
        if spec.choose == "nearest":
            return with_nearest_shots(arm, self._train(), num_shots, tasks)
        return replace(arm, shots=choose_shots(self._train(), num_shots, e.seed, tasks))

    def _train(self) -> Artifact:
        assert self.dataset is not None, "`needs_dataset` said so"
        return self.dataset

    def _served(self, name: str, reference: str) -> Arm:
        """Return the arm of a model that is served for this; one model is served once."""
        if reference == BASE or reference == self.config.model.base:
            self.models[BASE] = base_model(self.config, self.base())
            arm = Arm(name, Endpoint("", BASE), (), base_identity(self.config, self.base()))
            return with_lineage(arm, self.workspace, self.base().path, self.config.task)
        if reference == FINETUNED:
            return self._finetuned(self.finetuned(), FINETUNED)
        where = f"evaluation.arms.{name}.model"
        model = referenced_model(self.workspace, self.base(), where, reference)
        if reference.startswith("models/"):
            artifact = _open(self.workspace, reference)
            arm = self._finetuned(artifact, reference)
            self.models[reference] = model
            if reference.endswith(f"/{ADAPTER}"):
                arm = replace(arm, model_fingerprint=f"{arm.model_fingerprint}/{ADAPTER}")
            return arm
        self.models[reference] = model
        other = resolve_base(reference)
        identity = f"{other.fingerprint}/{Renderer.load(other.path, 'auto').hash}"
        arm = Arm(name, Endpoint("", reference), (), identity)
        return with_lineage(arm, self.workspace, other.path, self.config.task)

    def _finetuned(self, artifact: Artifact, served_as: str) -> Arm:
        self.models[served_as] = finetuned_model(artifact)
        arm = Arm(served_as, Endpoint("", served_as), (), artifact.fingerprint)
        return with_lineage(arm, self.workspace, artifact.path, self.config.task)


def missing_model(config: TuneloopConfig, workspace: Workspace) -> ModelError:
    """Return the error that no model was trained with this configuration."""
    others = [artifact.ref for artifact in workspace.published("models", config.name)]
    named = "name it, as an arm's `model` or by --candidate of a gate"
    other = f"; {others[-1]} was trained with other settings: {named}" if others else ""
    return ModelError.of(
        "no model was trained with this configuration",
        where=f"workspace {workspace.location}",
        allowed="what is there is scored, and nothing is trained",
        remedy=f"`tuneloop train` or `tuneloop run` makes it{other}",
    )
