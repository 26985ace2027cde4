"""What is refused before any worker starts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from tuneloop.artifacts import Artifact
from tuneloop.config import ResourcesConfig, TuneloopConfig
from tuneloop.errors import ConfigError, DataError, ModelError, Problem, ResourceError
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.renderer import Renderer
from tuneloop.text import counted, format_duration
from tuneloop.training.fit.estimate import ResourceEstimate, RowTotals, gib
from tuneloop.training.fit.shape import ModelShape
from tuneloop.training.methods import METHODS
from tuneloop.training.rows import Rows
from tuneloop.training.trackers import refuse_missing_trackers


def refuse_other_renderer(config: TuneloopConfig, base: BaseModel, dataset: Artifact) -> None:
    """Raise ModelError if the rows were rendered with another tokenizer or template."""
    renderer = Renderer.load(base.path, config.model.chat_template)
    rendered = dataset.manifest["config"].get("renderer")
    if rendered != renderer.hash:
        raise ModelError.of(
            "the dataset was rendered with another tokenizer or chat template",
            where=dataset.ref,
            got=f"renderer {rendered}",
            allowed=f"renderer {renderer.hash} of {base.name} with "
            f"model.chat_template {config.model.chat_template}",
            remedy="run `tuneloop prepare` with this configuration",
        )


def refuse_unsupported(config: TuneloopConfig) -> None:
    """Raise ResourceError for settings that do not go together, or that lack a library."""
    training, resources = config.training, config.resources
    method = METHODS[training.method]
    problems = method.problems(config)
    odd = method.refused_by_zero_3(training)
    if resources.zero_stage == 3 and odd:
        problems.append(
            Problem(
                "ZeRO stage 3 does not go with " + " or ".join(odd),
                where="resources.zero_stage",
                got="3",
                allowed="0, 1, 2",
                remedy="set resources.zero_stage to 2: adapters are small, so little is lost",
            )
        )
    try:
        refuse_missing_trackers(resources.trackers)
    except ResourceError as error:
        problems += error.problems
    ResourceError.refuse(problems)


def refuse_without_validation(config: TuneloopConfig, rows: Rows, dataset: Artifact) -> None:
    """Raise DataError if a setting needs a validation split that is not there."""
    training = config.training
    asked = [
        name
        for name, used in (
            ("training.eval_every_steps", training.eval_every_steps is not None),
            ("training.early_stopping_patience", training.early_stopping_patience is not None),
            ("training.keep best", training.keep == "best"),
        )
        if used
    ]
    if asked and not len(rows):
        raise DataError.of(
            "the dataset has no validation split",
            where=dataset.ref,
            got=", ".join(asked),
            remedy="prepare a dataset with a validation split, or leave these settings out",
        )


def refuse_untrainable_rows(rows: Rows, dataset: Artifact) -> None:
    """Raise DataError for an empty train split, or for rows without a token to learn."""
    if not len(rows):
        raise DataError.of("the train split is empty", where=dataset.ref)
    idle = np.flatnonzero(rows.num_target_tokens == 0)
    if len(idle):
        raise DataError.of(
            "rows without a token to learn",
            where=f"{dataset.ref}, rows {_some(rows, idle)}",
            got=f"{counted(len(idle), 'row')} with an empty loss mask",
            remedy="run `tuneloop prepare` again; `tuneloop check` shows the mask",
        )


def refuse_unreadable_rows(rows: Rows, shape: ModelShape, where: str) -> None:
    """Raise ModelError for rows with too many tokens or with ids the model does not know.

    Args:
        where: The dataset and the split, as problems name them.
    """
    if not len(rows):
        return
    problems = []
    longest = int(rows.lengths.max())
    if shape.max_positions is not None and longest > shape.max_positions:
        long = np.flatnonzero(rows.lengths > shape.max_positions)
        problems.append(
            _too_long(f"{where}, rows {_some(rows, long)}", longest, shape.max_positions)
        )
    largest = int(rows.input_ids.max())
    if largest >= shape.vocab_size or int(rows.input_ids.min()) < 0:
        problems.append(
            Problem(
                "the tokenizer has ids that the model has no embedding for",
                where=where,
                got=f"token id {largest}",
                allowed=f"0 to {shape.vocab_size - 1}",
                remedy="use the tokenizer that belongs to the model, or a model whose embedding "
                "was enlarged",
            )
        )
    ModelError.refuse(problems)


def refuse_long_totals(totals: RowTotals, shape: ModelShape) -> None:
    """Raise ModelError if the longest row has more tokens than the model has positions."""
    if shape.max_positions is not None and totals.longest > shape.max_positions:
        raise ModelError(_too_long("data.sources", totals.longest, shape.max_positions))


def _too_long(where: str, longest: int, limit: int) -> Problem:
    return Problem(
        "rows are longer than the model's positions",
        where=where,
        got=f"{longest} tokens",
        allowed=f"at most {limit}",
        remedy=f"set data.max_seq_len to {limit} or less",
    )


def refuse_small_memory(expected: ResourceEstimate | None) -> None:
    """Raise ResourceError if this machine's memory is clearly too small."""
    available = psutil.virtual_memory().available
    if expected is None or expected.machine_memory_bytes <= available:
        return
    state = expected.optimizer_bytes + expected.gradients_bytes
    raise ResourceError.of(
        "the training does not fit into memory",
        where="this machine",
        got=f"about {gib(expected.machine_memory_bytes)} needed; in a worker: weights "
        f"{gib(expected.weights_bytes)}, optimizer and gradients {gib(state)}, activations "
        f"{gib(expected.activations_bytes + expected.logits_bytes)}",
        allowed=f"{gib(available)} available",
        remedy="lower resources.micro_batch_size, resources.num_workers or "
        "data.max_seq_len, use training.method lora, or a smaller model",
    )


