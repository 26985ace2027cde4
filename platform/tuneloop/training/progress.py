"""Progress of trainings in other processes, logged while this one waits for them."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tuneloop.cluster import WaitingNotice

if TYPE_CHECKING:
    from tuneloop.training.trackers import Trackers

logger = logging.getLogger("tuneloop.training")

# One JSON line for each finished step.
PROGRESS_FILE = "progress.jsonl"
_LOG_EVERY_S = 5.0
T = TypeVar("T")


def run_in_thread(run: Callable[[], T], tell: Callable[[], int]) -> T:
    """Return what `run` returns, and meanwhile log the progress and what is waited for.

    In the main thread Ray Train and Ray Tune would take over Ctrl-C: one ends the process with
    exit code 0, the other goes on. In a thread of its own they leave it to the caller, who shuts
    Ray down; the checkpoints stay.

    Args:
        run: Waits for Ray.
        tell: Logs the progress and returns how far it is, in any unit.
    """
    value: list[T] = []
    failure: list[BaseException] = []

    def call() -> None:
        try:
            value.append(run())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=call, name="ray", daemon=True)
    thread.start()
    notice = WaitingNotice()
    while thread.is_alive():
        thread.join(timeout=0.5)
        notice.tell(tell())
    if failure:
        raise failure[0]
    return value[0]


class TrainingProgress:
    """Logs new lines of a training's progress file, at most one every few seconds.

    Args:
        path: The file, which need not exist yet; lines that are there already are not logged.
        trackers: Experiment trackers that get every line.
    """

    def __init__(self, path: Path, trackers: Trackers | None = None) -> None:
        self.path = path
        self.trackers = trackers
        self.position = path.stat().st_size if path.exists() else 0
        self.logged_at = 0.0
        self.pending: dict[str, Any] | None = None

    def tell(self, final: bool = False) -> int:
        """Log the newest line if it is new, and return the bytes read; `final` does not wait."""
        # The directory goes when the model is published.
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if line.endswith(b"\n"):
                    self.position += len(line)
                    self.pending = json.loads(line)
                    if self.trackers is not None:
                        self.trackers.log(self.pending)
        row = self.pending
        if row is not None and (final or time.monotonic() - self.logged_at >= _LOG_EVERY_S):
            self.logged_at, self.pending = time.monotonic(), None
            left_s = (row["num_steps"] - row["step"]) * row["elapsed_s"] / row["step"]
            logger.info(
                "step %d/%d  loss %.4f  learning rate %.2e  %.0f tokens/s  ETA %s",
                row["step"],
                row["num_steps"],
                row["loss"],
                row["learning_rate"],
                row["tokens_per_s"],
                duration(left_s),
            )
        return self.position


def duration(seconds: float) -> str:
    """Return a time as `2 h 3 min`, `4 min 5 s` or `6 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
