"""What surrounds the workers: checkpoints of earlier attempts, and progress while they run."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from pathlib import Path

import pytest

from tuneloop.config import TrainingConfig
from tuneloop.training.checkpoint import newest_complete
from tuneloop.training.loop import TrainingJob, train_rows
from tuneloop.training.progress import PADDED_NOTICE, TrainingProgress, run_in_thread
from tuneloop.training.workers import (
    StoredRows,
    WorkerFailure,
    WorkerSetup,
    _keep_newest_checkpoint,
    run_worker,
)


def write_checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "state-00000.safetensors").write_bytes(b"x" * step)
    digest = hashlib.sha256(b"x" * step if complete else b"y" * step).hexdigest()
    contents = {"step": step, "identity": "", "files": {"state-00000.safetensors": digest}}
    (folder / "contents.json").write_text(json.dumps(contents))
    return folder


def test_an_attempt_starts_from_the_newest_complete_checkpoint_alone(tmp_path: Path) -> None:
    _keep_newest_checkpoint(tmp_path / "none")
    # As older versions wrote them: beside Ray's own list, without a directory for the attempt.
    write_checkpoint(tmp_path / "checkpoint_1", 10)
    (tmp_path / "checkpoint_manager_snapshot.json").write_text('{"cut off')
    write_checkpoint(tmp_path / "attempt-1" / "checkpoint_1", 20)
    newest = write_checkpoint(tmp_path / "attempt-1" / "checkpoint_2", 30)
    write_checkpoint(tmp_path / "attempt-2" / "checkpoint_3", 40, complete=False)
    assert newest_complete(tmp_path) == newest
    for _ in range(2):
        _keep_newest_checkpoint(tmp_path)
        (kept,) = tmp_path.iterdir()
        assert newest_complete(tmp_path) == kept
        assert json.loads((kept / "contents.json").read_text())["step"] == 30
    later = write_checkpoint(tmp_path / "attempt-3" / "checkpoint_4", 50)
    assert newest_complete(tmp_path) == later
    _keep_newest_checkpoint(tmp_path)
    assert json.loads((kept / "contents.json").read_text())["step"] == 50


@pytest.mark.parametrize("contents", ["", "\0" * 90, "[]", '{"step": 60, "files": {}', "{}"])
def test_a_checkpoint_whose_list_cannot_be_read_is_not_whole(contents: str, tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "checkpoint_1", 10)
    write_checkpoint(tmp_path / "checkpoint_2", 60)
    (tmp_path / "checkpoint_2" / "contents.json").write_text(contents)
    assert newest_complete(tmp_path) == whole
    _keep_newest_checkpoint(tmp_path)
    assert newest_complete(tmp_path) == tmp_path / "earlier"


def test_an_error_that_no_retry_helps_is_not_met_again(tmp_path: Path) -> None:
    job = TrainingJob(tmp_path, "tiny", "auto", TrainingConfig(), tmp_path, tmp_path, tmp_path, 10)
    setup = WorkerSetup(train_rows, job, StoredRows(tmp_path, None), {})
    (tmp_path / "failure.txt").write_text("KeyError: 'tuneloop'")
    # Without Ray: the next attempt gives back what the first one met, before it starts anything.
    assert run_worker(setup) == WorkerFailure("KeyError: 'tuneloop'")


def test_what_runs_in_a_thread_is_polled_and_its_error_comes_back() -> None:
    polled = threading.Event()

    def wait() -> str:
        assert polled.wait(60)
        return "done"

    def poll() -> int:
        polled.set()
        return 0

    assert run_in_thread(wait, poll) == "done"

    def fail() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_thread(fail, poll)


def test_the_last_step_is_logged_however_soon_it_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "progress.jsonl"
    row = {"num_steps": 8, "loss": 1.5, "learning_rate": 1e-3, "tokens_per_s": 100.0}
    lines = [json.dumps(row | {"step": step, "elapsed_s": 10.0 * step}) + "\n" for step in range(4)]
    file.write_text(lines[0])
    with caplog.at_level(logging.INFO, "tuneloop"), TrainingProgress(file) as progress:
        # The second is still being written.
        file.write_text("".join(lines[:2]) + lines[2][:9])
        assert progress.poll() == len(lines[0]) + len(lines[1])
        file.write_text("".join(lines))
    assert [record.getMessage() for record in caplog.records] == [
        "step 3/8  loss 1.5000  learning rate 1.00e-03  100 tokens/s  ETA 50 s"
    ]


def test_rows_that_cannot_be_packed_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = TrainingProgress(tmp_path / "progress.jsonl")
    with caplog.at_level(logging.WARNING, "tuneloop"), shown as progress:
        progress.poll()
        (tmp_path / "packing_fault.txt").write_text("1 of 2 layers have no attention")
        progress.poll()
        progress.poll()
    assert [record.getMessage() for record in caplog.records] == [
        PADDED_NOTICE % "1 of 2 layers have no attention"
    ]
