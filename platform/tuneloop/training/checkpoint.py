"""Checkpoints that are whole or not there.

A checkpoint directory holds DeepSpeed's files, the log so far and, written last by rank 0, the
names and sizes of everything in it. One that a kill left half-written does not match its list
and is passed over for the one before.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tuneloop.errors import Problem, ResourceError
from tuneloop.training.engine import Execution

logger = logging.getLogger("tuneloop.training")

_CONTENTS = "contents.json"
_TAG = "engine"


def save_engine(
    engine: Any, folder: Path, step: int, log: list[dict[str, Any]], execution: Execution
) -> None:
    """Write what a later run needs to go on after `step` finished steps. All workers call it.

    Args:
        folder: This worker's own directory, which may be merged with the other workers'.
        log: The rows of the trainer log so far.
    """
    import torch.distributed as dist

    # For LoRA the base model is not written again and again: it has not changed.
    engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)
    rank = dist.get_rank()
    if rank == 0:
        (folder / "trainer_log.json").write_text(json.dumps(log), encoding="utf-8")
    mine = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        contents = {
            "step": step,
            "world_size": execution.world_size,
            "zero_stage": execution.zero_stage,
            "files": {name: size for part in everyone for name, size in part.items()},
        }
        (folder / _CONTENTS).write_text(json.dumps(contents, indent=1), encoding="utf-8")


def newest_whole(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps among the whole ones in a directory, or None."""
    found = []
    for contents in folder.glob(f"*/{_CONTENTS}"):
        step = _steps_if_whole(contents.parent)
        if step is None:
            logger.warning("passing over the damaged checkpoint %s", contents.parent)
        else:
            found.append((step, contents.parent))
    return max(found, default=(0, None))[1]


def load_engine(engine: Any, folder: Path, execution: Execution) -> tuple[int, list[dict]]:
    """Restore an engine. All workers call it with the same checkpoint.

    Returns:
        Finished steps, and the rows of the trainer log up to there.

    Raises:
        ResourceError: ZeRO sharded the state over another number of workers or another way.
    """
    contents = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
    then = (contents["world_size"], contents["zero_stage"])
    now = (execution.world_size, execution.zero_stage)
    # Stage 0 keeps everything in one piece, for any number of workers.
    if then != now and (then[1], now[1]) != (0, 0):
        raise ResourceError(
            Problem(
                "the checkpoint was written by another arrangement of workers",
                where=str(folder),
                got=f"num_workers {then[0]}, zero_stage {then[1]}",
                allowed=f"num_workers {now[0]}, zero_stage {now[1]}, as configured now",
                remedy="go on with the former resources, or remove the directory to start over",
            )
        )
    engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
    log = json.loads((folder / "trainer_log.json").read_text(encoding="utf-8"))
    return int(contents["step"]), log


def _steps_if_whole(folder: Path) -> int | None:
    try:
        contents = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in contents["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return int(contents["step"]) if sizes == contents["files"] else None
