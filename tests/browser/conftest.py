"""A workspace with one artifact of each kind, and the dashboard over it, started as users do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from tuneloop.artifacts import Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.data.fixes import AppliedFix
from tuneloop.evals.reporting.report import render_report
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.error_tags import tag_errors
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import Metric, Scorer
from tuneloop.evals.scoring.predictions import Prediction, write_predictions
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.marks import decide
from tuneloop.review.store import ReviewStore
from tuneloop.sweeps.curve import Bar, describe_forecast, learning_curves, series_of

APP = Path(__file__).parents[2] / "dashboards" / "app.py"
NUM_EXAMPLES = 30
ARMS = ("base", "base+few-shot", "finetuned")
SYSTEM = "Answer with JSON: colour and number of the thing."


def publish(
    workspace: Workspace, kind: str, files: dict[str, object], metrics: dict[str, Any]
) -> None:
    with workspace.draft(kind, "demo", kind.ljust(64, "0")) as draft:
        for name, content in files.items():
            path = draft.path / name
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                pq.write_table(content, path)
        draft.publish(config={}, resources={}, inputs=["a parrot"], metrics=metrics)


def publish_dataset(workspace: Workspace) -> None:
    turns = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "say a"},
        {"role": "assistant", "content": "a-ha"},
    ]
    rows = [
        {
            "row_id": f"r{i:03d}",
            "source": f"rows.jsonl:{i}",
            "messages": turns,
            "num_tokens": 9 + i,
        }
        for i in range(25)
    ]
    removed = [
        {
            "row_id": "r900", "source": "rows.jsonl:900", "stage": "dedup",
            "reason": "near duplicate",
            "kept_row_id": "r001", "similarity": 0.91, "text": "say a, again",
        }
    ]  # fmt: skip
    files = {
        "README.md": "---\nlicense: x\n---\n# The card of the rows\n\n25 rows.",
        "card.json": json.dumps(card_of(train=26, test=6, removed=1)),
        "train/part-0.parquet": pa.Table.from_pylist(rows),
        "test/part-0.parquet": pa.Table.from_pylist(rows[:5]),
        "removed/part-0.parquet": pa.Table.from_pylist(removed),
    }
    files["test/part-1.parquet"] = pa.Table.from_pylist(
        [
            {
                "row_id": "r29", "source": "rows.jsonl:290", "num_tokens": 9,
                "messages": [*turns[:2], {"role": "assistant", "content": '{"colour": "blue"}'}],
            }
        ]
    )  # fmt: skip
    files["train/part-1.parquet"] = pa.Table.from_pylist(
        [
            dict(
                rows[0],
                row_id="r800",
                messages=[*turns[:2], {"role": "assistant", "content": "boo"}],
            )
        ]
    )
    publish(workspace, "datasets", files, {"train_rows": 26, "test_rows": 6})


def card_of(*, removed: int, **rows: int) -> dict[str, Any]:
    """Return what a dataset's card counts."""
    found = sum(rows.values()) + removed
    funnel = [
        {"stage": "found", "rows": found, "removed": 0},
        {"stage": "dedup", "rows": found - removed, "removed": removed},
    ]
    return {"splits": {name: {"num_rows": n} for name, n in rows.items()}, "funnel": funnel}


def publish_fixed(workspace: Workspace) -> None:
    """Publish the next version of the dataset, as a preparation that applies all marks does.

    Preparing starts Ray; what it does to rows is tested with it.
    """
    rows = {"r000": ("train", "a-ha"), "r29": ("test", '{"colour": "blue"}')}
    marks = ReviewStore(workspace.location).marks("demo")
    applied = []
    for fix in decide(marks).fixes:
        side, before = rows[fix.content_id]
        done = AppliedFix(
            fix.content_id, "rows.jsonl", side, fix.action, before, "".join(fix.answers),
            fix.reviewers.split(", "), [mark.uid for mark in fix.marks], fix.marks[0].created_at,
        )  # fmt: skip
        applied.append(asdict(done))
    old = workspace.open("datasets/demo@v1")
    with workspace.draft("datasets", "demo", "f" * 64) as draft:
        for folder in ("train", "test", "removed"):
            shutil.copytree(old.path / folder, draft.path / folder)
        file = draft.path / "train" / "part-0.parquet"
        table = pq.read_table(file)
        pq.write_table(
            table.filter(pc.invert(pc.is_in(table["row_id"], pa.array(["r000", "r020"])))), file
        )
        card = card_of(train=24, test=6, removed=1) | {"fixes": {"applied": applied, "refused": {}}}
        (draft.path / "card.json").write_text(json.dumps(card))
        draft.publish(config={}, resources={}, inputs=[], metrics={})


