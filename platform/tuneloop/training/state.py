"""What is trained, in whole tensors by name, whatever number of workers holds it.

DeepSpeed's own checkpoints contain one piece per worker, so they can be read by the same number of
workers with the same ZeRO stage only. Here every trained parameter and AdamW's two moments of
it are put together one after another, in float32, and taken apart again on reading. One
parameter at a time: a worker never holds more than the largest one, and the worker that writes
one file's worth beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from tuneloop.compat.deepspeed import MOMENTS, WEIGHT, full_shape, optimizer_state
from tuneloop.errors import ModelError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_PATTERN = "state-*.safetensors"
_FILE_BYTES = 1 << 30


def write_state(engine: DeepSpeedEngine, folder: Path, *, moments: bool = True) -> None:
    """Write what is trained; all workers call it, the first one writes.

    Args:
        folder: Gets files of about a gigabyte, `weight/NAME`, `exp_avg/NAME` and
            `exp_avg_sq/NAME` in float32. Only the first worker's counts.
        moments: Also the optimizer's state, which going on needs and a finished model does not.

    Raises:
        OSError: In the first worker: the file cannot be written. The collective part is over
            then, so the workers are still in step.
    """
    pending: dict[str, torch.Tensor] = {}
    size = count = 0
    failure: OSError | None = None
    kinds = (WEIGHT, *MOMENTS) if moments else (WEIGHT,)
    parameters = _trained(engine)
    state = optimizer_state(engine)
    for position, (name, parameter) in enumerate(parameters.items()):
        for kind in kinds:
            whole = state.get(parameter, kind)
            if dist.get_rank() == 0:
                # A copy: float32 weights are the live ones, and tied tensors share memory.
                pending[f"{kind}/{name}"] = whole.detach().to("cpu", copy=True).contiguous()
                size += whole.numel() * 4
        if pending and (size >= _FILE_BYTES or position == len(parameters) - 1):
            try:
                if failure is None:
                    save_file(pending, folder / _PATTERN.replace("*", f"{count:05d}"))
            except Exception as error:  # safetensors raises its own kind on a full disk
                failure = error if isinstance(error, OSError) else OSError(str(error))
            pending, size, count = {}, 0, count + 1
    if failure is not None:
        raise failure


def read_state(engine: DeepSpeedEngine, folder: Path, num_steps: int) -> None:
    """Put written weights, and moments where they were written, into an engine.

    All workers call it and read the same files; each keeps its share.

    Args:
        num_steps: Optimizer steps taken when the state was written.

    Raises:
        ModelError: The files hold other parameters than the engine trains.
    """
    # Every file stays mapped and only what is asked for is read.
    files: dict[str, safe_open] = {}
    for file in sorted(folder.glob(_PATTERN)):
        opened = safe_open(str(file), framework="pt")
        files |= dict.fromkeys(opened.keys(), opened)
    parameters = _trained(engine)
    _refuse_other_parameters(parameters, files, folder)
    kinds = [kind for kind in (WEIGHT, *MOMENTS) if any(k.startswith(f"{kind}/") for k in files)]
    state = optimizer_state(engine)
    if len(kinds) > 1:
        state.start_moments(num_steps)
    for name, parameter in parameters.items():
        for kind in kinds:
            key = f"{kind}/{name}"
            state.set(parameter, kind, files[key].get_tensor(key))
    state.finish()


def _trained(engine: DeepSpeedEngine) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name; tied ones once."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _refuse_other_parameters(
    parameters: Mapping[str, torch.nn.Parameter], files: Mapping[str, safe_open], folder: Path
) -> None:
    trained = {f"{WEIGHT}/{name}": full_shape(parameter) for name, parameter in parameters.items()}
    stored = {
        key: list(file.get_slice(key).get_shape())
        for key, file in files.items()
        if key.startswith(f"{WEIGHT}/")
    }
    if trained == stored:
        return
    odd = sorted(key for key in {*trained, *stored} if trained.get(key) != stored.get(key))
    raise ModelError.of(
        "the checkpoint is of another model or of other adapters",
        where=str(folder),
        got=f"{len(odd)} parameters differ, the first {odd[0].partition('/')[2]}: "
        f"{stored.get(odd[0], 'not there')}",
        allowed=f"{trained.get(odd[0], 'not there')}",
        remedy="remove the directory to start over",
    )
