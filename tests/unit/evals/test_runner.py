"""Evaluation against a real HTTP server: contract, resume, reuse, failures."""

from __future__ import annotations

import html
import importlib
import io
import json
import logging
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console

from spelt_words import SYSTEM, WORDS, arms, publish_dataset, row, spell
from tuneloop.advice import advice_for
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.errors import ArtifactError, ConfigError, DataError, EndpointError
from tuneloop.evals.reporting.advice import Situation, advise
from tuneloop.evals.reporting.error_analysis import prompt_turns
from tuneloop.evals.reporting.report import terminal_table
from tuneloop.evals.runner import evaluate, find_evaluation, find_unanswered
from tuneloop.evals.scoring.asking import EvaluationRequest, ModelAnswer, PartialAnswers
from tuneloop.evals.scoring.questions import Question, choose_shots, read_questions
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.spending import read_entries
from tuneloop.records import Arm, Endpoint, Message, SamplingParams

pytestmark = pytest.mark.usefixtures("short_waits")


def test_the_artifact_keeps_the_contract(model_server, config, workspace, dataset, capsys):
    model_server.reply = spell
    published = evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    artifact = published.artifact
    assert not published.reused
    assert artifact.ref == "evaluations/words@v1"
    assert {
        "predictions.parquet", "metrics.json", "comparison.json", "report.html",
    } <= {entry["path"] for entry in artifact.manifest["files"]}  # fmt: skip
    table = pq.read_table(artifact.path / "predictions.parquet")
    assert {
        "example_id", "arm", "prompt", "reference", "completion", "finish_reason",
        "prompt_tokens", "completion_tokens", "latency_s", "status", "error_tags",
        "exact_match", "valid_json", "field_word", "field_letters",
    } <= set(table.column_names)  # fmt: skip
    rows = table.to_pylist()
    assert len(rows) == 20
    fig = next(r for r in rows if r["arm"] == "base" and "fig" in r["prompt"])
    assert fig["error_tags"] == ["cut_off", "wrong_format"]
    assert (fig["finish_reason"], fig["valid_json"], fig["exact_match"]) == ("length", 0.0, 0.0)
    metrics = json.loads((artifact.path / "metrics.json").read_text())
    # Five of the words have five letters.
    assert [a["scores"]["exact_match"]["value"] for a in metrics["arms"]] == [0.5, 1.0]
    pair = json.loads((artifact.path / "comparison.json").read_text())["pairs"][0]
    assert pair["outcomes"] == {"fixed": 5, "introduced": 0, "both_right": 5, "both_wrong": 0}
    assert pair["error_tags"]["cut_off"] == {"fixed": 1, "introduced": 0, "both": 0}
    assert artifact.manifest["metrics"]["scores"] == {"base": 0.5, "base+few-shot": 1.0}
    assert artifact.manifest["inputs"] == [dataset.ref, "weights-1"]
    Console(width=100).print(terminal_table(artifact))
    shown = capsys.readouterr().out
    assert "+50.0 points" in shown
    assert "got better than base" in shown