def publish_model(workspace: Workspace) -> None:
    steps = range(1, 41)
    log = {
        "step": list(steps),
        "loss": [2.4 * 0.94**s + 0.3 + 0.05 * (s % 3) for s in steps],
        "learning_rate": [1e-3 * min(s / 5, 1) for s in steps],
        "grad_norm": [1.0 + 0.2 * (s % 4) for s in steps],
        "tokens_per_s": [190.0 + s % 7 for s in steps],
        "token_accuracy": [0.9 - 0.7 * 0.94**s for s in steps],
        "padding_ratio": [0.0 for _ in steps],
        "peak_memory_bytes": [3_000_000_000 + 10_000_000 * min(s, 9) for s in steps],
        "validation_loss": [2.4 * 0.94**s + 0.4 if s % 10 == 0 else None for s in steps],
        "validation_accuracy": [0.85 - 0.7 * 0.94**s if s % 10 == 0 else None for s in steps],
    }
    samples = [
        {"step": s, "row_id": f"v{row}", "prompt": f"Question {row}?",
         "reference": f"Answer {row}.", "completion": f"<b>Answer</b> {row} of step {s}"}
        for s in (10, 20, 30, 40) for row in (1, 2)
    ]  # fmt: skip
    parity = {
        "passed": True, "prompts": 4, "tokens": 64, "max_abs_logprob_diff": 2.1e-6,
        "greedy_equal": True, "num_ties": 0, "tolerance": 1e-3, "arms": {"merged": 2.1e-6},
    }  # fmt: skip
    files = {
        "README.md": "# The card of the model",
        "parity.json": json.dumps(parity),
        "trainer_log.parquet": pa.table(log),
        "samples.jsonl": "".join(json.dumps(sample) + "\n" for sample in samples),
    }
    publish(workspace, "models", files, {"loss": 0.41})


def publish_sweep(workspace: Workspace) -> None:
    trials = []
    for size, base in ((100, "small"), (200, "small"), (400, "small"), (100, "big"), (200, "big")):
        score = {"small": 0.3, "big": 0.5}[base] + 0.08 * (size / 100) ** 0.5
        trials.append(
            {
                "data.num_train_examples": size, "model.base": base, "num_train_examples": size,
                "num_parameters": {"small": 135, "big": 270}[base] * 10**6,
                "model": f"models/demo-{base}-{size}@v1", "score": score, "low": score - 0.06,
                "high": score + 0.06, "loss": 1 - score, "wall_s": size / 2, "status": "done",
                "problem": "", "seed": 0, "test_score": None,
            }
        )  # fmt: skip
    broken = dict.fromkeys(("model", "score", "low", "high", "loss"))
    trials.append(
        trials[-1]
        | broken
        | {"data.num_train_examples": 400, "num_train_examples": 400, "status": "failed",
           "problem": "the loss is not finite"}
    )  # fmt: skip
    trials[4]["test_score"] = 0.55
    keys = ["data.num_train_examples", "model.base"]
    curves = learning_curves(trials, keys)
    for curve in curves:
        cells = [
            {"num_train_examples": trial["num_train_examples"], "value": trial["score"],
             "low": trial["low"], "high": trial["high"]}
            for trial in trials
            if series_of(trial, keys) == curve["series"] and trial["score"] is not None
        ]  # fmt: skip
        bars = [Bar("base+few-shot", 0.4, 0.35, 0.45)]
        curve["forecast"] = describe_forecast(cells, Metric("", kind="binary"), 0.95, bars)
    content = {
        "metric": "exact_match", "keys": keys, "curves": curves, "confidence": 0.95,
        "num_validation_examples": 250, "num_test_examples": 260,
        "best": {
            "trial": 4, "model": "models/demo-big-200@v1",
            "validation": {"value": 0.61, "low": 0.55, "high": 0.67},
            "test": {"value": 0.55, "low": 0.49, "high": 0.61},
            "optimism": {"value": 0.06, "low": -0.02, "high": 0.14},
        },
    }  # fmt: skip
    files = {"trials.parquet": pa.Table.from_pylist(trials), "curve.json": json.dumps(content)}
    publish(workspace, "sweeps", files, {"trials": 6})


