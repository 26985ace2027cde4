"""Checkpoints that are complete or ignored, for any number of workers.

A checkpoint directory holds what is trained and the optimizer's state (`state.py`), the log so far
and, written last, the names and SHA-256 of everything in it. One that a kill left half-written, or
that a disk gives back otherwise, does not match its list, and the one before is taken.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from tuneloop.artifacts import sha256_file, sync
from tuneloop.errors import ModelError, ResourceError
from tuneloop.training.results import StepRecord
from tuneloop.training.state import read_state, write_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger("tuneloop.training")

_CONTENTS = "contents.json"
_LOG = "trainer_log.json"


def save_engine(
    engine: DeepSpeedEngine,
    folder: Path,
    log: list[StepRecord] | None = None,
    identity: str = "",
) -> None:
    """Write what a later run needs to go on; without a log, the weights alone.

    All workers call it.

    Args:
        folder: The first worker's directory gets everything; the others' stay empty.
        log: The trainer log so far, one record for each finished step.
        identity: Fingerprint of the model artifact that the training makes.

    Raises:
        ResourceError: In every worker: the disk is full. Earlier checkpoints are untouched.
    """
    failure: list[str | None] = [None]
    try:
        write_state(engine, folder, moments=log is not None)
        if dist.get_rank() == 0:
            if log is not None:
                (folder / _LOG).write_text(json.dumps(log), encoding="utf-8")
            _write_contents(folder, len(log or ()), identity)
    except OSError as error:
        failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise refuse_save(folder, failure[0])


def _write_contents(folder: Path, step: int, identity: str) -> None:
    """Write what is in a checkpoint; it is whole from then on, and on the disk."""
    files = {file.name: sha256_file(file) for file in folder.iterdir()}
    text = json.dumps({"step": step, "identity": identity, "files": files}, indent=1)
    (folder / _CONTENTS).write_text(text, encoding="utf-8")
    sync_checkpoint(folder)


def sync_checkpoint(folder: Path) -> None:
    """Wait until a checkpoint is on the disk."""
    for path in (*folder.iterdir(), folder):
        sync(path)


def sync_copies(checkpoints: Path, step: int) -> None:
    """Wait until the copies that were kept of a step's checkpoint are on the disk."""
    for folder in _below(checkpoints):
        if _step(folder) == step:
            # Ray Train removes older copies meanwhile, and may be ahead.
            with contextlib.suppress(FileNotFoundError):
                sync_checkpoint(folder)


def refuse_damaged(folder: Path) -> None:
    """Raise ModelError if weights that were kept are not what was written."""
    if not _is_whole(folder):
        raise ModelError.of(
            "the weights that were kept are damaged",
            where=str(folder),
            got="files that are missing or have other content than when they were written",
            remedy="check the disk; remove the directory above to train again, or set "
            "training.keep to last",
        )


def refuse_save(folder: Path, reason: str) -> ResourceError:
    """Return the error for a checkpoint that cannot be written."""
    return ResourceError.of(
        "a checkpoint cannot be written",
        where=str(folder),
        got=reason,
        remedy="free space, or set `workspace` to another disk; the same command resumes from "
        "the checkpoint before",
    )


def newest_complete(folder: Path) -> Path | None:
    """Return the complete checkpoint with the most steps anywhere below a directory, or None."""
    found = [(_step(checkpoint), checkpoint) for checkpoint in _below(folder)]
    # The newest first: reading a checkpoint to the end takes its time.
    for step, checkpoint in sorted(found, reverse=True):
        if step >= 0 and _is_whole(checkpoint):
            return checkpoint
        logger.warning("ignoring the damaged checkpoint %s", checkpoint)
    return None


def load_engine(engine: DeepSpeedEngine, folder: Path, identity: str = "") -> list[StepRecord]:
    """Restore an engine. All workers call it with the same checkpoint.

    Args:
        identity: Fingerprint of the model artifact that this training makes.

    Returns:
        The trainer log, one record for each finished step.

    Raises:
        ModelError: The checkpoint is of a training that makes something else, or holds other
            parameters than the engine trains.
    """
    contents = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
    step, stored = int(contents["step"]), contents.get("identity", identity)
    if stored != identity:
        raise ModelError.of(
            "the checkpoint is of a training with another configuration",
            where=str(folder),
            got=f"fingerprint {stored[:16]}",
            allowed=identity[:16],
            remedy="remove the directory to start over",
        )
    read_state(engine, folder, step)
    # The learning rate depends on the step alone.
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = step
    for group, peak, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = peak * factor(step)
    log: list[StepRecord] = json.loads((folder / _LOG).read_text(encoding="utf-8"))
    return log


def _below(folder: Path) -> list[Path]:
    """Return the directories with a list of contents, wherever below; some may go meanwhile."""
    # `Path.glob` fails where a directory goes while it looks, `os.walk` passes over it.
    return [Path(parent) for parent, _, names in os.walk(folder) if _CONTENTS in names]


def _step(folder: Path) -> int:
    """Return the number of steps of a checkpoint; -1 where its list cannot be read."""
    try:
        return int(json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _is_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint has the content that was written."""
    try:
        files = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))["files"]
        return all(sha256_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