def test_prompts_are_the_row_without_its_answer_and_shots_follow_the_system_message(
    model_server, config, workspace, dataset
):
    model_server.reply = spell
    evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    plain = next(r["messages"] for r in model_server.requests if len(r["messages"]) == 2)
    assert plain[0] == SYSTEM
    assert plain[1]["role"] == "user"
    few = next(r["messages"] for r in model_server.requests if len(r["messages"]) > 2)
    assert [m["role"] for m in few] == [
        "system", "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    assert sum(m == SYSTEM for m in few) == 1
    answers = {q.reference for q in read_questions(dataset)}
    sent = {m["content"] for r in model_server.requests for m in r["messages"]}
    assert not answers & sent, "no test answer is ever shown"


def test_the_validation_split_is_answered_in_place_of_the_test(
    model_server, config, workspace, dataset
):
    model_server.reply = spell
    first = evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    validated = evaluate_on_validation(config)
    folder = dataset.path / "validation"
    folder.mkdir(exist_ok=True)
    pq.write_table(pq.read_table(dataset.path / "test").slice(0, 3), folder / "part-0.parquet")
    other = evaluate(validated, workspace, dataset, arms(model_server, dataset), "words")
    assert other.artifact.fingerprint != first.artifact.fingerprint
    assert other.artifact.manifest["metrics"]["num_examples"] == 3
    assert "validation split" in (other.artifact.path / "report.html").read_text()


def evaluate_on_validation(config: TuneloopConfig) -> TuneloopConfig:
    raw = config.model_dump()
    raw["evaluation"]["split"] = "validation"
    with pytest.raises(ValidationError, match="there is no validation split"):
        TuneloopConfig.model_validate(raw)
    raw["data"]["split"]["num_validation_examples"] = 3
    return TuneloopConfig.model_validate(raw)


def test_the_same_evaluation_is_reused_without_asking_or_serving(
    model_server, config, workspace, dataset
):
    model_server.reply = spell
    first = evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    asked = len(model_server.requests)
    absent = [replace(a, endpoint=Endpoint("", "parrot")) for a in arms(model_server, dataset)]
    assert find_evaluation(config, workspace, dataset, absent, "words") == first.artifact
    again = evaluate(config, workspace, dataset, absent, "words")
    assert again.reused
    assert again.artifact.ref == first.artifact.ref
    assert len(model_server.requests) == asked
    faster = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"concurrency": 1})}
    )
    assert find_evaluation(faster, workspace, dataset, absent, "words") is not None
    longer = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"max_tokens": 99})}
    )
    assert find_evaluation(longer, workspace, dataset, absent, "words") is None


def test_a_killed_run_goes_on_where_it_was(model_server, config, workspace, dataset):
    def break_down(messages):
        if len(model_server.requests) > 8:
            model_server.models = []
        return spell(messages)

    model_server.reply = break_down
    with pytest.raises(EndpointError, match="does not serve"):
        evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    assert workspace.published() == [dataset]
    partial = next(workspace.root.glob(".work/evaluations-*/scratch/answers.jsonl"))
    kept = {entry.reply["prompt"] for entry in read_entries(partial)}
    assert 1 <= len(kept) < 20
    with partial.open("a") as file:
        file.write('{"key": "cut off by the cra')

    model_server.models, model_server.reply = ["parrot"], spell
    model_server.requests.clear()
    published = evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    # A request that the first run withdrew may arrive as late as this, so they are not counted.
    asked = {
        json.dumps(request["messages"], ensure_ascii=False) for request in model_server.requests
    }
    assert not asked & kept
    assert len(asked) == 20 - len(kept)
    scores = published.artifact.manifest["metrics"]["scores"]
    assert scores == {"base": 0.5, "base+few-shot": 1.0}


def test_rows_of_an_earlier_evaluation_are_taken_over(model_server, config, workspace, dataset):
    model_server.models, model_server.reply = ["parrot", "tuned"], spell
    baseline = evaluate(config, workspace, dataset, arms(model_server, dataset), "words-baseline")
    model_server.requests.clear()
    tuned = Arm("finetuned", Endpoint(model_server.url, "tuned"), (), "weights-2")
    contestants = [*arms(model_server, dataset), tuned]
    published = evaluate(config, workspace, dataset, contestants, "words")
    assert [r["model"] for r in model_server.requests] == ["tuned"] * 10
    before, after = (
        [p for p in Evaluation.load(a).predictions if p.arm == "base"]
        for a in (baseline.artifact, published.artifact)
    )
    assert before == after
    # Another number of shots is another arm: nothing of it is taken over.
    model_server.requests.clear()
    other = arms(model_server, dataset, num_shots=1)
    evaluate(config, workspace, dataset, other, "words-1shot")
    assert len(model_server.requests) == 10


