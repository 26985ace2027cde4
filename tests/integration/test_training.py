"""Training through Ray Train and on two workers."""

from __future__ import annotations

import json
import os
import shutil
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
from tuneloop.training.launch import train
from tuneloop.training.rows import read_rows


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


def publish_dataset(workspace: Workspace, base: BaseModel) -> Artifact:
    renderer = Renderer.load(base.path)
    rows = []
    for number in range(42):
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
        for split, part in (("train", rows[:37]), ("validation", rows[37:])):
            (draft.path / split).mkdir()
            pq.write_table(pa.Table.from_pylist(part), draft.path / split / "0.parquet")
        return draft.publish(
            config={"renderer": renderer.hash}, resources={}, inputs=[], metrics={}
        )


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
    trained: Published, tmp_path: Path, base: BaseModel
) -> None:
    workspace = Workspace(tmp_path)
    dataset = publish_dataset(workspace, base)
    killed: list[int] = []

    def kill_twice() -> None:
        deadline = time.monotonic() + 200
        for how, num_steps in ((signal.SIGKILL, 30), (signal.SIGTERM, 70)):
            num_killed = len(killed)
            while time.monotonic() < deadline and len(killed) == num_killed:
                for file in tmp_path.glob(".work/*/scratch/progress.jsonl"):
                    lines = file.read_text().splitlines()
                    if lines and json.loads(lines[-1])["step"] >= num_steps:
                        killed.extend(send_to_workers(how))
                time.sleep(0.02)

    thread = threading.Thread(target=kill_twice)
    thread.start()
    published = train(make_config(), workspace, base, dataset)
    thread.join()
    assert len(set(killed)) == 2
    log = log_of(published.artifact)
    assert log == log_of(trained.artifact)
    assert every_row_once_an_epoch(log)


def send_to_workers(how: signal.Signals) -> list[int]:
    """Send a signal to every training worker and return their process ids."""
    found = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    for process in found:
        process.send_signal(how)
    return [process.pid for process in found]


def test_a_mistake_in_a_worker_is_told_once_and_not_retried(
    ray_cluster: None, tmp_path: Path, base: BaseModel
) -> None:
    workspace = Workspace(tmp_path)
    dataset = publish_dataset(workspace, base)
    # It would come in the second step; the preflight meets it in its own.
    config = make_config(
        training={"method": "full", "learning_rate": 1e30}, resources={"preflight": True}
    )
    with pytest.raises(ModelError, match="not finite") as caught:
        train(config, workspace, base, dataset)
    where = caught.value.problems[0].where
    assert where.startswith("preflight, taking a second step; step 1 of 5, rows row")
    (scratch,) = tmp_path.glob(".work/*/scratch")
    assert [file.name for file in scratch.iterdir()] == ["rows"]
    with pytest.raises(ResourceError, match="too few CPUs"):
        train(make_config(resources={"num_workers": 8}), workspace, base, dataset)
    assert [artifact.kind for artifact in workspace.published()] == ["datasets"]


# Every training on plain processes: workers, ZeRO stage, and whose third step it goes on from.
STRAIGHT = [(1, 0, ""), (1, 3, ""), (2, 0, ""), (2, 1, ""), (2, 2, ""), (2, 3, "")]
RESUMED = [
    (2, 0, "1-3"),
    (2, 1, "1-0"),
    (2, 3, "1-0"),
    (1, 0, "2-3"),
    (1, 3, "2-2"),
    (4, 1, "2-2"),
]
# One start of processes each, in this order.
PHASES = [
    [run for run in STRAIGHT if run[0] == 1],
    [run for run in STRAIGHT + RESUMED if run[0] == 2],
    [run for run in RESUMED if run[0] == 1],
    [run for run in RESUMED if run[0] == 4],
]


def train_without_ray(rank: int, phase: int, base: Path, data: Path, port: int) -> None:
    """Be one of the workers of a phase, and do its trainings in turn."""
    import torch
    import torch.distributed as dist

    from tuneloop.training.engine import Execution
    from tuneloop.training.loop import TrainingJob, Worker, train_rows

    size = PHASES[phase][0][0]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for method in ("lora", "full"):
        config = TrainingConfig(
            method=method, learning_rate=1e-2, num_epochs=2, max_steps=7, eval_every_steps=7
        )
        for _, stage, source in PHASES[phase]:
            name = f"{size}-{stage}" + (f"-after-{source}" if source else "")
            folders = [data / method / name / part for part in ("model", "checkpoints", "progress")]
            if rank == 0:
                for path in folders:
                    path.mkdir(parents=True)
                if source:
                    kept = data / method / source / "checkpoints" / "step3"
                    shutil.copytree(kept, folders[1] / "step3")
            dist.barrier()

            def report(metrics: dict[str, Any], kept: Path | None, folders: Any = folders) -> None:
                if kept is not None:
                    shutil.copytree(kept, folders[1] / f"step{metrics['step']}")

            job = TrainingJob(base, "tiny", "auto", config, *folders, checkpoint_every_steps=3)
            execution = Execution(size, 2, 4 // size, stage)
            worker = Worker(rank, execution, torch.device("cpu"), 1, report)
            result = train_rows(job, read_rows(data), worker, read_rows(data, "validation"))
            if rank == 0:
                (folders[0].parent / "log.json").write_text(json.dumps(result.log))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def plain_trainings(
    base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The logs of all trainings on plain processes, by method and name."""
    folder = tmp_path_factory.mktemp("plain")
    source = publish_dataset(Workspace(folder), base).path
    for phase, runs in enumerate(PHASES):
        port = str(free_port())
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(phase), base.path, source, port]
            )
            for rank in range(runs[0][0])
        ]
        assert [worker.wait(timeout=400) for worker in workers] == [0] * len(workers)
    return {
        method: {
            file.parent.name: json.loads(file.read_text())
            for file in (source / method).glob("*/log.json")
        }
        for method in ("lora", "full")
    }


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_workers_and_every_zero_stage_train_like_one_worker(
    method: str, plain_trainings: dict[str, dict[str, list[dict[str, Any]]]]
) -> None:
    logs = plain_trainings[method]
    one = logs["1-0"]
    assert len(one) == 7
    assert one[-1]["loss"] < one[0]["loss"]
    # 37 rows: the fifth batch has five, so the two workers have unequal shares.
    assert one[4]["num_tokens"] < min(row["num_tokens"] for row in one[:4])
    for workers, stage, _ in STRAIGHT:
        log = logs[f"{workers}-{stage}"]
        for column in ("loss", "grad_norm"):
            assert [row[column] for row in log] == pytest.approx(
                [row[column] for row in one], rel=1e-4
            ), (workers, stage, column)
        assert log[6]["validation_loss"] == pytest.approx(one[6]["validation_loss"], rel=1e-4)
        assert [row["rows"] for row in log] == [row["rows"] for row in one]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_goes_on_with_other_workers_and_another_zero_stage(
    method: str, plain_trainings: dict[str, dict[str, list[dict[str, Any]]]]
) -> None:
    logs = plain_trainings[method]
    assert len(logs) == len(STRAIGHT) + len(RESUMED)
    for workers, stage, source in RESUMED:
        log = logs[f"{workers}-{stage}-after-{source}"]
        # The first three steps are the other training's, to the last digit.
        assert log[:3] == logs[source][:3]
        assert len(log) == 7
        for column, rel in (("loss", 1e-5), ("learning_rate", 0), ("grad_norm", 1e-4)):
            assert [row[column] for row in log] == pytest.approx(
                [row[column] for row in logs["1-0"]], rel=rel
            ), (workers, stage, source, column)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    train_without_ray(
        int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
    )
