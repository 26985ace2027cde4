"""Training through Ray Train and on two workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Published, Workspace
from tuneloop.config import TrainingConfig, TuneloopConfig
from tuneloop.errors import ModelError, ResourceError
from tuneloop.models.chat import Renderer
from tuneloop.models.source import BaseModel
from tuneloop.records import Message
from tuneloop.training.batches import read_rows
from tuneloop.training.launch import train


def make_config(**sections: Any) -> TuneloopConfig:
    raw: dict[str, Any] = {
        "name": "sums",
        "task": {"type": "extraction"},
        "model": {"base": "tiny"},
        "data": {"sources": [{"path": "x.jsonl", "format": "messages"}]},
        "training": {"num_epochs": 40, "learning_rate": 5e-3},
        "resources": {"checkpoint_every_steps": 10},
    }
    return TuneloopConfig.model_validate(raw | sections)


def publish_dataset(workspace: Workspace, base: BaseModel) -> Artifact:
    renderer = Renderer.load(base.path)
    rows = []
    for number in range(37):
        question = Message("user", f"What comes after {number}? " * (1 + number % 3))
        sample = renderer.sample([question, Message("assistant", f"It is {number + 1}.")])
        rows.append(
            {
                "row_id": f"row{number}",
                "input_ids": sample.input_ids,
                "loss_mask": sample.loss_mask,
            }
        )
    with workspace.draft("datasets", "sums", "d" * 64) as draft:
        (draft.path / "train").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), draft.path / "train" / "0.parquet")
        return draft.publish(
            config={"renderer": renderer.hash}, resources={}, inputs=[], metrics={}
        )


def log_of(model: Artifact) -> dict[str, list[Any]]:
    table = pq.read_table(model.path / "trainer_log.parquet")
    return table.select(["step", "epoch", "loss", "learning_rate", "grad_norm"]).to_pydict()


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return BaseModel("tiny", tiny_model, "b" * 64, "Apache-2.0")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def trained(ray_cluster: None, workspace: Workspace, base: BaseModel) -> Published:
    return train(make_config(), workspace, base, publish_dataset(workspace, base))


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
        "parity.json",
        "tuneloop_render.json",
        "README.md",
    }
    log = log_of(model)
    assert log["step"] == list(range(1, 201))
    assert log["loss"][-1] < log["loss"][0] - 0.5
    assert model.manifest["metrics"]["num_steps"] == 200
    assert json.loads((model.path / "parity.json").read_text())["passed"]
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


def test_a_killed_worker_is_replaced_and_nothing_differs(
    trained: Published, tmp_path: Path, base: BaseModel
) -> None:
    workspace = Workspace(tmp_path)
    dataset = publish_dataset(workspace, base)
    killed: list[int] = []

    def kill_when_half_done() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            for file in tmp_path.glob(".work/*/scratch/progress.jsonl"):
                if file.read_text().count("\n") >= 60:
                    for process in psutil.Process().children(recursive=True):
                        if "RayTrainWorker" in " ".join(process.cmdline()):
                            process.send_signal(signal.SIGKILL)
                            killed.append(process.pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill_when_half_done)
    thread.start()
    published = train(make_config(), workspace, base, dataset)
    thread.join()
    assert killed
    assert log_of(published.artifact) == log_of(trained.artifact)


def test_a_mistake_in_a_worker_is_told_once_and_not_retried(
    ray_cluster: None, tmp_path: Path, base: BaseModel
) -> None:
    workspace = Workspace(tmp_path)
    dataset = publish_dataset(workspace, base)
    config = make_config(training={"method": "full", "learning_rate": 1e30})
    with pytest.raises(ModelError, match="not finite") as caught:
        train(config, workspace, base, dataset)
    assert "rows row" in caught.value.problems[0].where
    with pytest.raises(ResourceError, match="too few CPUs"):
        train(make_config(resources={"num_workers": 8}), workspace, base, dataset)
    assert [artifact.kind for artifact in workspace.published()] == ["datasets"]


STAGES = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]


def train_without_ray(rank: int, world_size: int, base: Path, data: Path, port: int) -> None:
    """Be one of `world_size` workers, and train with every ZeRO stage in turn."""
    import torch
    import torch.distributed as dist

    from tuneloop.training.engine import Execution
    from tuneloop.training.loop import TrainingJob, Worker, train_rows

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    for method in ("lora", "full"):
        config = TrainingConfig(method=method, learning_rate=1e-2, num_epochs=2, max_steps=7)
        for stage in [stage for workers, stage in STAGES if workers == world_size]:
            folder = data / f"{method}-{world_size}-{stage}"
            folders = [folder / name for name in ("model", "checkpoints", "progress")]
            for path in folders:
                path.mkdir(parents=True, exist_ok=True)
            job = TrainingJob(base, "tiny", "auto", config, *folders, checkpoint_every_steps=100)
            execution = Execution(world_size, 2, 4 // world_size, stage)
            worker = Worker(rank, execution, torch.device("cpu"), 1, lambda metrics, path: None)
            result = train_rows(job, read_rows(data), worker)
            if rank == 0:
                (folder / "log.json").write_text(json.dumps(result.log))
    dist.destroy_process_group()


def test_two_workers_and_every_zero_stage_train_like_one_worker(
    base: BaseModel, tmp_path: Path
) -> None:
    source = publish_dataset(Workspace(tmp_path / "workspace"), base).path
    for world_size in (1, 2):
        port = free_port()
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(world_size), base.path, source, str(port)]
            )
            for rank in range(world_size)
        ]
        assert [worker.wait(timeout=400) for worker in workers] == [0] * world_size
    for method in ("lora", "full"):
        logs = {
            (workers, stage): json.loads(
                (source / f"{method}-{workers}-{stage}" / "log.json").read_text()
            )
            for workers, stage in STAGES
        }
        one = logs[1, 0]
        assert len(one) == 7
        assert one[-1]["loss"] < one[0]["loss"]
        # 37 rows: the fifth batch has five, so the two workers have unequal shares.
        assert one[4]["num_tokens"] < min(row["num_tokens"] for row in one[:4])
        for arrangement, log in logs.items():
            for column in ("loss", "grad_norm"):
                assert [row[column] for row in log] == pytest.approx(
                    [row[column] for row in one], rel=1e-4
                ), (method, arrangement, column)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    train_without_ray(
        int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
    )
