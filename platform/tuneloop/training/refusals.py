"""What is refused before any worker starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig
from tuneloop.errors import DataError, ModelError, Problem, ResourceError
from tuneloop.models.chat import Renderer
from tuneloop.models.source import BaseModel
from tuneloop.training.batches import Rows
from tuneloop.training.estimate import Estimate, ModelShape, refuse_impossible


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


def refuse_unusable_rows(rows: Rows, shape: ModelShape, dataset: Artifact) -> None:
    """Raise for rows that the model cannot be trained on, with every reason at once."""
    if not len(rows):
        raise DataError(Problem("the train split is empty", where=dataset.ref))
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
    problems = []
    longest = int(rows.lengths.max())
    if shape.max_positions is not None and longest > shape.max_positions:
        long = np.flatnonzero(rows.lengths > shape.max_positions)
        problems.append(
            Problem(
                "rows are longer than the model's positions",
                where=f"{dataset.ref}, rows {_some(rows, long)}",
                got=f"{longest} tokens",
                allowed=f"at most {shape.max_positions}",
                remedy=f"set data.max_seq_len to {shape.max_positions} or less",
            )
        )
    largest = int(rows.input_ids.max())
    if largest >= shape.vocab_size or int(rows.input_ids.min()) < 0:
        problems.append(
            Problem(
                "the tokenizer has ids that the model has no embedding for",
                where=dataset.ref,
                got=f"token id {largest}",
                allowed=f"0 to {shape.vocab_size - 1}",
                remedy="use the tokenizer that belongs to the model, or a model whose embedding "
                "was enlarged",
            )
        )
    if problems:
        raise ModelError(*problems)


def refuse_too_small(config: TuneloopConfig, expected: Estimate, scratch: Path) -> None:
    """Raise ResourceError if the memory, the disk or the cluster is too small."""
    import ray

    problems = []
    resources = config.resources
    unit = "GPU" if resources.gpus_per_worker else "CPU"
    wanted = resources.num_workers * (resources.gpus_per_worker or 1)
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
