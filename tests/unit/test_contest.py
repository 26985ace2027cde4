"""Arms that a configuration names, built on real artifacts and a real tokenizer, without Ray."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import EvaluationConfig, TuneloopConfig
from tuneloop.contest import (
    NamedArms,
    arm_problems,
    base_arms,
    missing_model,
    served_model_problems,
)
from tuneloop.errors import ConfigError, ModelError
from tuneloop.evals.scoring.questions import read_questions
from tuneloop.models.bases.source import BaseModel, resolve_base
from tuneloop.pipeline import _own_models


def publish_rows(workspace: Workspace) -> Artifact:
    rows = [
        {
            "row_id": f"r{n}",
            "messages": [
                {"role": "user", "content": f"{word} {n}"},
                {"role": "assistant", "content": str(n)},
            ],
            "num_tokens": 5,
        }
        for n, word in enumerate(["lamp", "door", "lamp", "door", "lamp", "door"])
    ]
    with workspace.draft("datasets", "tiny", "d" * 64) as draft:
        for split, part in (("train", rows[:4]), ("test", rows[4:])):
            (draft.path / split).mkdir()
            pq.write_table(pa.Table.from_pylist(part), draft.path / split / "part-0.parquet")
        return draft.publish(config={}, resources={}, inputs=[], metrics={})


def publish_model(workspace: Workspace, name: str, dataset: Artifact, base: str) -> Artifact:
    with workspace.draft("models", name, name[0] * 64) as draft:
        (draft.path / "adapter").mkdir()
        (draft.path / "adapter" / "adapter_config.json").write_text("{}")
        (draft.path / "config.json").write_text("{}")
        config = {"dataset": dataset.fingerprint, "base": "tiny", "base_fingerprint": base}
        return draft.publish(config=config, resources={}, inputs=[], metrics={})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


def named(
    workspace: Workspace, model: Path, dataset: Artifact, trained: Artifact | None, /, **arms: Any
) -> NamedArms:
    config = TuneloopConfig.model_validate(
        {
            "name": "tiny",
            "task": {"type": "generation"},
            "model": {"base": str(model)},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
            "evaluation": {"num_shots": 2, "arms": arms},
        }
    )

    def own() -> Artifact:
        if trained is None:
            raise missing_model(config, workspace)
        return trained

    return NamedArms(config, workspace, lambda: resolve_base(str(model)), dataset, own)


def test_arms_are_built_in_their_order_and_one_model_is_served_once(workspace, tiny_model):
    dataset = publish_rows(workspace)
    base = resolve_base(str(tiny_model))
    mine = publish_model(workspace, "mine", dataset, base.fingerprint)
    other = publish_model(workspace, "other", dataset, base.fingerprint)
    contest = named(
        workspace,
        tiny_model,
        dataset,
        mine,
        **{
            "base": {},
            "base+few-shot": {},
            "near": {"model": "base", "shots": 1, "choose": "nearest"},
            "same": {"model": str(tiny_model)},
            "adapter": {"model": "models/other/adapter"},
            "old": {"model": "models/other@v1"},
            "simple": {},
            "finetuned": {},
        },
    )
    arms = {arm.name: arm for arm in contest.build()}
    assert list(arms) == [*contest.config.evaluation.arms]
    assert sorted(contest.models) == sorted(
        ["base", "finetuned", "models/other/adapter", "models/other@v1"]
    )
    served = {name: arm.endpoint.model for name, arm in arms.items() if arm.answer is None}
    assert {served[name] for name in ("base", "base+few-shot", "near", "same")} == {"base"}
    assert len(arms["base+few-shot"].shots) == 2
    assert arms["old"].model_fingerprint == other.fingerprint
    assert arms["adapter"].model_fingerprint == f"{other.fingerprint}/adapter"
    assert contest.models["models/other/adapter"].adapter == other.path
    assert arms["finetuned"].trained_on == arms["simple"].trained_on == dataset.fingerprint
    assert arms["base"].trained_on == ""
    # The arms that have the names of those of `run` are the same: what they answered is reused.
    config = contest.config
    for arm in base_arms(config, workspace, base, dataset)[:2]:
        assert arms[arm.name] == arm
    chosen = arms["near"].choose(read_questions(dataset))
    assert {key: [shot.messages[0].content for shot in shots] for key, shots in chosen.items()} == {
        "r4": ["lamp 0"],
        "r5": ["door 1"],
    }


def test_without_arms_what_is_there_is_scored_and_a_missing_model_is_told(
    workspace, tiny_model, caplog
):
    dataset = publish_rows(workspace)
    with caplog.at_level(logging.WARNING, "tuneloop"):
        arms = named(workspace, tiny_model, dataset, None).build()
    assert [arm.name for arm in arms] == ["base", "base+few-shot", "simple"]
    (record,) = caplog.records
    assert "tuneloop train" in record.getMessage()
    mine = publish_model(workspace, "tiny", dataset, "b" * 64)
    arms = named(workspace, tiny_model, dataset, mine).build()
    assert [arm.name for arm in arms] == ["base", "base+few-shot", "simple", "finetuned"]


def test_a_named_model_that_was_not_trained_ends_with_what_to_do(workspace, tiny_model):
    dataset = publish_rows(workspace)
    publish_model(workspace, "tiny", dataset, "b" * 64)
    contest = named(workspace, tiny_model, dataset, None, mine={"model": "finetuned"})
    with pytest.raises(ModelError) as caught:
        contest.build()
    (problem,) = caught.value.problems
    assert "tuneloop train" in problem.remedy
    assert "models/tiny@v1 was trained with other settings" in problem.remedy


def test_arms_survive_being_written_out_and_read_again(workspace, tiny_model):
    config = named(
        workspace,
        tiny_model,
        publish_rows(workspace),
        None,
        base={},
        near={"model": "base", "choose": "nearest"},
        made={"answers": "answers.jsonl"},
        gpt={"endpoint": "http://127.0.0.1:1/v1", "model": "m", "price": {"input": 1, "output": 2}},
    ).config
    assert TuneloopConfig.model_validate(json.loads(config.model_dump_json())) == config


def publish_training(workspace: Workspace, seed: int, **other: Any) -> Artifact:
    training = {"learning_rate": 1e-3, "seed": seed}
    config = {"dataset": "d" * 64, "base": "tiny", "base_fingerprint": "b" * 64}
    config |= {"training": training | other.pop("training", {})} | other
    with workspace.draft("models", "tiny", f"{seed}{len(str(config))}".ljust(64, "0")) as draft:
        (draft.path / "config.json").write_text("{}")
        return draft.publish(config=config, resources={}, inputs=[], metrics={})


def test_several_trainings_are_one_arm_of_models_with_their_versions(workspace, tiny_model):
    dataset = publish_rows(workspace)
    for seed in (0, 1):
        publish_training(workspace, seed, dataset=dataset.fingerprint)
    contest = named(
        workspace,
        tiny_model,
        dataset,
        None,
        two={"model": ["models/tiny@v1", "models/tiny"], "shots": 1},
        one={"model": ["models/tiny@v1"]},
    )
    two, one = contest.build()
    assert [model.endpoint.model for model in two.models] == ["models/tiny@v1", "models/tiny@v2"]
    assert [model.name for model in two.models] == ["two (models/tiny@v1)", "two (models/tiny@v2)"]
    assert two.trained_on == dataset.fingerprint
    assert all(len(model.shots) == 1 and model.find_seen for model in two.models)
    assert two.models[0].model_fingerprint == one.model_fingerprint
    assert not one.models, "a list of one is that model"
    assert sorted(contest.models) == ["models/tiny@v1", "models/tiny@v2"]
    assert arm_problems(contest.config, workspace) == []


def test_a_list_that_is_not_one_recipe_is_refused_before_anything_runs(workspace, tiny_model):
    dataset = publish_rows(workspace)
    for seed, other in enumerate(
        ({}, {}, {"training": {"learning_rate": 2e-4}}, {"base_fingerprint": "c" * 64},
         {"dataset": "e" * 64}, {"training": {"seed": 1}})
    ):  # fmt: skip
        publish_training(workspace, seed, **other)

    def told(*models: str) -> list[tuple[str, str]]:
        contest = named(workspace, tiny_model, dataset, None, arm={"model": list(models)})
        return [(p.what, p.got) for p in arm_problems(contest.config, workspace)]

    assert told("models/tiny@v1", "models/tiny@v2") == []
    differ = "the models of one arm differ in more than their seed"
    for number, what in (
        (3, "training.learning_rate: 0.001 in models/tiny@v1, 0.0002"),
        (4, "the base model: bbbbbbbbbbbb in models/tiny@v1, cccccccccccc"),
        (5, "the train rows: dddddddddddd in models/tiny@v1, eeeeeeeeeeee"),
    ):
        assert told("models/tiny@v1", f"models/tiny@v{number}") == [
            (differ, f"{what} in models/tiny@v{number}")
        ]
    (again,) = told("models/tiny@v2", "models/tiny@v6")
    assert again[1] == "training.seed: 1 in models/tiny@v2, 1 in models/tiny@v6"
    (twice,) = told("models/tiny", "models/tiny@v6")
    assert twice[0] == "the same model stands in the list twice"
    assert len(told("models/tiny@v1", "models/tiny@v7", "models/other@v1")) == 2


def test_models_that_are_not_there_are_told_before_anything_runs(workspace, tiny_model, tmp_path):
    dataset = publish_rows(workspace)
    base = resolve_base(str(tiny_model)).fingerprint
    publish_model(workspace, "mine", dataset, base)
    publish_model(workspace, "other", dataset, "c" * 64)
    (tmp_path / "empty").mkdir()
    good = ["models/mine", "models/mine/adapter", "models/other@v1", str(tiny_model), "org/name"]
    wrong = {
        "models/nothing": "no artifact `models/nothing`",
        "models/mine@v7": "no artifact `models/mine@v7`",
        "models/other/adapter": "the adapter belongs to another base model",
        str(tmp_path / "gone"): "the base model cannot be found",
        str(tmp_path / "gone.gguf"): "the base model cannot be found",
        str(tmp_path / "empty"): "the directory holds no model",
    }
    arms = {f"a{n}": {"model": one} for n, one in enumerate([*good, "base", *wrong])}
    config = named(workspace, tiny_model, dataset, None, **arms).config
    found = arm_problems(config, workspace)
    assert [problem.what for problem in found] == [*wrong.values()]
    assert found[0].where.startswith("evaluation.arms.a6")
    served = {f"m{n}": one for n, one in enumerate([*good, *wrong])}
    serving = config.serving.model_copy(update={"models": served})
    found = served_model_problems(config.model_copy(update={"serving": serving}), workspace)
    assert [problem.what for problem in found] == [*wrong.values()]
    assert found[0].where.startswith("serving.models.m5")


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"model": []}, "names no model"),
        ({"model": ["models/tiny@v1", "models/tiny@v1"]}, "named twice"),
        ({"model": ["models/tiny@v1", "base"]}, "name that as an arm of its own"),
        ({"model": ["models/a", "models/b"], "endpoint": "http://x/v1"}, "one `model`"),
    ],
)
def test_lists_of_models_that_cannot_be_are_refused(workspace, tiny_model, arm, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        named(workspace, tiny_model, publish_rows(workspace), None, arm=arm)


def test_general_tasks_are_not_asked_of_several_trainings():
    arms = {"base": {}, "two": {"model": ["models/a@v1", "models/a@v2"]}}
    with pytest.raises(ValueError, match=r"evaluation\.arms\.two is several"):
        EvaluationConfig.model_validate({"arms": arms, "forgetting": {"tasks": ["arc_easy"]}})


def test_models_that_a_job_trained_are_those_of_the_configuration(workspace: Workspace) -> None:
    def made(path: str, **more: Any) -> TuneloopConfig:
        source = {"path": path, "format": "question_answer"}
        return TuneloopConfig.model_validate(
            {"name": "tiny", "task": {"type": "generation"}, "model": {"base": "b"} | more,
             "data": {"sources": [source]}}
        )  # fmt: skip

    def publish(kind: str, fingerprint: str, config: dict[str, Any]) -> None:
        with workspace.draft(kind, "tiny", fingerprint * 64) as draft:
            draft.publish(config=config, resources={}, inputs=[], metrics={})

    here, there = made("rows/faq.jsonl"), made("data/0/faq.jsonl")
    told = {"data": there.data.model_dump(), "task": there.task.model_dump()}
    publish("datasets", "d", told)
    model = {"dataset": "d" * 64, "base_fingerprint": "b" * 64, "chat_template": "auto"}
    for number, rate in enumerate((None, 1e-5)):
        training = there.training.model_copy(update={"learning_rate": rate})
        publish("models", str(number), model | {"training": training.model_dump()})
    base = BaseModel("b", Path(), "b" * 64)
    assert [m.ref for m in _own_models(here, workspace, base)] == ["models/tiny@v1"]
    for other in (made("other.jsonl"), made("rows/faq.jsonl", chat_template="chatml")):
        assert _own_models(other, workspace, base) == []