def test_a_changed_reference_scores_the_stored_answers_again(
    model_server, config, workspace, dataset
):
    model_server.reply = spell
    first = evaluate(config, workspace, dataset, arms(model_server, dataset), "words").artifact
    asked = len(model_server.requests)
    rows = [row(index, word) | {"accepted_answers": None} for index, word in enumerate(WORDS)]
    # `pear` has four letters, and the base model says five.
    rows[1]["messages"][-1]["content"] = '{"word": "PEAR", "letters": 5}'
    rows[2]["accepted_answers"] = ['{"word": "PLUM", "letters": 5}', "no JSON"]
    train = [row(100 + i, w * 2) for i, w in enumerate(WORDS)]
    changed = publish_dataset(workspace, rows, train, fingerprint="e" * 64)
    absent = [replace(a, endpoint=Endpoint("", "parrot")) for a in arms(model_server, changed)]
    assert not find_unanswered(config, workspace, changed, absent)
    second = evaluate(config, workspace, changed, absent, "words").artifact
    assert second.ref != first.ref
    assert len(model_server.requests) == asked
    scores = [
        {(p.example_id, p.arm): p.scores["exact_match"] for p in Evaluation.load(a).predictions}
        for a in (first, second)
    ]
    differing = {key: scores[1][key] for key in scores[0] if scores[0][key] != scores[1][key]}
    assert differing == {
        ("row-001", "base"): 1.0,
        ("row-001", "base+few-shot"): 0.0,
        ("row-002", "base"): 1.0,
    }
    told = {
        p.arm: p.reference for p in Evaluation.load(second).predictions if p.example_id == "row-002"
    }
    assert json.loads(told["base"])["letters"] == 5
    assert json.loads(told["base+few-shot"])["letters"] == 4
    more = [*absent, replace(absent[0], name="new", model_fingerprint="weights-2")]
    assert [arm.name for arm in find_unanswered(config, workspace, changed, more)] == ["new"]


def test_failed_requests_are_unscored_counted_and_asked_again_next_time(
    model_server, config, workspace, dataset
):
    def refuse_two(messages):
        if messages[-1]["content"] in ("spell kiwi", "spell plum"):
            raise ValueError("too hard")
        return spell(messages)

    model_server.reply = refuse_two
    base = arms(model_server, dataset)[:1]
    artifact = evaluate(config, workspace, dataset, base, "words").artifact
    arm = json.loads((artifact.path / "metrics.json").read_text())["arms"][0]
    assert (arm["num_scored"], arm["num_unscored"]) == (8, 2)
    assert arm["scores"]["exact_match"]["value"] == pytest.approx(5 / 8)
    assert arm["unscored_reasons"] == {"HTTP 400: too hard": 2}
    rows = pq.read_table(artifact.path / "predictions.parquet").to_pylist()
    missing = [r for r in rows if r["status"] == "unscored"]
    assert {r["exact_match"] for r in missing} == {None}
    assert "too hard" in (artifact.path / "report.html").read_text()


def test_a_published_evaluation_is_asked_for_what_is_missing(
    model_server, config, workspace, dataset
):
    def reply(messages):
        if is_down and messages[-1]["content"] in ("spell kiwi", "spell plum"):
            return "", "overloaded"
        return spell(messages)

    is_down = True
    model_server.reply = reply
    base = arms(model_server, dataset)[:1]
    first = evaluate(config, workspace, dataset, base, "words").artifact
    assert first.manifest["metrics"]["num_unscored"] == 2
    # Still down: nothing new is published, and nobody is told that all is well.
    again = evaluate(config, workspace, dataset, base, "words")
    assert (again.artifact.ref, again.reused) == (first.ref, True)
    is_down = False
    model_server.requests.clear()
    second = evaluate(config, workspace, dataset, base, "words")
    assert len(model_server.requests) == 2
    assert second.artifact.manifest["metrics"]["num_unscored"] == 0
    assert not second.reused
    assert find_evaluation(config, workspace, dataset, base, "words") == second.artifact


