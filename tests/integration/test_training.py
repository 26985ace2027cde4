"""Training through Ray Train: artifacts, reuse, killed workers, mistakes."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Published, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.errors import ModelError, ResourceError
from tuneloop.models.bases.source import BaseModel
from tuneloop.training.launch import train

PublishSums = Callable[[Workspace, BaseModel], Artifact]


def make_config(**sections: Any) -> TuneloopConfig:
    raw: dict[str, Any] = {
        "name": "sums",
        "task": {"type": "extraction"},
        "model": {"base": "tiny"},
        "data": {"sources": [{"path": "x.jsonl", "format": "messages"}]},
        "training": {"num_epochs": 20, "learning_rate": 5e-3, "eval_every_steps": 50},
        "resources": {"checkpoint_every_steps": 10},
    }
    return TuneloopConfig.model_validate(raw | sections)


def log_of(model: Artifact) -> dict[str, list[Any]]:
    table = pq.read_table(model.path / "trainer_log.parquet")
    assert table.column("validation_loss").null_count == table.num_rows - 2
    return table.select(["step", "epoch", "loss", "learning_rate", "grad_norm", "rows"]).to_pydict()


def every_row_once_an_epoch(log: dict[str, list[Any]], num_rows: int = 37) -> bool:
    epochs: dict[int, list[int]] = {}
    for epoch, rows in zip(log["epoch"], log["rows"], strict=True):
        epochs.setdefault(epoch, []).extend(rows)
    return all(sorted(rows) == list(range(num_rows)) for rows in epochs.values())


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return BaseModel("tiny", tiny_model, "b" * 64, "Apache-2.0")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def trained(
    ray_cluster: None, workspace: Workspace, base: BaseModel, publish_sums: PublishSums
) -> Published:
    """A training whose worker was killed twice."""
    dataset = publish_sums(workspace, base)
    killed: list[int] = []

    def kill_twice() -> None:
        deadline = time.monotonic() + 200
        for how, num_steps in ((signal.SIGKILL, 30), (signal.SIGTERM, 70)):
            num_killed = len(killed)
            while time.monotonic() < deadline and len(killed) == num_killed:
                for file in workspace.root.glob(".work/*/scratch/progress.jsonl"):
                    # The last line may be half written.
                    lines = file.read_text().split("\n")[:-1]
                    if lines and json.loads(lines[-1])["step"] >= num_steps:
                        killed.extend(send_to_workers(how))
                time.sleep(0.02)

    thread = threading.Thread(target=kill_twice)
    thread.start()
    published = train(make_config(), workspace, base, dataset)
    thread.join()
    assert len(set(killed)) == 2
    return published


def send_to_workers(how: signal.Signals) -> list[int]:
    """Send a signal to every training worker and return their process ids."""
    found = []
    for process in psutil.Process().children(recursive=True):
        # Some end while they are looked at.
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.send_signal(how)
                found.append(process.pid)
    return found


def test_a_model_artifact_has_everything(
    trained: Published, workspace: Workspace, base: BaseModel
) -> None:
    model = trained.artifact
    assert not trained.reused
    assert model.ref == "models/sums@v1"
    names = {file["path"] for file in model.manifest["files"]}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "trainer_log.parquet",
        "samples.jsonl",
        "parity.json",
        "tuneloop_render.json",
        "README.md",
    }
    log = log_of(model)
    assert log["step"] == list(range(1, 101))
    assert log["loss"][-1] < log["loss"][0] - 0.5
    assert model.manifest["metrics"]["num_steps"] == 100
    assert json.loads((model.path / "parity.json").read_text())["passed"]
    samples = [json.loads(line) for line in (model.path / "samples.jsonl").open()]
    assert [sample["step"] for sample in samples] == [50] * 3 + [100] * 3
    assert samples[0]["row_id"] == "row37"
    assert "It is 38." in samples[0]["reference"]
    assert model.manifest["metrics"]["validation_loss"] < 6
    card = (model.path / "README.md").read_text()
    assert "Apache-2.0" in card
    assert "datasets/sums@v1" in card
    # Checkpoints are gone with the draft.
    assert not list((workspace.root / ".work").iterdir())


def test_the_same_training_is_reused_however_it_would_be_executed(
    trained: Published, workspace: Workspace, base: BaseModel
) -> None:
    config = make_config(resources={"micro_batch_size": 2, "zero_stage": 1})
    again = train(config, workspace, base, workspace.open("datasets/sums"))
    assert again.reused
    assert again.artifact.ref == trained.artifact.ref


def test_killed_workers_are_replaced_and_nothing_differs(
    trained: Published, workspace: Workspace, tiny_model: Path, train_here: Callable[..., Any]
) -> None:
    log = log_of(trained.artifact)
    assert every_row_once_an_epoch(log)
    expected = train_here(tiny_model, workspace, "sums", make_config().training)
    for column, values in log.items():
        assert [row[column] for row in expected] == values, column


def test_a_mistake_in_a_worker_is_told_once_and_not_retried(
    ray_cluster: None, tmp_path: Path, base: BaseModel, publish_sums: PublishSums
) -> None:
    workspace = Workspace(tmp_path)
    dataset = publish_sums(workspace, base)
    # It would come in the second step; the dry run meets it in its own.
    config = make_config(
        training={"method": "full", "learning_rate": 1e30}, resources={"preflight": True}
    )
    with pytest.raises(ModelError, match="not finite") as caught:
        train(config, workspace, base, dataset)
    where = caught.value.problems[0].where
    assert where.startswith("dry run, taking a second step; step 1 of 5, rows row")
    (scratch,) = tmp_path.glob(".work/*/scratch")
    assert [file.name for file in scratch.iterdir()] == ["rows"]
    with pytest.raises(ResourceError, match="too few CPUs"):
        train(make_config(resources={"num_workers": 8}), workspace, base, dataset)
    assert [artifact.kind for artifact in workspace.published()] == ["datasets"]
