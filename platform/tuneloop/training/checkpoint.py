"""Checkpoints that are complete or ignored, for any number of workers.

A checkpoint directory holds what is trained and the optimizer's state (`state.py`), the log so far
and, written last, the names and sizes of everything in it. One that a kill left half-written does
not match its list, and the one before is taken.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from tuneloop.errors import ModelError, Problem, ResourceError
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
        if log is not None and dist.get_rank() == 0:
            (folder / _LOG).write_text(json.dumps(log), encoding="utf-8")
            files = {file.name: file.stat().st_size for file in folder.iterdir()}
            contents = {"step": len(log), "identity": identity, "files": files}
            text = json.dumps(contents, indent=1)
            (folder / _CONTENTS).write_text(text, encoding="utf-8")
    except OSError as error:
        failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise refuse_save(folder, failure[0])


def refuse_save(folder: Path, reason: str) -> ResourceError:
    """Return the error for a checkpoint that cannot be written."""
    return ResourceError(
        Problem(
            "a checkpoint cannot be written",
            where=str(folder),
            got=reason,
            remedy="free space, or set `workspace` to another disk; the same command resumes from "
            "the checkpoint before",
        )
    )


def newest_complete(folder: Path) -> Path | None:
    """Return the complete checkpoint with the most steps anywhere below a directory, or None."""
    complete = []
    for contents in folder.glob(f"**/{_CONTENTS}"):
        step = _steps_if_complete(contents.parent)
        if step is None:
            logger.warning("ignoring the damaged checkpoint %s", contents.parent)
        else:
            complete.append((step, contents.parent))
    return max(complete, default=(0, None))[1]


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
        raise ModelError(
            Problem(
                "the checkpoint is of a training with another configuration",
                where=str(folder),
                got=f"fingerprint {stored[:16]}",
                allowed=identity[:16],
                remedy="remove the directory to start over",
            )
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


def _steps_if_complete(folder: Path) -> int | None:
    try:
        contents = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in contents["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return int(contents["step"]) if sizes == contents["files"] else None
