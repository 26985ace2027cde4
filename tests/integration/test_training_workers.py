"""Training on plain processes: worker counts, ZeRO stages and checkpoints of others give the same.

They start no Ray, so they run beside the tests that do.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TrainingConfig
from tuneloop.models.bases.source import BaseModel
from tuneloop.training.rows import open_rows, store_rows

NUM_STEPS, MIDDLE = 10, 5
# Other workers add up in another order. At this learning rate a difference of 1e-7 in a step has
# grown to 2e-4 in the norms after fifteen, by processor (AVX2 or AVX-512); the losses stay closer.
TOLERANCES = [("loss", 1e-4), ("grad_norm", 1e-3)]
# Every training on plain processes: method, workers, ZeRO stage, and whose checkpoint in the middle
# it goes on from.
STRAIGHT = [
    (method, workers, stage, "")
    for method in ("lora", "full")
    for workers, stage in [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]
]
RESUMED = [
    ("lora", 2, 0, "1-3"),
    ("lora", 2, 1, "1-0"),
    ("full", 2, 3, "1-0"),
    ("lora", 1, 0, "2-3"),
    ("full", 1, 0, "2-3"),
    ("lora", 1, 3, "2-2"),
    ("lora", 4, 1, "2-2"),
]
# Processes are started once for each of these, in this order.
PHASES = [
    [run for run in STRAIGHT if run[1] == 1],
    [run for run in STRAIGHT + RESUMED if run[1] == 2],
    [run for run in RESUMED if run[1] == 1],
    [run for run in RESUMED if run[1] == 4],
]


def train_all(base: Path, data: Path) -> None:
    """Do the trainings of every phase on processes forked from this one, which has the imports."""
    import deepspeed  # noqa: F401

    import tuneloop.training.loop  # noqa: F401

    context = multiprocessing.get_context("fork")
    for phase, runs in enumerate(PHASES):
        port = free_port()
        workers = [
            context.Process(target=train_without_ray, args=(rank, phase, base, data, port))
            for rank in range(runs[0][1])
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        codes = [worker.exitcode for worker in workers]
        assert codes == [0] * len(workers), (phase, codes)


def train_without_ray(rank: int, phase: int, base: Path, data: Path, port: int) -> None:
    """Be one of the workers of a phase, and do its trainings in turn."""
    import torch
    import torch.distributed as dist

    from tuneloop.training.deepspeed_engine import Execution
    from tuneloop.training.loop import TrainingJob, Worker, train_rows

    size = PHASES[phase][0][1]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for method, _, stage, source in PHASES[phase]:
        config = TrainingConfig(
            method=method,
            learning_rate=1e-2,
            num_epochs=2,
            eval_every_steps=MIDDLE,
            # Every layer with an adapter costs ZeRO-3 as much time as a big one.
            lora={"target_modules": ["q_proj", "down_proj"]},
        )
        name = f"{size}-{stage}" + (f"-after-{source}" if source else "")
        folders = [data / method / name / part for part in ("model", "checkpoints", "progress")]
        if rank == 0:
            for path in folders:
                path.mkdir(parents=True)
            if source:
                kept = data / method / source / "checkpoints" / f"step{MIDDLE}"
                shutil.copytree(kept, folders[1] / kept.name)
        dist.barrier()

        def report(metrics: dict[str, Any], kept: Path | None, folders: Any = folders) -> None:
            if kept is not None:
                shutil.copytree(kept, folders[1] / f"step{metrics['step']}")

        job = TrainingJob(base, "tiny", "auto", config, *folders, checkpoint_every_steps=MIDDLE)
        execution = Execution(size, 2, 4 // size, stage)
        worker = Worker(rank, execution, torch.device("cpu"), 1, report)
        train, validation = (
            open_rows(store_rows(data, split, data / f"rows-{rank}"))
            for split in ("train", "validation")
        )
        result = train_rows(job, train, worker, validation)
        if rank == 0:
            (folders[0].parent / "log.json").write_text(json.dumps(result.log))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def plain_trainings(
    tiny_model: Path,
    publish_sums: Callable[[Workspace, BaseModel], Artifact],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The logs of all trainings on plain processes, by method and name."""
    folder = tmp_path_factory.mktemp("plain")
    base = BaseModel("tiny", tiny_model, "b" * 64, "Apache-2.0")
    source = publish_sums(Workspace(folder), base).path
    # A worker that aborts says where.
    command = [sys.executable, "-X", "faulthandler", __file__, tiny_model, source]
    subprocess.run(command, check=True, timeout=500)
    return {
        method: {
            file.parent.name: json.loads(file.read_text())
            for file in (source / method).glob("*/log.json")
        }
        for method in ("lora", "full")
    }


def test_two_workers_and_every_zero_stage_train_like_one_worker(
    plain_trainings: dict[str, dict[str, list[dict[str, Any]]]],
) -> None:
    for method, workers, stage, _ in STRAIGHT:
        one, log = plain_trainings[method]["1-0"], plain_trainings[method][f"{workers}-{stage}"]
        assert len(one) == NUM_STEPS
        assert one[-1]["loss"] < one[0]["loss"]
        # 37 rows: the fifth batch has five, so the two workers have unequal shares.
        assert one[4]["num_tokens"] < min(row["num_tokens"] for row in one[:4])
        for column, rel in TOLERANCES:
            assert [row[column] for row in log] == pytest.approx(
                [row[column] for row in one], rel=rel
            ), (method, workers, stage, column)
        for step in (MIDDLE - 1, NUM_STEPS - 1):
            assert log[step]["validation_loss"] == pytest.approx(
                one[step]["validation_loss"], rel=1e-4
            )
        assert [row["rows"] for row in log] == [row["rows"] for row in one]


def test_a_training_goes_on_with_other_workers_and_another_zero_stage(
    plain_trainings: dict[str, dict[str, list[dict[str, Any]]]],
) -> None:
    assert sum(map(len, plain_trainings.values())) == len(STRAIGHT) + len(RESUMED)
    for method, workers, stage, source in RESUMED:
        logs = plain_trainings[method]
        log = logs[f"{workers}-{stage}-after-{source}"]
        # The steps before the checkpoint are the other training's, to the last digit.
        assert log[:MIDDLE] == logs[source][:MIDDLE]
        assert len(log) == NUM_STEPS
        for column, rel in [*TOLERANCES, ("learning_rate", 0)]:
            assert [row[column] for row in log] == pytest.approx(
                [row[column] for row in logs["1-0"]], rel=rel
            ), (method, workers, stage, source, column)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), Path(sys.argv[2]))
