"""What is refused before any worker starts."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig
from tuneloop.errors import DataError, ModelError, Problem, ResourceError, UserError
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.renderer import Renderer
from tuneloop.training.fit.estimate import Estimate, ModelShape, refuse_impossible
from tuneloop.training.rows import Rows
from tuneloop.training.trackers import refuse_missing_trackers


def refuse_other_renderer(config: TuneloopConfig, base: BaseModel, dataset: Artifact) -> None:
    """Raise ModelError if the rows were rendered with another tokenizer or template."""
    renderer = Renderer.load(base.path, config.model.chat_template)
    rendered = dataset.manifest["config"].get("renderer")
    if rendered != renderer.hash:
        raise ModelError(
            Problem(
                "the dataset was rendered with another tokenizer or chat template",
                where=dataset.ref,
                got=f"renderer {rendered}",
                allowed=f"renderer {renderer.hash} of {base.name} with "
                f"model.chat_template {config.model.chat_template}",
                remedy="run `tuneloop prepare` with this configuration",
            )
        )


def refuse_unsupported(config: TuneloopConfig) -> None:
    """Raise ResourceError for settings that do not go together, or that lack a library."""
    training, resources = config.training, config.resources
    problems = []
    if training.method == "qlora":
        if not resources.gpus_per_worker:
            problems.append(
                Problem(
                    "training.method qlora needs GPUs",
                    where="training.method",
                    got="resources.gpus_per_worker 0",
                    remedy="set resources.gpus_per_worker to 1, or use training.method lora",
                )
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            problems.append(
                Problem(
                    "training.method qlora needs bitsandbytes",
                    where="training.method",
                    got="it is not installed",
                    remedy="pip install bitsandbytes, or use training.method lora",
                )
            )
    # Both compute with a layer's weight outside the layer, where ZeRO-3 holds a part of it only.
    odd = [
        name
        for name, used in (
            ("training.method qlora", training.method == "qlora"),
            ("training.lora.use_dora", training.method != "full" and training.lora.use_dora),
        )
        if used
    ]
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
    if problems:
        raise ResourceError(*problems)


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
        raise DataError(
            Problem(
                "the dataset has no validation split",
                where=dataset.ref,
                got=", ".join(asked),
                remedy="prepare a dataset with a validation split, or leave these settings out",
            )
        )


def refuse_unusable_rows(rows: Rows, shape: ModelShape, dataset: Artifact) -> None:
    """Raise for train rows that the model cannot be trained on, with every reason at once."""
    if not len(rows):
        raise DataError(Problem("the train split is empty", where=dataset.ref))
    together(
        lambda: _refuse_idle_rows(rows, dataset),
        lambda: refuse_unreadable_rows(rows, shape, dataset.ref),
    )


def _refuse_idle_rows(rows: Rows, dataset: Artifact) -> None:
    idle = np.flatnonzero(rows.num_target_tokens == 0)
    if len(idle):
        raise DataError(
            Problem(
                "rows without a token to learn",
                where=f"{dataset.ref}, rows {_some(rows, idle)}",
                got=f"{len(idle)} rows whose loss mask is empty",
                remedy="run `tuneloop prepare` again; `tuneloop check` shows the mask",
            )
        )


def refuse_unreadable_rows(rows: Rows, shape: ModelShape, where: str) -> None:
    """Raise ModelError for rows with too many tokens or with ids the model does not know.

    Args:
        where: The dataset's reference, and the split.
    """
    if not len(rows):
        return
    problems = []
    longest = int(rows.lengths.max())
    if shape.max_positions is not None and longest > shape.max_positions:
        long = np.flatnonzero(rows.lengths > shape.max_positions)
        problems.append(
            too_long_problem(f"{where}, rows {_some(rows, long)}", longest, shape.max_positions)
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
    if problems:
        raise ModelError(*problems)


def too_long_problem(where: str, longest: int, limit: int) -> Problem:
    """Return what to tell about rows with more tokens than the model has positions."""
    return Problem(
        "rows are longer than the model's positions",
        where=where,
        got=f"{longest} tokens",
        allowed=f"at most {limit}",
        remedy=f"set data.max_seq_len to {limit} or less",
    )


def together(*checks: Callable[[], None]) -> None:
    """Run every check and raise one error, of the first one's kind, with all problems."""
    errors: list[UserError] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])(*(problem for error in errors for problem in error.problems))


def refuse_too_small(config: TuneloopConfig, expected: Estimate, scratch: Path) -> None:
    """Raise ResourceError if the memory, the disk or the cluster is too small."""
    import ray

    problems = []
    resources = config.resources
    unit = "GPU" if resources.gpus_per_worker else "CPU"
    # An elastic training waits for no more than its least number of workers.
    wanted = resources.worker_counts[0] * (resources.gpus_per_worker or 1)
    present = ray.cluster_resources().get(unit, 0)
    if wanted > present:
        problems.append(
            Problem(
                f"the cluster has too few {unit}s for the training workers",
                where="resources.num_workers",
                got=f"{wanted:g} wanted",
                allowed=f"at most {present:g}",
                remedy="lower resources.num_workers, or add nodes",
            )
        )
    free = shutil.disk_usage(scratch).free
    if expected.disk_bytes > free:
        problems.append(
            Problem(
                "the disk is too full for checkpoints and the model",
                where=str(scratch),
                got=f"about {expected.disk_bytes / 1e9:.1f} GB needed",
                allowed=f"{free / 1e9:.1f} GB free",
                remedy="free space, or set `workspace` to another disk",
            )
        )
    try:
        refuse_impossible(expected)
    except ResourceError as error:
        problems += error.problems
    if problems:
        raise ResourceError(*problems)


def _some(rows: Rows, indices: np.ndarray) -> str:
    shown = [rows.row_ids[index] for index in indices[:3].tolist()]
    return ", ".join(shown) + (", …" if len(indices) > 3 else "")