def test_a_scorer_that_fails_in_the_middle_publishes_nothing_and_loses_no_answer(
    model_server, config, workspace, dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "scorers_of_the_runner_test.py"
    own.write_text(
        "def capitals(reference, completion):\n"
        "    if 'KIWI' in completion:\n"
        "        raise ValueError('no kiwi')\n"
        "    return float(completion.isupper())\n"
    )
    chosen = {"metrics": ["exact_match", "scorers_of_the_runner_test.capitals"]}
    config = TuneloopConfig.model_validate(
        config.model_dump() | {"evaluation": config.evaluation.model_dump() | chosen}
    )
    model_server.reply = spell
    base = arms(model_server, dataset)[:1]
    with pytest.raises(ConfigError) as caught:
        evaluate(config, workspace, dataset, base, "words")
    problem = caught.value.problems[0]
    assert problem.where == "evaluation.metrics.1, row row-009"
    assert "no kiwi" in problem.got
    assert "KIWI" in problem.got
    assert workspace.published() == [dataset]

    own.write_text(own.read_text().replace("raise ValueError('no kiwi')", "return None"))
    sys.modules.pop("scorers_of_the_runner_test")
    importlib.invalidate_caches()
    artifact = evaluate(config, workspace, dataset, base, "words").artifact
    scores = json.loads((artifact.path / "metrics.json").read_text())["arms"][0]["scores"]
    assert scores["capitals"]["n"] == 9
    assert scores["exact_match"]["n"] == 10
    assert len(model_server.requests) == 10, "what was answered is not asked again"


def test_too_many_missing_answers_are_refused(model_server, config, workspace, dataset):
    def refuse_two(messages):
        if messages[-1]["content"] in ("spell kiwi", "spell plum"):
            raise ValueError("too hard")
        return spell(messages)

    model_server.reply = refuse_two
    strict = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"max_unscored_ratio": 0.1})}
    )
    base = arms(model_server, dataset)[:1]
    with pytest.raises(EndpointError) as caught:
        evaluate(strict, workspace, dataset, base, "words")
    problem = caught.value.problems[0]
    assert problem.got == "2 of 10; 2 times: HTTP 400: too hard"
    assert "10%" in problem.allowed
    assert workspace.published() == [dataset]
    # The eight answers that came are kept.
    model_server.requests.clear()
    evaluate(config, workspace, dataset, base, "words")
    assert len(model_server.requests) == 2


def test_an_arm_without_any_answer_publishes_nothing(model_server, config, workspace, dataset):
    def refuse_shots(messages):
        if len(messages) > 2:
            raise ValueError("prompt of 900 tokens is longer than 512")
        return spell(messages)

    model_server.reply = refuse_shots
    with pytest.raises(EndpointError) as caught:
        evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    problem = caught.value.problems[0]
    assert "base+few-shot" in problem.what
    assert "longer than 512" in problem.got
    assert "num_shots" in problem.remedy
    assert workspace.published() == [dataset]


def test_requests_in_flight_are_bounded(model_server, config, workspace, dataset):
    model_server.reply, model_server.delay_s = spell, 0.02
    evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    assert 2 <= model_server.most_in_flight <= 4


def test_progress_is_told(model_server, config, workspace, dataset, caplog):
    model_server.reply = spell
    with caplog.at_level(logging.INFO, "tuneloop"):
        evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    lines = [r.getMessage() for r in caplog.records if "tokens/s" in r.getMessage()]
    assert any("base 10/10, score so far 0.500" in line for line in lines)
    assert any("20/20" in line and "left" in line for line in lines)


def test_plain_text_is_scored_in_bits_per_byte(model_server, config, workspace):
    texts = [{"row_id": f"t{i}", "text": f"the {word} is ripe", "num_tokens": 7} for i, word in enumerate(WORDS)]  # fmt: skip  # noqa: E501
    dataset = publish_dataset(workspace, texts, texts)
    config = config.model_copy(
        update={"task": config.task.model_copy(update={"type": "language_modeling"})}
    )
    assert choose_shots(dataset, 3, 0) == ()
    arm = Arm("base", Endpoint(model_server.url, "parrot"), (), "weights-1")
    artifact = evaluate(config, workspace, dataset, [arm], "words").artifact
    first = pq.read_table(artifact.path / "predictions.parquet").to_pylist()[0]
    # "the", " ", "apple", " ", "is", " ", "ripe": all but "the" are scored, each with its length.
    assert first["bits_per_byte"] == pytest.approx(14 / 0.6931471805599453 / 14)
    again = evaluate(config, workspace, dataset, [arm], "copy")
    assert len(model_server.requests) == 10
    assert again.artifact.manifest["metrics"] == artifact.manifest["metrics"]


def test_shots_are_chosen_by_the_seed_and_not_by_storage_order(workspace, tmp_path):
    train = [row(index, word) for index, word in enumerate(WORDS * 4)]
    first = publish_dataset(workspace, train[:1], train)
    turned = publish_dataset(Workspace(tmp_path / "other"), train[:1], train[::-1])
    assert choose_shots(first, 3, 7) == choose_shots(turned, 3, 7)
    assert choose_shots(first, 3, 7) != choose_shots(first, 3, 8)
    assert len({shot.messages for shot in choose_shots(first, 3, 7)}) == 3
    assert len(choose_shots(first, 100, 7)) == 40
    assert choose_shots(first, 0, 7) == ()


