"""The whole configuration: its sections, and what has to fit between them."""

from __future__ import annotations

import typing
from typing import Self

from pydantic import PrivateAttr, model_validator

from tuneloop.config.data import DataConfig
from tuneloop.config.evaluation import EvaluationConfig
from tuneloop.config.generation import GenerationConfig
from tuneloop.config.resources import ResourcesConfig
from tuneloop.config.section import Name, Section
from tuneloop.config.serving import ServingConfig
from tuneloop.config.sweep import SweepConfig
from tuneloop.config.task import ModelConfig, TaskConfig
from tuneloop.config.training import TrainingConfig


class Origin(typing.NamedTuple):
    """The file that a configuration was read from, and the overrides of the command line."""

    file: str
    overrides: tuple[str, ...] = ()


class TuneloopConfig(Section):
    """The whole YAML."""

    _origin: Origin | None = PrivateAttr(None)

    name: Name
    """Name of the artifacts: `datasets/NAME`, `models/NAME`, …"""
    workspace: str = "workspace"
    """Directory or URI that holds the artifacts. A relative path is relative to the current
    directory."""
    task: TaskConfig
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    serving: ServingConfig = ServingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig | None = None
    generation: GenerationConfig | None = None
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def origin(self) -> Origin:
        """Where it comes from; it changes no result. One made in Python is as if of `NAME.yaml`."""
        return self._origin or Origin(f"{self.name}.yaml")

    def read_from(self, file: str, overrides: typing.Sequence[str]) -> Self:
        """Return this configuration, which knows where it comes from now."""
        self._origin = Origin(file, tuple(overrides))
        return self

    @model_validator(mode="after")
    def _each_source_has_its_task(self) -> TuneloopConfig:
        names = list(self.task.tasks)
        used = [source.task for source in self.data.sources]
        wrong = [
            f"{key}.{number}.task is {source.task or 'missing'}"
            for key, sources in (
                ("data.sources", self.data.sources),
                ("evaluation.sources", self.evaluation.sources),
            )
            for number, source in enumerate(sources)
            if (source.task not in names if names else source.task is not None)
        ]
        wrong += [f"no source has rows for task.tasks.{name}" for name in names if name not in used]
        if any(s.weight for s in self.data.sources) and any(
            task.weight for task in self.task.tasks.values()
        ):
            wrong.append("both sources and tasks have a `weight`; give it to one kind only")
        trained = self.data.train_tasks or []
        wrong += [f"data.train_tasks names {name}" for name in trained if name not in names]
        if len(set(trained)) < len(trained):
            wrong.append("data.train_tasks names a task twice")
        if wrong:
            allowed = f"tasks are {', '.join(names)}" if names else "task.type is not mixture"
            raise ValueError(f"{'; '.join(wrong)} ({allowed})")
        return self

    @model_validator(mode="after")
    def _rows_can_be_generated(self) -> TuneloopConfig:
        generation = self.generation
        if generation is None:
            return self
        if generation.min_rating is not None and self.evaluation.judge is None:
            raise ValueError("generation.min_rating needs evaluation.judge, the model that rates")
        judge = self.evaluation.judge if generation.min_rating is not None else None
        if generation.budget.money is not None and judge and judge.price is None:
            raise ValueError("generation.budget.money needs evaluation.judge.price")
        of_documents = self.task.type == "language_modeling" or bool(self.task.tasks)
        if generation.kind != "pairs" and of_documents:
            raise ValueError(
                f"generation.kind `{generation.kind}` needs a single task with answers, not "
                f"task.type {self.task.type}"
            )
        return self

    @model_validator(mode="after")
    def _the_evaluated_split_is_made(self) -> TuneloopConfig:
        if self.evaluation.split == "validation" and not self.data.split.validates:
            raise ValueError(
                "evaluation.split is validation, and there is no validation split: set "
                "data.split.num_validation_examples or data.split.validation_ratio"
            )
        if self.evaluation.split == "validation" and self.evaluation.sources:
            raise ValueError(
                "evaluation.sources are answered in place of a split: leave evaluation.split out"
            )
        return self

    @model_validator(mode="after")
    def _a_floor_is_of_a_score(self) -> TuneloopConfig:
        if self.evaluation.floors and self.task.type == "language_modeling":
            raise ValueError(
                "evaluation.floors need a score where higher is better: of plain text there is "
                "only bits per byte"
            )
        return self

    @model_validator(mode="after")
    def _a_shared_gpu_has_one_worker(self) -> TuneloopConfig:
        if 0 < self.resources.gpus_per_worker < 1 and self.resources.worker_counts[-1] > 1:
            raise ValueError(
                f"resources.gpus_per_worker {self.resources.gpus_per_worker:g} needs "
                "resources.num_workers 1: NCCL needs a whole GPU for each worker"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> TuneloopConfig:
        for num_workers in self.resources.worker_counts:
            grad_accum_steps(self, num_workers)
        return self


def micro_batch_size(config: TuneloopConfig, num_workers: int) -> int:
    """Return the sequences per forward pass of one worker of `num_workers`."""
    if config.resources.micro_batch_size is not None:
        return config.resources.micro_batch_size
    share = max(1, config.training.global_batch_size // num_workers)
    return max(size for size in range(1, min(8, share) + 1) if share % size == 0)


def grad_accum_steps(config: TuneloopConfig, num_workers: int) -> int:
    """Return the micro-batches per optimizer step of one worker of `num_workers`.

    Raises:
        ValueError: The global batch is not a multiple of workers x micro-batch.
    """
    batch, micro = config.training.global_batch_size, micro_batch_size(config, num_workers)
    steps, remainder = divmod(batch, num_workers * micro)
    if remainder or steps == 0:
        *fewer, most = config.resources.worker_counts
        every = f"; it must be for every number from {fewer[0]} to {most}" if fewer else ""
        raise ValueError(
            f"training.global_batch_size {batch} is not a multiple of resources.num_workers "
            f"{num_workers} x resources.micro_batch_size {micro}{every}"
        )
    return steps
