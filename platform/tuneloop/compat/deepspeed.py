"""What DeepSpeed offers no public function for. Tried with DeepSpeed 0.19.8.

`tests/unit/compat/test_deepspeed.py` fails where a newer version moves one of these parts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(use_gpu: bool) -> ModuleType:
    """Import DeepSpeed, bound to the CPU or the GPU, without compiling anything.

    On a CPU its communication backend asks the accelerator for a shared-memory operator and
    compiles it with g++: half a minute, an error on a machine without a compiler (deepspeedai/
    DeepSpeed issue 7108), and a wait without end after a build that was interrupted. Only its
    inference engine uses that operator, so the accelerator set here says that it has none.
    """
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif torch.cuda.is_available():
        # Whatever it was set to for work on the CPU.
        os.environ["DS_ACCELERATOR"] = "cuda"
    # It names functions of torch.distributed that are being renamed; nothing a user can act on.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not use_gpu:
        from deepspeed.accelerator import get_accelerator, set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        class CpuWithoutSharedMemory(CPU_Accelerator):
            def create_op_builder(self, class_name: str) -> OpBuilder | None:
                if class_name == "ShareMemCommBuilder":
                    return None
                return super().create_op_builder(class_name)

        if type(get_accelerator()) is CPU_Accelerator:
            set_accelerator(CpuWithoutSharedMemory())
    return deepspeed


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Make `torch.compile` do nothing for a while.

    With ZeRO DeepSpeed imports the Muon optimizer, whose functions are compiled, and with it
    PyTorch's compiler: three to four CPU seconds in every worker.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def forget_step_at_start(engine: DeepSpeedEngine) -> None:
    """Let the first optimizer step count as the first.

    In bf16 without ZeRO, DeepSpeed takes a step without gradients to make AdamW's state, so the
    bias correction of every later step is that of the next one. The ZeRO stages no longer do so
    (deepspeedai/DeepSpeed pull request 5104).
    """
    if engine.zero_optimization_stage() == 0 and hasattr(engine.optimizer, "fp32_groups"):
        engine.optimizer.optimizer.state.clear()


def full_shape(parameter: torch.nn.Parameter) -> list[int]:
    """Return the shape of a parameter, whose own is empty while ZeRO-3 holds it in parts."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def optimizer_state(engine: DeepSpeedEngine) -> OptimizerState:
    """Return the float32 weights and AdamW moments of an engine, parameter by parameter.

    DeepSpeed's own checkpoints hold one piece per worker, which only the same number of workers
    with the same ZeRO stage can read. Its public functions (`safe_get_full_*`, `safe_set_*`) do
    not know stage 0, have no moments before the first step, and leave the weights that the
    forward pass uses as they were; its universal checkpoints need a conversion between two runs.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _Replicated(engine.optimizer)
    return _Partitioned(engine.optimizer) if stage == 3 else _Flat(engine.optimizer)


class OptimizerState(Protocol):
    """Whole float32 tensors, read and written one after another. All workers call it together.

    The kind of a tensor is `WEIGHT` or one of `MOMENTS`.
    """

    def get(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        """Return the weights or a moment of one parameter, whole on every worker."""

    def start_moments(self, num_steps: int) -> None:
        """Make moments to be written, as after so many steps."""

    def set(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        """Write the weights or a moment of one parameter; each worker keeps its part."""

    def finish(self) -> None:
        """Bring the weights that the forward pass uses up to date; the last call."""


class _Replicated:
    """Stage 0: every worker holds everything."""

    def __init__(self, optimizer: Any) -> None:
        groups = getattr(optimizer, "fp16_groups", None)
        # In bf16 the optimizer works on float32 copies; in float32 on the parameters themselves.
        self.has_copies = groups is not None
        self.optimizer: torch.optim.Optimizer = (
            optimizer.optimizer if self.has_copies else optimizer
        )
        self.copies: dict[torch.nn.Parameter, torch.Tensor] = {}
        if groups is not None:
            for low, high in zip(groups, optimizer.fp32_groups, strict=True):
                self.copies |= dict(zip(low, high, strict=True))

    def get(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        weights = self.copies.get(parameter, parameter)
        if kind == WEIGHT:
            return weights
        # A parameter without a gradient so far has no moments yet.
        moment = self.optimizer.state.get(weights, {}).get(kind)
        return torch.zeros_like(weights) if moment is None else moment

    def start_moments(self, num_steps: int) -> None:
        for group in self.optimizer.param_groups:
            for weights in group["params"]:
                _start(self.optimizer, weights, num_steps)

    def set(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.get(parameter, kind).copy_(value)
            if kind == WEIGHT and self.has_copies:
                parameter.copy_(value)

    def finish(self) -> None:
        """Nothing is derived from what was written."""


class _Sharded:
    """Stages 1 to 3: DeepSpeed puts the parts of all workers together."""

    def __init__(self, optimizer: ZeROOptimizer) -> None:
        # Not at the top: DeepSpeed reads when it is imported which accelerator there is.
        from deepspeed import utils

        self.optimizer, self.utils = optimizer, utils

    def get(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        if kind == WEIGHT:
            return self.utils.safe_get_full_fp32_param(parameter)
        return self.utils.safe_get_full_optimizer_state(parameter, kind)


class _Flat(_Sharded):
    """Stages 1 and 2: a worker holds its part of a flat float32 copy of all parameters."""

    def __init__(self, optimizer: ZeROOptimizer) -> None:
        super().__init__(optimizer)
        self._link()

    def _link(self) -> None:
        """Let each parameter find its part of the moments.

        DeepSpeed does so once, after the first group of the first step, when other groups have no
        moments yet.
        """
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def start_moments(self, num_steps: int) -> None:
        for flat in self.optimizer.single_partition_of_fp32_groups:
            _start(self.optimizer.optimizer, flat, num_steps)
        self._link()

    def set(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        if kind == WEIGHT:
            self.utils.safe_set_full_fp32_param(parameter, value)
        else:
            self.utils.safe_set_full_optimizer_state(parameter, value, kind)

    def finish(self) -> None:
        self.optimizer.update_lp_params()


class _Partitioned(_Sharded):
    """Stage 3: a worker holds its part of every parameter, padded to equal parts."""

    def start_moments(self, num_steps: int) -> None:
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            _start(self.optimizer.optimizer, flat, num_steps)

    def set(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * dist.get_world_size(), dtype=value.dtype)
        padded[: value.numel()] = value.flatten()
        mine = padded.narrow(0, size * dist.get_rank(), size)
        if kind == WEIGHT:
            self.utils.safe_set_local_fp32_param(parameter, mine)
        else:
            self.utils.safe_set_local_optimizer_state(parameter, mine, kind)

    def finish(self) -> None:
        # Small parameters are kept whole beside their parts and have to be put together anew.
        small = self.optimizer.persistent_parameters
        if small:
            small[0].partition(small)
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if small:
            small[0].all_gather(small)


def _start(optimizer: torch.optim.Optimizer, weights: torch.Tensor, num_steps: int) -> None:
    """Give AdamW a state to be filled, as its first step would have made it."""
    fused = optimizer.defaults.get("fused")
    optimizer.state[weights] = {
        "step": torch.tensor(
            float(num_steps), dtype=torch.float32, device=weights.device if fused else "cpu"
        ),
        **{kind: torch.zeros_like(weights) for kind in MOMENTS},
    }
