"""The dataset of words to spell, and the configuration that evaluates it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spelt_words import WORDS, publish_dataset, row
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def dataset(workspace: Workspace) -> Artifact:
    rows = [row(index, word) for index, word in enumerate(WORDS)]
    return publish_dataset(workspace, rows, [row(100 + i, w * 2) for i, w in enumerate(WORDS)])


@pytest.fixture
def config(tmp_path: Path) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": "words",
            "workspace": str(tmp_path / "workspace"),
            "task": {"type": "extraction"},
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "words.jsonl", "format": "messages"}]},
            "evaluation": {"num_resamples": 200, "concurrency": 4},
        }
    )