def test_mistakes_are_told_before_anything_is_asked(model_server, config, workspace, dataset):
    base = arms(model_server, dataset)[0]
    with pytest.raises(ConfigError, match="different names"):
        evaluate(config, workspace, dataset, [base, base], "words")
    with pytest.raises(DataError, match="test split is empty"):
        evaluate(config, workspace, publish_dataset(workspace, [], []), [base], "words")
    unknown = replace(base, endpoint=Endpoint(model_server.url, "parot"))
    with pytest.raises(EndpointError, match="parrot"):
        evaluate(config, workspace, dataset, [unknown], "words")
    assert model_server.requests == []


def test_any_text_survives_the_file_of_partial_answers(tmp_path):
    question = Question("a", (Message("user", "?"),))
    request = EvaluationRequest(Arm("arm", Endpoint("", "")), "arm", question, SamplingParams(8))
    other = replace(request, question=replace(question, example_id="b"))
    nasty = ModelAnswer("a", "p\u2028\n\x85", text='line\r\n\u2029"\\ \ud83d\ude00'.encode("utf-16", "surrogatepass").decode("utf-16"), finish_reason="stop")  # fmt: skip  # noqa: E501
    partial = PartialAnswers(tmp_path / "answers.jsonl")
    partial.add(request, nasty)
    partial.add(other, replace(nasty, example_id="b"))
    again = PartialAnswers(tmp_path / "answers.jsonl")
    assert len(again) == 2
    assert again._answers == partial._answers


def test_an_answer_with_other_tools_is_not_reused():
    tools = json.dumps([{"type": "function", "function": {"name": "f", "description": "Old."}}])
    question = Question("a", (Message("user", "?"),), "{}", tools=tools)
    request = EvaluationRequest(Arm("arm", Endpoint("", "")), "arm", question, SamplingParams(8))
    answered = PartialAnswers()
    answered.put("arm", ModelAnswer("a", request.prompt, text="yes", finish_reason="stop"))
    assert answered.get(request) is not None
    # A row's id knows the names of its tools alone.
    described = replace(question, tools=tools.replace("Old.", "New."))
    assert answered.get(replace(request, question=described)) is None
    assert prompt_turns(request.prompt) == [("tools", tools), ("user", "?")]


