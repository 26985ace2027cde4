"""The whole loop with a tiny model: real Ray, training, server and command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Workspace
from tuneloop.cli import main

COLOURS = ["red", "green", "blue", "black", "white", "brown", "yellow", "violet"]
THINGS = ["door", "car", "tree", "house", "boat", "chair", "stone", "lamp", "coat", "cup"]


def write_config(folder: Path, model: Path) -> Path:
    """Write 160 rows of a reading task and a configuration that learns it in a few steps."""
    rows = []
    for number in range(160):
        colour = COLOURS[(number * 7 + number // 10) % len(COLOURS)]
        thing = f"{THINGS[number % len(THINGS)]} number {number}"
        answer = json.dumps({"thing": thing, "colour": colour})
        rows.append({"question": f"The {thing} is {colour} today.", "answer": answer})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny.yaml"
    path.write_text(
        f"""\
name: tiny
workspace: {folder}/workspace
task: {{type: extraction, instruction: Answer with JSON., fields: [thing, colour]}}
model: {{base: {model}}}
data:
  sources: [{{path: {folder}/rows.jsonl, format: question_answer}}]
  max_seq_len: 256
  dedup: {{near: false}}
  split: {{num_test_examples: 16}}
training: {{learning_rate: 1.0e-2, global_batch_size: 8}}
serving: {{port: 0}}
evaluation: {{num_shots: 1, max_tokens: 16, num_resamples: 200}}
resources: {{num_cpus: 2, checkpoint_every_steps: 4}}
"""
    )
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("run"), tiny_model)


def call(*arguments: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(arguments)
    out, err = capfd.readouterr()
    return code, out, err


def test_the_whole_loop_then_everything_is_reused(
    ray_cluster: None, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call("run", str(config), "--json", capfd=capfd)
    assert code == 0, err
    first = json.loads(out)["artifacts"]
    assert [item["artifact"] for item in first] == [
        "datasets/tiny@v1",
        "evaluations/tiny-baseline@v1",
        "models/tiny@v1",
        "evaluations/tiny@v1",
    ]
    assert not any(item["reused"] for item in first)
    assert set(first[-1]["metrics"]["scores"]) == {"base", "base+few-shot", "finetuned"}
    assert first[-1]["metrics"]["num_unscored"] == 0
    assert first[2]["metrics"]["final_loss"] < first[2]["metrics"]["first_loss"]

    code, out, _ = call("run", str(config), "--json", capfd=capfd)
    again = json.loads(out)["artifacts"]
    assert all(item["reused"] for item in again)
    assert [item["artifact"] for item in again] == [item["artifact"] for item in first]

    # How it runs is not part of the result; what is trained is.
    code, out, _ = call("train", str(config), "--json", "serving.max_batch_size=4", capfd=capfd)
    assert json.loads(out)["reused"] is True
    code, out, _ = call("train", str(config), "--json", "training.max_steps=2", capfd=capfd)
    assert json.loads(out)["artifact"] == "models/tiny@v2"
    assert json.loads(out)["metrics"]["num_steps"] == 2


def test_what_was_trained_is_what_is_published(ray_cluster: None, config: Path) -> None:
    workspace = Workspace(config.parent / "workspace")
    model = workspace.open("models/tiny@v1")
    parity = json.loads((model.path / "parity.json").read_text())
    assert parity["passed"] is True
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "README.md"):
        assert (model.path / name).is_file(), name
    assert (model.path / "adapter" / "adapter_config.json").is_file()
    assert (model.path / "trainer_log.parquet").is_file()
    evaluation = workspace.open("evaluations/tiny@v1")
    for name in ("predictions.parquet", "metrics.json", "comparison.json", "report.html"):
        assert (evaluation.path / name).is_file(), name
    assert "models/tiny" in json.dumps(evaluation.manifest["inputs"]) or model.fingerprint in str(
        evaluation.manifest
    )


def test_table_list_and_show(
    ray_cluster: None, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call("run", str(config), capfd=capfd)
    assert code == 0
    for expected in ("base+few-shot", "finetuned", "report.html", "models/tiny@v1"):
        assert expected in out
    code, out, _ = call("ls", str(config), capfd=capfd)
    assert "models/tiny@v1" in out
    code, out, _ = call("show", "models/tiny@v1", str(config), capfd=capfd)
    assert "fingerprint" in out
    assert code == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.sources.0.path=/nope.jsonl"], "/nope.jsonl"),
        (["data.sources.0.format=alpaca"], "instruction"),
        (["data.max_seq_len=16"], "max_seq_len"),
        (["training.learning_rat=1"], "did you mean `learning_rate`?"),
        (["model.base=/nope"], "/nope"),
        (["data.num_train_examples=100000"], "data.num_train_examples"),
    ],
)
def test_bad_input_is_told_once_and_publishes_nothing(
    ray_cluster: None,
    config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    overrides: list[str],
    expected: str,
) -> None:
    code, out, err = call(
        "run", str(config), "--json", f"workspace={tmp_path}/w", *overrides, capfd=capfd
    )
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert json.loads(out)["error"]["problems"]
    assert Workspace(tmp_path / "w").published() == []


def test_malformed_line_is_named(
    ray_cluster: None, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = (config.parent / "rows.jsonl").read_text().splitlines()
    lines[16] = lines[16][:-5]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    code, _, err = call(
        "prepare", str(config), f"data.sources.0.path={bad}", f"workspace={tmp_path}/w", capfd=capfd
    )
    assert code == 2
    assert "bad.jsonl:17" in err


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_until_gone(processes: list[psutil.Process], seconds: float = 180) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return alive


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_training_then_goes_on_and_leaves_no_process(
    config: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    workspace = tmp_path / "w"
    command = [sys.executable, "-m", "tuneloop.cli", "train", str(config), "--json"]
    command += [f"workspace={workspace}", "resources.checkpoint_every_steps=2"]
    command += ["training.num_epochs=3"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    scratch = workspace / ".work"
    deadline = time.monotonic() + 240
    while len(list(scratch.glob("models-*/scratch/checkpoints/checkpoint_*"))) < 2:
        assert process.poll() is None, "the training ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = descendants(process.pid)
    process.send_signal(stop)
    code = process.wait(timeout=60)
    assert code == 130
    assert wait_until_gone(started) == []
    assert [a.kind for a in Workspace(workspace).published()] == ["datasets"]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["artifact"] == "models/tiny@v1"
    assert result["metrics"]["num_steps"] == 54
    log = pq.read_table(f"{result['path']}/trainer_log.parquet").to_pylist()
    assert [row["step"] for row in log] == list(range(1, 55))
    # No row is seen twice or left out, across the stop.
    for epoch in (1, 2, 3):
        seen = sorted(index for row in log if row["epoch"] == epoch for index in row["rows"])
        assert seen == list(range(len(seen)))
        assert sum(row["num_tokens"] for row in log if row["epoch"] == epoch) == sum(
            row["num_tokens"] for row in log if row["epoch"] == 1
        )
