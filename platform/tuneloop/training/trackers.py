"""Experiment trackers that some teams use: they get every row of the trainer log.

They run where the command runs, not in the workers, and are never needed: the log is in the
artifact.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuneloop.errors import ResourceError

logger = logging.getLogger("tuneloop.training")


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Raise ResourceError for trackers whose library is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceError.of(
            "an experiment tracker is not installed",
            where="resources.trackers",
            got=", ".join(missing),
            remedy=f"pip install {' '.join(missing)}, or leave it out",
        )


class Trackers:
    """The open trackers of one training.

    Args:
        names: The trackers that `resources.trackers` names.
        run_name: The name that the trackers show.
        settings: The configuration of the training by dotted keys.
        folder: Directory for TensorBoard's files; the others have their own places.
    """

    def __init__(
        self, names: Sequence[str], run_name: str, settings: dict[str, Any], folder: Path
    ) -> None:
        self._log: list[Callable[[dict[str, float], int], None]] = []
        self._close: list[Callable[[], Any]] = []
        if "tensorboard" in names:
            self._open_tensorboard(folder)
        if "mlflow" in names:
            self._open_mlflow(run_name, settings)
        if "wandb" in names:
            self._open_wandb(run_name, settings)

    def log(self, row: dict[str, Any]) -> None:
        """Pass on the numbers of one row of the training log."""
        numbers = {
            name: float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name not in ("step", "num_steps")
        }
        for log in self._log:
            log(numbers, int(row["step"]))

    def close(self) -> None:
        """Write what is still buffered."""
        for close in self._close:
            close()

    def _open_tensorboard(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder))

        def log(numbers: dict[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        self._log.append(log)
        self._close.append(writer.close)
        logger.info("tensorboard --logdir %s", folder)

    def _open_mlflow(self, run_name: str, settings: dict[str, Any]) -> None:
        import mlflow

        mlflow.start_run(run_name=run_name)
        mlflow.log_params(settings)
        self._log.append(lambda numbers, step: mlflow.log_metrics(numbers, step=step))
        self._close.append(mlflow.end_run)

    def _open_wandb(self, run_name: str, settings: dict[str, Any]) -> None:
        import wandb

        run = wandb.init(project="tuneloop", name=run_name, config=settings)
        self._log.append(lambda numbers, step: run.log(numbers, step=step))
        self._close.append(run.finish)


def dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings in one dictionary, by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
