"""Rows of made-up words, how they are prepared, and what became of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pyarrow import parquet

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig

WORDS = [a + b + c for a in ("ka", "lo", "mi", "ru") for b in ("ta", "ne", "so") for c in "xyzw"]


def sentence(seed: str, length: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def config_for(path: Path | str, **data: Any) -> TuneloopConfig:
    task = data.pop("task", {"type": "generation", "instruction": "Answer."})
    layout = data.pop("format", "question_answer")
    return TuneloopConfig.model_validate(
        {
            "name": "faq",
            "task": task,
            "model": {"base": "tiny"},
            "data": {"sources": [{"path": str(path), "format": layout}]} | data,
        }
    )


def rows_of(artifact: Artifact, side: str) -> list[dict[str, Any]]:
    return parquet.read_table(artifact.path / side).to_pylist()
