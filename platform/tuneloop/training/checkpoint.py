"""Checkpoints that are whole or not there.

A checkpoint directory holds DeepSpeed's files, the log so far and, written last by rank 0, the
names and sizes of everything in it. One that a kill left half-written does not match its list
and is passed over for the one before.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
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

    with _without_frozen(engine.module):
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


@contextlib.contextmanager
def _without_frozen(model: Any) -> Iterator[None]:
    """Keep the base model of LoRA out of checkpoints: it has not changed.

    DeepSpeed leaves frozen parameters out by itself, but not the second name of tied ones: the
    output layer, most of a small model.
    """
    frozen = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }

    def drop(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in frozen & state.keys():
            del state[name]

    hook = model.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        hook.remove()


def _steps_if_whole(folder: Path) -> int | None:
    try:
        contents = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in contents["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return int(contents["step"]) if sizes == contents["files"] else None