def answer(arm: str, index: int) -> str:
    """What an arm says: `base` knows few, `finetuned` most, and each errs in its own way."""
    right = json.dumps({"colour": "blue", "number": index})
    if arm == "base":
        wordy = "Teh colour definately is a kind of blueish thing, retuning the nubmer " * 3
        return right if index < 4 or index == 29 else wordy if index % 2 else right[:-4]
    if arm == "base+few-shot":
        return right if index < 15 else json.dumps({"colour": "green", "number": index})
    return right if index < 28 else json.dumps({"colour": "blue", "number": index + 1})


def publish_evaluation(
    workspace: Workspace, name: str = "demo", arms: Sequence[str] = ARMS
) -> None:
    config = TuneloopConfig.model_validate(
        {
            "name": name,
            "task": {"type": "extraction"},
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
        }
    )
    ids = [f"r{index:02d}" for index in range(NUM_EXAMPLES)]
    references = {r: json.dumps({"colour": "blue", "number": i}) for i, r in enumerate(ids)}
    scorer = Scorer(config.task, references)
    rows = []
    for arm in arms:
        for index, row_id in enumerate(ids):
            question = f"Thing number {index} is blue. <b>What is it?</b>"
            turns = [("system", SYSTEM), ("user", question)]
            prompt = json.dumps([{"role": r, "content": c} for r, c in turns])
            text, reference = answer(arm, index), references[row_id]
            reason = "stop" if text.endswith("}") else "length"
            if (arm, index) == ("base", 12):
                rows.append(
                    Prediction(row_id, arm, prompt, reference, "", None, None, None, None,
                               "unscored", error="HTTP 500: out of luck")
                )  # fmt: skip
                continue
            rows.append(
                Prediction(
                    row_id, arm, prompt, reference, text, reason, 30, 12, 0.1, "scored",
                    error_tags=tag_errors(scorer, reference, text, reason, prompt),
                    scores=scorer.score(reference, text),
                )
            )  # fmt: skip
    publish_results(workspace, config, rows, scorer)


def publish_results(
    workspace: Workspace, config: TuneloopConfig, rows: list[Prediction], scorer: Scorer
) -> None:
    resampling = Resampling(num_resamples=200)
    metrics, comparison = summarise(rows, scorer, resampling), compare(rows, scorer, resampling)
    evaluation = Evaluation(config.name, rows, metrics, comparison)
    with workspace.draft("evaluations", config.name, "e" * 64) as draft:
        write_predictions(rows, list(scorer.metrics), draft.path)
        (draft.path / "metrics.json").write_text(json.dumps(metrics))
        (draft.path / "comparison.json").write_text(json.dumps(comparison))
        (draft.path / "report.html").write_text(
            render_report(evaluation, config, f"datasets/{config.name}@v1")
        )
        draft.publish(
            config={"dataset": "datasets".ljust(64, "0")},
            resources={},
            inputs=[f"datasets/{config.name}@v1"],
            metrics=evaluation.headline_numbers(),
        )


def publish_mixture(workspace: Workspace) -> None:
    """Two labels and two titles; the finetuned model gets all but one label right."""
    tasks = {
        "label": {"type": "classification", "labels": ["yes", "no"]},
        "title": {"type": "generation"},
    }
    sources = [{"path": f"{n}.jsonl", "format": "messages", "task": n} for n in tasks]
    config = TuneloopConfig.model_validate(
        {
            "name": "mixed",
            "task": {"type": "mixture", "tasks": tasks},
            "model": {"base": "parrot"},
            "data": {"sources": sources},
        }
    )
    references = {"l0": "yes", "l1": "no", "t0": "a red door", "t1": "a blue car"}
    task_of = {r: "label" if r[0] == "l" else "title" for r in references}
    scorer = Scorer(config.task, references, task_of)
    rows = []
    for arm in ("base", "finetuned"):
        for row_id, reference in references.items():
            task = task_of[row_id]
            text = reference if arm == "finetuned" and row_id != "l1" else "yes I am a red model"
            prompt = json.dumps([{"role": "user", "content": f"Question {row_id}?"}])
            tags = tag_errors(scorer.of(task), reference, text, "stop", prompt)
            scores = scorer.score(reference, text, task)
            rows.append(
                Prediction(row_id, arm, prompt, reference, text, "stop", 9, 5, 0.1, "scored",
                           error_tags=tags, scores=scores, task=task)
            )  # fmt: skip
    publish_results(workspace, config, rows, scorer)


