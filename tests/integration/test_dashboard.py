"""The dashboard over real artifacts: its pages without a browser, and in headless Chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tuneloop.artifacts import Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.evals.comparison import Prediction, compare, summarise
from tuneloop.evals.findings import Evaluation
from tuneloop.evals.intervals import Resampling
from tuneloop.evals.metrics import Scorer
from tuneloop.evals.report import render_report
from tuneloop.evals.runner import write_predictions

APP = Path(__file__).parents[2] / "dashboards" / "app.py"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytest.importorskip("streamlit", reason="the dashboard needs `pip install tuneloop[dashboard]`")


def publish(workspace: Workspace, kind: str, files: dict[str, object]) -> None:
    with workspace.draft(kind, "demo", kind.ljust(64, "0")) as draft:
        for name, content in files.items():
            path = draft.path / name
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                pq.write_table(content, path)
        draft.publish(config={}, resources={}, inputs=["a parrot"], metrics={"rows": 7})


def publish_evaluation(workspace: Workspace) -> None:
    config = TuneloopConfig.model_validate(
        {
            "name": "demo",
            "task": {"type": "extraction"},
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
        }
    )
    scorer = Scorer(config.task, {"r": '{"a": 1}'})
    rows = [
        Prediction(
            f"r{index:02d}", arm, "[]", '{"a": 1}', text, "stop", 9, 4, 0.1, "scored",
            scores=scorer.score('{"a": 1}', text),
        )
        for arm, right in (("base", 4), ("finetuned", 28))
        for index in range(30)
        for text in ['{"a": 1}' if index < right else '{"a": 2}']
    ]  # fmt: skip
    resampling = Resampling(num_resamples=200)
    metrics, comparison = summarise(rows, scorer, resampling), compare(rows, scorer, resampling)
    evaluation = Evaluation("demo", rows, metrics, comparison)
    with workspace.draft("evaluations", "demo", "e" * 64) as draft:
        write_predictions(rows, list(scorer.metrics), draft.path)
        (draft.path / "metrics.json").write_text(json.dumps(metrics))
        (draft.path / "comparison.json").write_text(json.dumps(comparison))
        (draft.path / "report.html").write_text(
            render_report(evaluation, config, "datasets/demo@v1")
        )
        draft.publish(config={}, resources={}, inputs=[], metrics=evaluation.headline_numbers())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one dataset, one model and one evaluation."""
    workspace = Workspace(tmp_path_factory.mktemp("dashboard") / "workspace")
    turns = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a-ha"}]
    table = pa.Table.from_pylist(
        [{"row_id": "r1", "source": "rows.jsonl:1", "messages": turns, "num_tokens": 4}]
    )
    publish(
        workspace,
        "datasets",
        {
            "README.md": "---\nlicense: x\n---\n# The card of the rows",
            "train/part-0.parquet": table,
            "test/part-0.parquet": table,
        },
    )
    publish(
        workspace,
        "models",
        {
            "README.md": "# The card of the model",
            "parity.json": '{"greedy_tokens_equal": true}',
            "trainer_log.parquet": pa.table({"step": [1, 2, 3], "loss": [2.0, 1.5, 1.2]}),
        },
    )
    publish_evaluation(workspace)
    return workspace.root


def open_app(monkeypatch: pytest.MonkeyPatch, workspace: Path, artifact: str = ""):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv("TUNELOOP_WORKSPACE", str(workspace))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    app = AppTest.from_file(str(APP), default_timeout=30)
    if artifact:
        app.query_params["artifact"] = artifact
    app.run()
    assert not app.exception
    return app


def test_an_empty_workspace_says_what_to_do(monkeypatch, tmp_path):
    app = open_app(monkeypatch, tmp_path / "none")
    assert app.main.title[0].value == "Nothing here yet"
    assert "make demo" in app.code[0].value
    assert not (tmp_path / "none").exists(), "looking changes nothing"


def test_a_workspace_that_cannot_be_opened_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    app = open_app(monkeypatch, tmp_path / "file")
    assert "cannot be opened" in app.error[0].value
    assert "is a file" in app.code[0].value


def test_the_overview_lists_artifacts_and_the_newest_verdict(monkeypatch, filled):
    app = open_app(monkeypatch, filled)
    assert "Finetuning helped" in app.success[0].value
    listed = app.dataframe[2].value
    assert list(listed["artifact"]) == [
        "evaluations/demo@v1", "models/demo@v1", "datasets/demo@v1",
    ]  # fmt: skip
    assert "finetuned 0.9333" in listed["metrics"][0]


def test_choosing_an_artifact_shows_it_and_puts_it_into_the_address(monkeypatch, filled):
    app = open_app(monkeypatch, filled)
    app.sidebar.radio[0].set_value("models/demo@v1").run()
    assert app.main.title[0].value == "models/demo@v1"
    assert app.query_params["artifact"] == "models/demo@v1"
    assert "# The card of the model" in [m.value for m in app.markdown]
    assert "Training loss" in [s.value for s in app.subheader]
    app.sidebar.radio[0].set_value("datasets/demo@v1").run()
    assert app.main.title[0].value == "datasets/demo@v1"
    app.sidebar.radio[0].set_value("Overview").run()
    assert app.main.title[0].value == "Overview"
    assert "artifact" not in app.query_params


def test_dataset_page_shows_card_and_rows(monkeypatch, filled):
    app = open_app(monkeypatch, filled, "datasets/demo@v1")
    assert "# The card of the rows" in [m.value for m in app.markdown]
    assert {"say a", "a-ha"} <= {c.value for c in app.code}


def test_an_address_of_something_gone_falls_back_to_the_overview(monkeypatch, filled):
    assert open_app(monkeypatch, filled, "models/gone@v9").main.title[0].value == "Overview"


@pytest.fixture(scope="module")
def served(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard started the way a user starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("streamlit") / "log.txt").open("w+")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "streamlit", "run", str(APP), f"--server.port={port}"),
            *("--", "--workspace", str(filled)),
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={key: value for key, value in os.environ.items() if key != "TUNELOOP_WORKSPACE"},
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/_stcore/health", timeout=5).read()
            break
        except OSError:
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(20)
    log.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_pages_work_in_a_browser_and_ask_nobody_else(served):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(served)
        page.get_by_text("Finetuning helped").first.wait_for(timeout=30_000)
        page.get_by_text("models/demo@v1").first.click()
        page.get_by_text("Training loss").wait_for(timeout=30_000)
        page.locator("canvas, svg.marks").first.wait_for(timeout=30_000)
        page.get_by_text("evaluations/demo@v1").first.click()
        report = page.frame_locator("iframe").first
        report.get_by_role("heading", name="Paired differences").wait_for(timeout=30_000)
        report.get_by_text("r04").first.wait_for(timeout=30_000)
        report.get_by_text("Still wrong: 2").click()
        report.get_by_text("r28").first.wait_for(timeout=30_000)
        assert "artifact=evaluations" in page.url
        browser.close()
    local = (served, served.replace("http", "ws"), "data:", "blob:", "about:")
    assert [url for url in asked if not url.startswith(local)] == []
    assert errors == []
