"""The training step's door: what a model artifact depends on, and whether it is there already.

It is light: PyTorch, Ray Train and DeepSpeed are loaded when a model has to be made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint, sha256_file
from tuneloop.config import TuneloopConfig
from tuneloop.models.bases.source import BaseModel

CODE_VERSION = 4


def identity(config: TuneloopConfig, base: BaseModel, dataset: Artifact) -> str:
    """Return the fingerprint of what `train` makes, before it is made."""
    training = config.training
    # Version 5 counts all weights of a base in 4 bits where the rate goes by the model's size.
    by_size = training.method == "qlora" and training.learning_rate is None
    return fingerprint("train", CODE_VERSION + by_size, **result_parts(config, base, dataset))


def result_parts(config: TuneloopConfig, base: BaseModel, dataset: Artifact) -> dict[str, Any]:
    """Return everything that changes the result, as the manifest keeps it."""
    return {
        "dataset": dataset.train_fingerprint,
        "base": base.fingerprint,
        "training": config.training.model_dump(),
        "chat_template": template_identity(config.model.chat_template),
    }


def template_identity(chat_template: str) -> str:
    """Return a template's name, or what is in its file: a job has it at another place."""
    file = Path(chat_template)
    return f"sha256:{sha256_file(file)}" if file.is_file() else chat_template


def train(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, dataset: Artifact
) -> Published:
    """Return `models/<config.name>`, made or reused. Needs a running Ray.

    An interrupted training resumes from its last checkpoint when it is called again.

    Args:
        config: `training`, `model.chat_template`, `resources` and `name` are used.
        base: The model to train; the dataset was rendered with its tokenizer.
        dataset: A published dataset artifact.

    Raises:
        ModelError: The dataset does not belong to the model, the loss is not finite, or the
            exported model differs from the trained one.
        DataError: The train split cannot be learned from.
        ResourceError: Memory, disk or workers are not enough.
    """
    made = identity(config, base, dataset)
    existing = workspace.find("models", config.name, made)
    if existing is not None:
        return Published(existing, reused=True)
    from tuneloop.training.make import make_model

    with workspace.draft("models", config.name, made) as draft:
        artifact = make_model(config, base, dataset, draft)
    return Published(artifact, reused=False)