def publish_labels(workspace: Workspace) -> None:
    """Four labels, three of them right, where macro-F1 decides."""
    config = TuneloopConfig.model_validate(
        {
            "name": "labels",
            "task": {"type": "classification", "labels": ["yes", "no"]},
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
        }
    )
    references = {"l0": "yes", "l1": "no", "l2": "yes", "l3": "no"}
    scorer = Scorer(config.task, references, primary="macro_f1")
    rows = [
        Prediction(row_id, "finetuned", "Right?", reference, said, "stop", 9, 5, 0.1, "scored",
                   scores=scorer.score(reference, said))
        for row_id, reference in references.items()
        for said in ["no" if row_id == "l2" else reference]
    ]  # fmt: skip
    publish_results(workspace, config, rows, scorer)


def fill(folder: Path) -> Path:
    workspace = Workspace(folder)
    publish_dataset(workspace)
    publish_model(workspace)
    publish_sweep(workspace)
    publish_evaluation(workspace)
    return workspace.root


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A workspace with the evaluation of a mixture of tasks."""
    workspace = Workspace(tmp_path / "mixed")
    publish_mixture(workspace)
    return workspace.root


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A workspace with the evaluation of a classification."""
    workspace = Workspace(tmp_path / "labelled")
    publish_labels(workspace)
    return workspace.root


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one artifact of each kind."""
    return fill(tmp_path_factory.mktemp("dashboard") / "workspace")


@pytest.fixture
def next_version() -> Iterator[Callable[[Path], None]]:
    """What publishes the next version of a workspace's dataset; it is gone after the test."""
    folders: list[Path] = []

    def publish_next(root: Path) -> None:
        publish_fixed(Workspace(root))
        folders.append(root / "datasets" / "demo" / "v2")

    yield publish_next
    for folder in folders:
        shutil.rmtree(folder)


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/_stcore/health", timeout=5).read()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


@pytest.fixture(scope="session")
def served(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard started the way a user starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("streamlit") / "log.txt"
    command = [sys.executable, "-m", "tuneloop.cli", "dashboard"]
    command += ["--workspace", str(filled), "--port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={key: value for key, value in os.environ.items() if key != "TUNELOOP_WORKSPACE"},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    wait_until_up(url, process, log)
    yield url
    os.killpg(process.pid, 15)
    process.wait(20)


@pytest.fixture(scope="session")
def parrots() -> Iterator[str]:
    """The base URL of a server that streams what it is asked, by our own protocol."""

    from tuneloop.serving import answers, parsing, protocol
    from tuneloop.serving.requests import DecodeResult

    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> Any:
        return answers.model_list(["loud", "quiet"], 0)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        asked = parsing.parse_chat(await request.json())
        text = asked.conversation()[-1].content
        if text == "fail":
            error = protocol.ProtocolError(400, "this question is refused")
            return JSONResponse(error.body(), error.status)
        words = (text.upper() if asked.model == "loud" else text.lower()).split(" ")
        chunks = answers.Chunks(asked)

        def events() -> Iterator[str]:
            yield chunks.first()
            for word in words:
                yield chunks.text(word + " ")
            if text != "break":
                answer = DecodeResult("", "stop", 3, len(words))
                yield chunks.end(answer)
                yield from chunks.last([answer])

        return StreamingResponse(events(), media_type="text/event-stream")

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("streamlit", reason="the dashboard needs `pip install tuneloop[dashboard]`")
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(sys, "argv", ["app.py"])
    # As `streamlit run` does.
    monkeypatch.syspath_prepend(str(APP.parent))

    def open_(workspace: object, page: str = "overview", **query: str) -> AppTest:
        monkeypatch.setenv("TUNELOOP_WORKSPACE", str(workspace))
        app = AppTest.from_file(str(APP), default_timeout=60)
        for key, value in query.items():
            app.query_params[key] = value
        app.run()
        if page != "overview":
            app.switch_page(f"views/{page}.py").run()
        assert not app.exception
        return app

    return open_


@pytest.fixture
def own(filled, tmp_path):
    """A copy of the workspace, without votes, that a test may vote in."""
    shutil.copytree(filled, tmp_path / "workspace", ignore=shutil.ignore_patterns("review"))
    return tmp_path / "workspace"
