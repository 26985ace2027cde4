"""From a dataset artifact to a model artifact: the step that starts the workers."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.config import TuneloopConfig
from tuneloop.models.source import BaseModel

if TYPE_CHECKING:
    from tuneloop.training.batches import Rows
    from tuneloop.training.estimate import Estimate
    from tuneloop.training.loop import TrainingResult

logger = logging.getLogger("tuneloop.training")

CODE_VERSION = 2


def train(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, dataset: Artifact
) -> Published:
    """Return `models/<config.name>`, made or reused. Needs a running Ray.

    An interrupted training goes on from its last checkpoint when it is called again.

    Args:
        config: `training`, `model.chat_template`, `resources` and `name` are used.
        base: The model to train; the dataset was rendered with its tokenizer.
        dataset: A published dataset artifact.

    Raises:
        ModelError: The dataset does not belong to the model, the loss is not finite, or the
            exported model differs from the trained one.
        DataError: The train split cannot be learned from.
        ResourceError: Memory, disk or workers do not suffice.
    """
    parts: dict[str, Any] = {
        "dataset": dataset.fingerprint,
        "base": base.fingerprint,
        "training": config.training.model_dump(),
        "chat_template": config.model.chat_template,
    }
    identity = fingerprint("train", CODE_VERSION, **parts)
    existing = workspace.find("models", config.name, identity)
    if existing is not None:
        return Published(existing, reused=True)
    # From here on PyTorch is needed; looking an artifact up stays quick without it.
    from tuneloop.training.batches import read_rows
    from tuneloop.training.card import model_card
    from tuneloop.training.estimate import estimate_work, model_shape, workload
    from tuneloop.training.refusals import (
        refuse_other_renderer,
        refuse_too_small,
        refuse_unusable_rows,
    )
    from tuneloop.training.workers import run_workers

    refuse_other_renderer(config, base, dataset)
    rows = read_rows(dataset.path)
    shape = model_shape(base, config.training)
    refuse_unusable_rows(rows, shape, dataset)
    with workspace.draft("models", config.name, identity) as draft:
        expected = estimate_work(config, shape, workload(config, rows))
        refuse_too_small(config, expected, draft.scratch)
        _announce(rows, expected)
        result = run_workers(config, base, rows, draft)
        _write_log(result, draft.path)
        card = model_card(config, base, dataset, result)
        (draft.path / "README.md").write_text(card, encoding="utf-8")
        artifact = draft.publish(
            config={**parts, "base": base.name, "base_fingerprint": base.fingerprint},
            resources=config.resources.model_dump() | {"estimate": asdict(expected)},
            inputs=[dataset.ref, f"{base.name} sha256:{base.fingerprint}"],
            metrics=_metrics(result),
        )
    return Published(artifact, reused=False)


def _announce(rows: Rows, expected: Estimate) -> None:
    from tuneloop.training.workers import duration

    logger.info(
        "training on %s rows, %s tokens; about %.1f GB a worker%s",
        f"{len(rows):,}",
        f"{int(rows.lengths.sum()):,}",
        expected.peak_memory_bytes / 1e9,
        f", {duration(expected.training_s)}" if expected.training_s else "",
    )


def _write_log(result: TrainingResult, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(result.log), path / "trainer_log.parquet")


def _metrics(result: TrainingResult) -> dict[str, Any]:
    last = result.log[-1]
    tail = [row["loss"] for row in result.log[-max(1, len(result.log) // 10) :]]
    tokens = sum(row["num_tokens"] for row in result.log)
    return {
        "num_steps": last["step"],
        "first_loss": round(result.log[0]["loss"], 6),
        "final_loss": round(sum(tail) / len(tail), 6),
        "num_tokens": tokens,
        "train_s": last["elapsed_s"],
        "tokens_per_s": round(tokens / max(1e-9, last["elapsed_s"]), 2),
        "num_parameters": result.num_parameters,
        "num_trainable": result.num_trainable,
        "parity_max_abs_logprob_diff": result.parity.max_abs_logprob_diff,
    }
