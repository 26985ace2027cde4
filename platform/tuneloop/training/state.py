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
from typing import Any

import torch
import torch.distributed as dist

from tuneloop.errors import ModelError, Problem

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
_PATTERN = "state-*.safetensors"
_FILE_BYTES = 1 << 30


def write_state(engine: Any, folder: Path, *, moments: bool = True) -> None:
    """Write what is trained; all workers call it, the first one writes.

    Args:
        folder: Gets files of about a gigabyte, `weight/NAME`, `exp_avg/NAME` and
            `exp_avg_sq/NAME` in float32. Only the first worker's counts.
        moments: Also the optimizer's state, which going on needs and a finished model does not.

    Raises:
        OSError: In the first worker: the file cannot be written. The collective part is over
            then, so the workers are still in step.
    """
    from safetensors.torch import save_file

    pending: dict[str, torch.Tensor] = {}
    size = count = 0
    failure: OSError | None = None
    kinds = (WEIGHT, *MOMENTS) if moments else (WEIGHT,)
    names = _trained(engine)
    holder = _holder(engine)
    for position, (name, parameter) in enumerate(names.items()):
        for kind in kinds:
            whole = holder.whole(parameter, kind)
            if dist.get_rank() == 0:
                # A copy: float32 weights are the live ones, and tied tensors share memory.
                pending[f"{kind}/{name}"] = whole.detach().to("cpu", copy=True).contiguous()
                size += whole.numel() * 4
        if pending and (size >= _FILE_BYTES or position == len(names) - 1):
            try:
                if failure is None:
                    save_file(pending, folder / _PATTERN.replace("*", f"{count:05d}"))
            except Exception as error:  # safetensors raises its own kind on a full disk
                failure = error if isinstance(error, OSError) else OSError(str(error))
            pending, size, count = {}, 0, count + 1
    if failure is not None:
        raise failure


def read_state(engine: Any, folder: Path, num_steps: int) -> None:
    """Put written weights, and moments where they were written, into an engine.

    All workers call it and read the same files; each keeps its share.

    Args:
        num_steps: Optimizer steps taken when the state was written.

    Raises:
        ModelError: The files hold other parameters than the engine trains.
    """
    from safetensors import safe_open

    # Every file stays mapped and only what is asked for is read.
    where: dict[str, Any] = {}
    for file in sorted(folder.glob(_PATTERN)):
        opened = safe_open(str(file), framework="pt")
        where |= dict.fromkeys(opened.keys(), opened)
    names = _trained(engine)
    _refuse_other_parameters(names, where, folder)
    kinds = [kind for kind in (WEIGHT, *MOMENTS) if any(k.startswith(f"{kind}/") for k in where)]
    holder = _holder(engine)
    if len(kinds) > 1:
        holder.start_moments(num_steps)
    for name, parameter in names.items():
        for kind in kinds:
            key = f"{kind}/{name}"
            holder.put(parameter, kind, where[key].get_tensor(key))
    holder.finish()


def _trained(engine: Any) -> dict[str, Any]:
    """Return the parameters that are trained, by name; tied ones once."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _refuse_other_parameters(
    names: Mapping[str, Any], where: Mapping[str, Any], folder: Path
) -> None:
    def shape(parameter: Any) -> list[int]:
        return list(getattr(parameter, "ds_shape", parameter.shape))

    here = {f"{WEIGHT}/{name}": shape(parameter) for name, parameter in names.items()}
    there = {
        key: list(file.get_slice(key).get_shape())
        for key, file in where.items()
        if key.startswith(f"{WEIGHT}/")
    }
    if here == there:
        return
    odd = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
    raise ModelError(
        Problem(
            "the checkpoint is of another model or of other adapters",
            where=str(folder),
            got=f"{len(odd)} parameters differ, the first {odd[0].partition('/')[2]}: "
            f"{there.get(odd[0], 'not there')}",
            allowed=f"{here.get(odd[0], 'not there')}",
            remedy="remove the directory to start over",
        )
    )


def _holder(engine: Any) -> _Whole | _Flat | _Partitioned:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _Whole(engine.optimizer)
    return _Partitioned(engine.optimizer) if stage == 3 else _Flat(engine.optimizer)


class _Whole:
    """Stage 0: every worker holds everything."""

    def __init__(self, optimizer: Any) -> None:
        groups = getattr(optimizer, "fp16_groups", None)
        # In bf16 the optimizer works on float32 copies; in float32 on the parameters themselves.
        self.copies = groups is not None
        self.base = optimizer.optimizer if self.copies else optimizer
        self.master: dict[Any, torch.Tensor] = {}
        if groups is not None:
            for low, high in zip(groups, optimizer.fp32_groups, strict=True):
                self.master |= dict(zip(low, high, strict=True))

    def whole(self, parameter: Any, kind: str) -> torch.Tensor:
        master = self.master.get(parameter, parameter)
        if kind == WEIGHT:
            return master
        # A parameter without a gradient so far has no moments yet.
        found = self.base.state.get(master, {}).get(kind)
        return torch.zeros_like(master) if found is None else found

    def start_moments(self, num_steps: int) -> None:
        for group in self.base.param_groups:
            for master in group["params"]:
                _start(self.base, master, num_steps)

    def put(self, parameter: Any, kind: str, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.whole(parameter, kind).copy_(value)
            if kind == WEIGHT and self.copies:
                parameter.copy_(value)

    def finish(self) -> None:
        """Nothing is derived from what was put."""


class _Flat:
    """Stages 1 and 2: a worker holds its part of a flat float32 copy of all parameters."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._link()

    def _link(self) -> None:
        """Let each parameter find its part of the moments.

        DeepSpeed does so once, after the first group of the first step, when other groups have no
        moments yet (0.19.8).
        """
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def whole(self, parameter: Any, kind: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def start_moments(self, num_steps: int) -> None:
        for flat in self.optimizer.single_partition_of_fp32_groups:
            _start(self.optimizer.optimizer, flat, num_steps)
        self._link()

    def put(self, parameter: Any, kind: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def finish(self) -> None:
        self.optimizer.update_lp_params()


class _Partitioned:
    """Stage 3: a worker holds its part of every parameter, padded to equal parts."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def whole(self, parameter: Any, kind: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def start_moments(self, num_steps: int) -> None:
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            _start(self.optimizer.optimizer, flat, num_steps)

    def put(self, parameter: Any, kind: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * dist.get_world_size(), dtype=value.dtype)
        padded[: value.numel()] = value.flatten()
        mine = padded.narrow(0, size * dist.get_rank(), size)
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, kind)

    def finish(self) -> None:
        # Small parameters are kept whole beside their parts and have to be put together anew.
        small = self.optimizer.persistent_parameters
        if small:
            small[0].partition(small)
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if small:
            small[0].all_gather(small)


def _start(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, num_steps: int) -> None:
    """Give AdamW a state to be filled, as its first step would have made it."""
    fused = optimizer.defaults.get("fused")
    optimizer.state[parameter] = {
        "step": torch.tensor(
            float(num_steps), dtype=torch.float32, device=parameter.device if fused else "cpu"
        ),
        **{kind: torch.zeros_like(parameter) for kind in MOMENTS},
    }
