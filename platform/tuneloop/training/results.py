"""What the workers give back.

Ray's controller passes it on, and imports for that the module it is defined in. This one is light;
`loop.py` would cost it six CPU seconds of imports between the last step and the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tuneloop.records import Parity


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind, beside the files.

    Args:
        log: One row per optimizer step.
        parity: Live model against reloaded exports.
        num_parameters: Of the whole model.
        num_trainable: Of those, how many were trained.
    """

    log: list[dict[str, Any]]
    parity: Parity
    num_parameters: int
    num_trainable: int


@dataclass(frozen=True)
class Measured:
    """What a preflight measured.

    Args:
        tokens_per_s: Of all workers together, in a step that was not the first.
        peak_memory_bytes: Of the worker that held the most.
        checkpoint_s: To save a checkpoint.
        export_s: To export and check the model.
        num_workers: How many took part.
        wall_s: Of the whole preflight in the workers, without starting them.
    """

    tokens_per_s: float
    peak_memory_bytes: int
    checkpoint_s: float
    export_s: float
    num_workers: int
    wall_s: float