def test_a_kill_in_the_middle_loses_no_answer(model_server, config, workspace, dataset, tmp_path):
    model_server.reply, model_server.delay_s = spell, 0.1
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = f"""
import pathlib
from tuneloop.artifacts import Workspace
from tuneloop.config import FloorConfig, TuneloopConfig
from tuneloop.evals.runner import evaluate
from tuneloop.evals.scoring.questions import choose_shots
from tuneloop.records import Arm, Endpoint, Message, SamplingParams
workspace = Workspace({str(workspace.root)!r})
dataset = workspace.open("datasets/words")
text = pathlib.Path({str(tmp_path / "config.json")!r}).read_text()
config = TuneloopConfig.model_validate_json(text)
endpoint = Endpoint({model_server.url!r}, "parrot")
arms = [Arm("base", endpoint, (), "weights-1"),
        Arm("base+few-shot", endpoint, choose_shots(dataset, 2, 0), "weights-1")]
evaluate(config, workspace, dataset, arms, "words")
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    kept = 0
    while kept < 6:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
        for file in workspace.root.glob(".work/evaluations-*/scratch/answers.jsonl"):
            kept = len(list(read_entries(file)))
    process.kill()
    process.wait()
    assert workspace.published() == [dataset]
    kept = len(list(read_entries(file)))
    model_server.delay_s = 0
    model_server.requests.clear()
    published = evaluate(config, workspace, dataset, arms(model_server, dataset), "words")
    assert len(model_server.requests) == 20 - kept
    assert published.artifact.manifest["metrics"]["scores"] == {"base": 0.5, "base+few-shot": 1.0}


@pytest.fixture
def mixed(tmp_path: Path, workspace: Workspace) -> tuple[TuneloopConfig, Artifact]:
    """Words to spell, and words to say again."""
    sources = [
        {"path": f"{task}.jsonl", "format": "messages", "task": task} for task in ("spell", "echo")
    ]
    config = TuneloopConfig.model_validate(
        {
            "name": "mixed",
            "workspace": str(tmp_path / "workspace"),
            "task": {
                "type": "mixture",
                "tasks": {
                    "spell": {"type": "extraction", "fields": ["word", "letters"]},
                    "echo": {"type": "generation", "weight": None},
                },
            },
            "model": {"base": "parrot"},
            "data": {"sources": sources},
            "evaluation": {"num_resamples": 200, "concurrency": 4, "num_shots": 2},
        }
    )

    def echo(index: int, word: str) -> dict:
        turns = [{"role": "user", "content": f"echo {word}"}]
        made = row(500 + index, word)
        return made | {"messages": [*turns, {"role": "assistant", "content": word}]}

    def rows(start: int, words: list[str]) -> list[dict]:
        spelt = [row(start + i, w) | {"task": "spell"} for i, w in enumerate(words)]
        return spelt + [echo(start + i, w) | {"task": "echo"} for i, w in enumerate(words)]

    dataset = publish_dataset(workspace, rows(0, WORDS), rows(100, [w * 2 for w in WORDS]))
    return config, dataset


def test_a_mixture_is_asked_scored_and_told_task_by_task(model_server, workspace, mixed):
    config, dataset = mixed
    asked: list[list[dict[str, str]]] = []

    def reply(messages: list[dict[str, str]]) -> tuple[str, str]:
        asked.append(messages)
        if not messages[-1]["content"].startswith("spell"):
            return messages[-1]["content"].removeprefix("echo "), "stop"
        # Never right without examples: 5 of 10 that were fixed are not enough to say so.
        return spell(messages) if len(messages) > 2 else ("{}", "stop")

    model_server.reply = reply
    endpoint = Endpoint(model_server.url, "parrot")
    shots = choose_shots(dataset, 2, 0, ["spell", "echo"])
    assert [shot.task for shot in shots] == ["spell", "spell", "echo", "echo"]
    both = [Arm("base", endpoint, (), "w"), Arm("finetuned", endpoint, shots, "w")]
    artifact = evaluate(config, workspace, dataset, both, "mixed").artifact

    # Solved examples are of the question's own task.
    for messages in asked:
        turns = [m["content"].split()[0] for m in messages if m["role"] == "user"]
        assert len(turns) in (1, 3)
        assert len(set(turns)) == 1
    evaluation = Evaluation.load(artifact)
    base, tuned = evaluation.arms
    assert tuned["scores"]["score"]["value"] == 1
    assert base["scores"]["echo/token_f1"] == tuned["scores"]["echo/token_f1"]
    spelt = base["scores"]["spell/exact_match"]
    assert spelt["n"] == len(WORDS)
    assert base["scores"]["score"]["value"] == pytest.approx((1 + spelt["value"]) / 2)
    table = pq.read_table(artifact.path / "predictions.parquet").to_pylist()
    assert {row["task"] for row in table} == {"spell", "echo"}
    assert all((row["spell/exact_match"] is None) == (row["task"] == "echo") for row in table)

    # One task gained and the other did not: that is told where it has something left to gain.
    about = Situation(evaluation, artifact.ref, "mixed.yaml", None, 1, {})
    assert not any(action.title.startswith("Give") for action in advise(about))
    lacking = [
        replace(p, scores={**p.scores, "score": 0.5}) if p.task == "echo" else p
        for p in evaluation.predictions
    ]
    changed = about._replace(evaluation=replace(evaluation, predictions=lacking))
    (given,) = (action for action in advise(changed) if action.title.startswith("Give"))
    assert "did not clearly gain" in given.why
    assert given.command == "tuneloop run mixed.yaml 'data.train_tasks=[echo]'"
    report = (artifact.path / "report.html").read_text()
    # The report has the advice that is given afterwards, in its order.
    told = [html.escape(a.title.replace("`", "")) for a in advice_for(workspace, "mixed").actions]
    shown = re.findall(r"<li><b>(.*?)</b>", report)
    assert told
    assert [re.sub("</?code>", "", title) for title in shown] == told
    assert "Task by task" in report
    assert "mixture of spell (extraction), echo (generation)" in report
    output = io.StringIO()
    Console(width=100, file=output).print(terminal_table(artifact))
    printed = output.getvalue()
    assert "task by task" in printed
    assert "spell (all fields right, none invented)" in printed
    first = read_questions(dataset, ["spell", "echo"])[0]
    assert first.task == "spell"
    with pytest.raises(ArtifactError, match="does not have"):
        read_questions(dataset, ["spell", "shout"])
