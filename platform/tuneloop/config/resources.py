"""`resources`: how it is executed; recorded, never fingerprinted."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, field_validator

from tuneloop.config.section import Section


class ResourcesConfig(Section):
    """How work is executed. Never changes a result, never fingerprinted."""

    ray_address: str | None = None
    """Address of an existing Ray cluster. Default: RAY_ADDRESS, else a local Ray is started."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs of the local Ray. Default: all."""
    num_workers: int | tuple[int, int] = 1
    """Training workers, at least 1. `[min, max]` uses as many as there is room for: fewer when a
    node is lost, more when one joins."""
    gpus_per_worker: float = Field(0, ge=0, le=1)
    """1 trains on GPUs in bfloat16, 0 on CPUs in float32; a single worker may use a fraction of a
    GPU."""
    price_per_hour: float | None = Field(None, gt=0)
    """Price of one worker per hour; estimates then include the cost."""
    preflight: bool | None = None
    """Dry run before a long training: take two steps, save a checkpoint, resume from it and export,
    in a temporary place. Default: on a cluster, and where the training is expected to take more
    than ten minutes, or 200 steps where that is not known."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Sequences per forward pass. Default: the largest divisor of a worker's share of the batch
    that is at most 8."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    checkpoint_every_steps: int = Field(20, ge=1)
    """Optimizer steps between checkpoints."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a
    third more time, the same result."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(default_factory=list)
    """Experiment trackers that also receive every row of the training log. Each must be installed;
    its own environment variables say where it writes."""
    max_failures: int = Field(2, ge=0)
    """Worker failures that a training survives."""
    num_concurrent_trials: int = Field(1, ge=1)
    """Trials of a sweep that run at the same time."""

    @field_validator("num_workers", mode="plain")
    @classmethod
    def _count_or_range(cls, value: Any) -> int | tuple[int, int]:
        ends = list(value) if isinstance(value, list | tuple) else [value, value]
        whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        if not whole or len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            raise ValueError(
                "`resources.num_workers` is a whole number of at least 1, or [min, max]"
            )
        return value if isinstance(value, int) else (ends[0], ends[1])

    @property
    def cluster_address(self) -> str | None:
        """Address of the cluster to join; None if work runs on a local Ray."""
        address = self.ray_address or os.environ.get("RAY_ADDRESS")
        return None if address in (None, "", "local") else address

    @property
    def worker_counts(self) -> range:
        """Every number of workers that the training may run on, in ascending order."""
        if isinstance(self.num_workers, int):
            return range(self.num_workers, self.num_workers + 1)
        return range(self.num_workers[0], self.num_workers[1] + 1)
