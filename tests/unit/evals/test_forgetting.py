"""General tasks before and after: what the harness found is read, paired, kept, not run twice."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import ForgettingConfig, TuneloopConfig
from tuneloop.errors import EndpointError
from tuneloop.evals.reporting.forgetting import show_forgetting
from tuneloop.evals.runner import evaluate, find_unanswered
from tuneloop.evals.scoring.forgetting import describe_forgetting
from tuneloop.evals.scoring.harness import (
    DocumentScore,
    Models,
    forgetting_problems,
    models_to_compare,
    read_samples,
)
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.records import Arm, Conversation, Endpoint

BASE = Arm("base", Endpoint("", "base"), (), "weights-1")
TUNED = Arm("tuned", Endpoint("", "tuned"), (), "weights-2")


def sample(doc: int, acc: float) -> str:
    scores = {"acc": acc, "acc_norm": 1 - acc, "details": [1, 2]}
    # As the harness writes it: a separator of lines stays within the document.
    row = {"doc_id": doc, "doc": "a\u2028b", "filter": "none", "metrics": list(scores), **scores}
    return json.dumps(row, ensure_ascii=False)


def test_samples_are_read_and_the_newest_of_a_task_counts(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for time, acc in (("2026-01-01T00-00-00.1", 0.0), ("2026-01-02T00-00-00.1", 1.0)):
        file = folder / f"samples_my_task_{time}.jsonl"
        file.write_text("\n".join(sample(doc, acc) for doc in range(2)) + "\n", encoding="utf-8")
    scores = read_samples(tmp_path, "id", BASE)
    assert [(s.task, s.doc, s.metric, s.value, s.model) for s in scores] == [
        ("my_task", f"{doc}/none", metric, value, "weights-1")
        for doc in range(2)
        for metric, value in (("acc", 1.0), ("acc_norm", 0.0))
    ]


def test_what_was_lost_is_told_by_documents_both_have() -> None:
    scores = [
        DocumentScore("i", arm.name, "w", task, f"{doc}/none", "acc", float(is_right))
        for task in ("lost", "kept")
        for arm, num_docs in ((BASE, 40), (TUNED, 60))
        for doc in range(num_docs)
        for is_right in [arm is BASE or task == "kept" or doc % 10 == 0]
    ]
    told = describe_forgetting(scores, Models(BASE, TUNED), Resampling(num_resamples=200))
    lost, kept = told["tasks"]
    assert (lost["before"]["value"], lost["after"]["value"]) == (1.0, 0.1)
    assert lost["difference"]["n"] == 40
    assert lost["difference"]["high"] < -0.5
    assert lost["difference"]["p_adjusted"] < 0.001
    assert kept["difference"]["value"] == 0
    assert told["fingerprints"] == {"base": "weights-1", "tuned": "weights-2"}


def test_where_lower_is_better_a_higher_score_is_a_loss(tmp_path: Path) -> None:
    scores = []
    for arm, error in ((BASE, 0.0), (TUNED, 1.0)):
        time, folder = f"2026-01-01T00-00-0{error}", tmp_path / arm.name
        folder.mkdir()
        names = {"error": False, "perplexity": False, "acc_mutual": True}
        (folder / f"results_{time}.json").write_text(json.dumps({"higher_is_better": {"t": names}}))
        # The sample's `perplexity` is a log-likelihood: the higher, the better.
        values = [
            {"error": error, "perplexity": -error * (1 + doc % 3), "acc_mutual": error}
            for doc in range(40)
        ]
        rows = [{"doc_id": doc, "metrics": list(names), **v} for doc, v in enumerate(values)]
        lines = [json.dumps(row) for row in rows]
        (folder / f"samples_t_{time}.jsonl").write_text("\n".join(lines))
        scores += read_samples(folder, "id", arm)
    shown = []
    for models in (Models(BASE, TUNED), Models(TUNED, BASE)):
        for name in ("error", "log_likelihood", "acc_mutual"):
            of_name = [score for score in scores if score.metric == name]
            told = describe_forgetting(of_name, models, Resampling(num_resamples=200))
            shown += [(row["metric"], row["says"]) for row in show_forgetting(told, 0.95)]
    names = ["error, lower is better", "log_likelihood", "acc_mutual"]
    first = ["forgotten", "forgotten", "better than before"]
    then = ["better than before", "better than before", "forgotten"]
    assert shown == [*zip(names, first, strict=True), *zip(names, then, strict=True)]


def test_a_document_that_is_read_in_two_ways_is_one_document() -> None:
    scores = [
        DocumentScore("i", arm.name, "w", "gsm8k", f"{doc}/{way}", "exact_match", float(is_right))
        for arm in (BASE, TUNED)
        for way in ("strict-match", "flexible-extract")
        for doc in range(40)
        for is_right in [doc % 2 if arm is BASE else doc % 4 == 1 or way == "flexible-extract"]
    ]
    told = describe_forgetting(scores, Models(BASE, TUNED), Resampling(num_resamples=200))["tasks"]
    strict, loose = told
    assert [one["metric"] for one in told] == [
        "exact_match,strict-match", "exact_match,flexible-extract",
    ]  # fmt: skip
    assert [one["is_primary"] for one in told] == [True, False]
    assert (strict["before"]["value"], strict["after"]["value"]) == (0.5, 0.25)
    assert loose["after"]["value"] == 1.0
    assert [one["difference"]["n"] for one in told] == [40, 40]


def test_the_first_and_the_last_model_that_differ_are_compared() -> None:
    shots = replace(BASE, name="few", shots=(Conversation(()),))
    endpoint = replace(TUNED, name="far", model_fingerprint="")
    assert models_to_compare([BASE, shots, TUNED, endpoint]) == (BASE, TUNED)
    assert models_to_compare([BASE, shots, replace(BASE, name="again"), endpoint]) is None


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("nowhere.yaml", "No such file"),
        ("broken.yaml", "not valid YAML"),
        ("nameless.yaml", "no name"),
        ("empty.yaml", "data are not there"),
        ("good.yaml", ""),
        ("arc_easy", ""),
    ],
)
def test_a_task_that_cannot_run_is_told_before_anything_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    Path("broken.yaml").write_text("task: [")
    Path("nameless.yaml").write_text("dataset_path: json\n")
    for name, file in (("empty", "gone.jsonl"), ("good", "rows.jsonl")):
        data = f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        Path(f"{name}.yaml").write_text(f"task: {name}\n{data}process_docs: !function utils.f\n")
    problems = forgetting_problems(ForgettingConfig(tasks=[task]))
    assert " ".join(map(str, problems)).count(told) >= 1 if told else not problems


def test_the_training_environment_is_refused_and_one_without_the_harness(tmp_path: Path) -> None:
    (own,) = forgetting_problems(ForgettingConfig(tasks=["arc"], environment=sys.prefix))
    assert "an environment of its own" in own.what
    (empty,) = forgetting_problems(ForgettingConfig(tasks=["arc"], environment=str(tmp_path)))
    assert "pip install 'lm-eval[api]" in empty.remedy


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment whose `lm_eval` asks nothing: right where the model's name is longer."""
    folder = tmp_path / "lm-eval"
    site = folder / "lib" / "python3" / "site-packages"
    (folder / "bin").mkdir(parents=True)
    (site / "lm_eval-0.4.99.dist-info").mkdir(parents=True)
    program = folder / "bin" / "python"
    program.write_text(
        textwrap.dedent(
            f"""\
            #!{sys.executable}
            import json, pathlib, sys
            if sys.argv[1] == "-c":
                sys.exit()
            names = "--model_args", "--limit", "--output_path"
            options = {{name: sys.argv[sys.argv.index(name) + 1] for name in names}}
            arguments = dict(p.split("=", 1) for p in options["--model_args"].split(","))
            with open({str(tmp_path / "asked")!r}, "a") as file:
                file.write(arguments["model"] + " " + options["--limit"] + "\\n")
            if arguments["model"] == "parrot" and options["--limit"] == "3":
                sys.exit("no such task: capitals")
            print(arguments["max_length"], arguments["base_url"])
            folder = pathlib.Path(options["--output_path"]) / "m"
            folder.mkdir(parents=True)
            with open(folder / "samples_capitals_2026.jsonl", "w") as file:
                for doc in range(int(options["--limit"])):
                    acc = float(doc % 4 == 0 or arguments["model"] == "parrot")
                    line = {{"doc_id": doc, "metrics": ["acc"], "acc": acc}}
                    file.write(json.dumps(line) + "\\n")
            """
        )
    )
    os.chmod(program, 0o755)
    return folder