def refuse_small_disk(expected: ResourceEstimate | None, scratch: Path) -> None:
    """Raise ResourceError if checkpoints and the model do not fit on the disk."""
    free = shutil.disk_usage(scratch).free
    if expected is not None and expected.disk_bytes > free:
        raise ResourceError.of(
            "the disk is too full for checkpoints and the model",
            where=str(scratch),
            got=f"about {gib(expected.disk_bytes)} needed",
            allowed=f"{gib(free)} free",
            remedy="free space, or set `workspace` to another disk",
        )


def refuse_small_budget(seconds: Sequence[float | None], most_s: float) -> None:
    """Raise ConfigError if no training of a sweep fits into its budget.

    Args:
        seconds: That each training is expected to take; None where that is not known.
        most_s: Seconds of all trainings together.
    """
    known = [one for one in seconds if one is not None]
    if known and len(known) == len(seconds) and min(known) > most_s:
        raise ConfigError.of(
            "no training fits into the budget",
            where="sweep.budget",
            got=f"{format_duration(most_s)} of training",
            allowed=f"at least {format_duration(min(known))}, for the shortest one",
            remedy="raise the budget, or train on fewer rows or a smaller model",
        )


def refuse_small_cluster(resources: ResourcesConfig, cpus_per_trial: float = 0.0) -> None:
    """Raise ResourceError if the running Ray cannot hold the workers.

    Args:
        cpus_per_trial: What each concurrent trial of a sweep takes from the workers' CPUs.
    """
    # Loaded here: `tuneloop check` judges without it.
    import ray

    # An elastic training waits for no more than its least number of workers.
    num_workers = resources.worker_counts[0]
    trials = resources.num_concurrent_trials if cpus_per_trial else 0
    needed = {"CPU": num_workers + trials * cpus_per_trial}
    if resources.gpus_per_worker:
        needed["GPU"] = num_workers * resources.gpus_per_worker
    present = ray.cluster_resources()
    each = f", and {cpus_per_trial:g} for each of {trials} concurrent trials" if trials else ""
    ResourceError.refuse(
        Problem(
            f"the cluster has too few {unit}s for the training workers",
            where="resources.num_workers",
            got=f"{present.get(unit, 0):g} {unit}s",
            allowed=f"at least {count:g}: {num_workers} workers{each if unit == 'CPU' else ''}",
            remedy=f"lower resources.num_workers{', raise resources.num_cpus' * (unit == 'CPU')}, "
            "or add nodes",
        )
        for unit, count in needed.items()
        if count > present.get(unit, 0)
    )


def _some(rows: Rows, indices: np.ndarray) -> str:
    """Return the ids of the first three rows."""
    shown = [rows.row_ids[index] for index in indices[:3].tolist()]
    return ", ".join(shown) + (", …" if len(indices) > 3 else "")
