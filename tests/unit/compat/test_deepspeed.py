"""Where DeepSpeed moves what is not public, these fail first and say which part it was."""

from __future__ import annotations

import pytest
import torch

from tuneloop.compat.deepspeed import (
    MOMENTS,
    WEIGHT,
    full_shape,
    import_deepspeed,
    optimizer_state,
    without_compiler,
)
from tuneloop.config import TrainingConfig
from tuneloop.training.deepspeed_engine import (
    Execution,
    deepspeed_config,
    make_engine,
    ready_to_generate,
)

pytestmark = pytest.mark.usefixtures("process_group")

CONFIG = TrainingConfig(global_batch_size=2, learning_rate=0.1, lr_scheduler="constant")


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))


def take_step(engine: torch.nn.Module, dtype: torch.dtype) -> None:
    engine.backward(engine(torch.ones(2, 4, dtype=dtype)).float().square().sum())
    engine.step()


STAGES = [(stage, half) for stage in (0, 1, 2, 3) for half in (False, True)]


@pytest.mark.parametrize(("stage", "half"), STAGES)
def test_weights_and_moments_are_read_and_written_whole(stage: int, half: bool) -> None:
    execution = Execution(1, 2, 1, stage, use_gpu=half)
    straight = make_engine(make_model().to(execution.dtype), CONFIG, execution, 4)
    other = make_engine(make_model().to(execution.dtype), CONFIG, execution, 4)
    take_step(straight, execution.dtype)
    read, written = optimizer_state(straight), optimizer_state(other)
    written.start_moments(1)
    pairs = list(zip(straight.module.parameters(), other.module.parameters(), strict=True))
    for parameter, copy in pairs:
        assert full_shape(parameter) == full_shape(copy)
        for kind in (WEIGHT, *MOMENTS):
            value = read.get(parameter, kind)
            assert value.dtype == torch.float32
            assert list(value.shape) == full_shape(parameter)
            assert value.abs().sum() > 0
            written.set(copy, kind, value.clone())
    written.finish()
    # The next step is the same only if weights, moments and the count of steps all are.
    for engine in (straight, other):
        take_step(engine, execution.dtype)
    again = optimizer_state(straight), optimizer_state(other)
    for parameter, copy in pairs:
        for kind in (WEIGHT, *MOMENTS):
            assert torch.equal(again[0].get(parameter, kind), again[1].get(copy, kind)), kind


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_first_step_in_half_precision_counts_as_the_first(stage: int) -> None:
    execution = Execution(1, 2, 1, stage, use_gpu=True)
    engine = make_engine(make_model().bfloat16(), CONFIG, execution, 4)
    take_step(engine, torch.bfloat16)
    base = engine.optimizer.optimizer
    assert {int(state["step"]) for state in base.state.values()} == {1}


def test_without_zero_deepspeed_takes_a_step_at_the_start() -> None:
    """Where this fails, `forget_step_at_start` is no longer needed."""
    execution = Execution(1, 2, 1, 0, use_gpu=True)
    model = make_model().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    settings = deepspeed_config(CONFIG, execution, 44)
    with without_compiler():
        engine, *_ = import_deepspeed(use_gpu=True).initialize(
            model=model, optimizer=optimizer, config=settings
        )
    assert {int(state["step"]) for state in engine.optimizer.optimizer.state.values()} == {1}


def test_a_model_generates_without_hooks_and_trains_on_with_them() -> None:
    execution = Execution(1, 2, 1, 3)
    engine = make_engine(make_model(), CONFIG, execution, 4)
    take_step(engine, torch.float32)
    layer = engine.module[0]
    num_hooks = len(layer._forward_hooks)
    assert num_hooks
    with ready_to_generate(engine, execution):
        assert not layer._forward_hooks
        assert layer.weight.numel() == 24
        engine.module(torch.ones(1, 4))
    assert len(layer._forward_hooks) == num_hooks
    assert layer.weight.ds_shape == torch.Size([6, 4])
    take_step(engine, torch.float32)


def test_deepspeed_starts_without_a_compiler() -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None
    assert get_accelerator().device_name() == "cpu"