def publish(workspace: Workspace) -> Artifact:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "HELLO"}]
    row = {"row_id": "r", "messages": messages, "num_tokens": 2}
    with workspace.draft("datasets", "d", "d" * 64) as draft:
        for split in ("train", "test"):
            (draft.path / split).mkdir()
            pq.write_table(pa.Table.from_pylist([row]), draft.path / split / "part-0.parquet")
        return draft.publish(config={}, resources={}, inputs=[], metrics={})


def test_the_harness_runs_once_for_each_model_and_is_told_in_the_same_report(
    model_server: Any, tmp_path: Path, environment: Path
) -> None:
    model_server.models = ["parrot", "owl"]

    def config(limit: int) -> TuneloopConfig:
        forgetting = {"tasks": ["capitals"], "limit": limit, "environment": str(environment)}
        return TuneloopConfig.model_validate(
            {
                "name": "words",
                "task": {"type": "generation"},
                "model": {"base": "parrot"},
                "data": {"sources": [{"path": "x", "format": "messages"}]},
                "evaluation": {"num_resamples": 200, "forgetting": forgetting},
            }
        )

    workspace = Workspace(tmp_path / "workspace")
    dataset = publish(workspace)
    arms = [
        replace(arm, endpoint=Endpoint(model_server.url, model), tokenizer=tmp_path)
        for arm, model in ((BASE, "parrot"), (TUNED, "owl"))
    ]
    with pytest.raises(EndpointError, match="no such task: capitals"):
        evaluate(config(3), workspace, dataset, arms, "words")
    artifact = evaluate(config(40), workspace, dataset, arms, "words").artifact
    asked = (tmp_path / "asked").read_text().split("\n")
    assert asked == ["parrot 3", "parrot 40", "owl 40", ""]
    told = json.loads((artifact.path / "comparison.json").read_text())["forgetting"]
    (task,) = told["tasks"]
    assert (task["before"]["value"], task["after"]["value"]) == (1.0, 0.25)
    assert told["harness"]["lm_eval"] == "0.4.99"
    stored = pq.read_table(artifact.path / "forgetting.parquet").to_pylist()
    assert {(row["arm"], row["model"]) for row in stored} == {
        ("base", "weights-1"),
        ("tuned", "weights-2"),
    }
    report = (artifact.path / "report.html").read_text()
    assert "forgotten" in report
    assert "asked by lm-evaluation-harness 0.4.99" in report
    # Another evaluation of the same models runs it no more, and needs no server.
    assert find_unanswered(config(40), workspace, dataset, arms) == []
    evaluate(config(40), workspace, dataset, arms, "others")
    assert (tmp_path / "asked").read_text().split("\n") == asked
    assert [a.name for a in find_unanswered(config(41), workspace, dataset, arms)] == [
        "base",
        "tuned",
    ]
