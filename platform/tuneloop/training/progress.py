"""Progress of trainings in other processes, shown while this one waits for them."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tuneloop.cluster import WaitingNotice
from tuneloop.errors import UserError
from tuneloop.progress import Progress
from tuneloop.text import format_duration

if TYPE_CHECKING:
    from tuneloop.training.trackers import Trackers

logger = logging.getLogger("tuneloop.training")

# One JSON line for each finished step.
PROGRESS_FILE = "progress.jsonl"
# Why rows are padded, where they are not packed.
NOTE_FILE = "packing_fault.txt"
PADDED_NOTICE = (
    "rows of this model cannot be packed (%s): each is computed by itself, padded, in the model's "
    "own attention; the result is right, the training slower"
)
# Whether somebody may ask the training to stop before its end, and who does so puts this there.
MAY_STOP_FILE = "may_stop"
STOP_FILE = "stop"
T = TypeVar("T")


class TrainingStopped(UserError):
    """The training was asked to stop before its end; its workers ended as after any training."""


def run_in_thread(run: Callable[[], T], poll: Callable[[], int]) -> T:
    """Return what `run` returns; show the progress meanwhile, and log what workers wait for.

    In the main thread Ray Train and Ray Tune would take over Ctrl-C: one ends the process with
    exit code 0, the other ignores it. In another thread they leave it to the caller, who shuts Ray
    down; the checkpoints stay.

    Args:
        run: Waits for Ray.
        poll: Shows the progress and returns how far it is, in any unit.
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
        notice.tell(poll())
    if failure:
        raise failure[0]
    return value[0]


class TrainingProgress:
    """Shows the newest line of a training's progress file, used as a context.

    Args:
        path: The file, which need not exist yet; lines that are there already are not shown.
        label: What the bar says.
        trackers: Experiment trackers that get every line.
    """

    def __init__(
        self, path: Path, label: str = "training", trackers: Trackers | None = None
    ) -> None:
        self.path = path
        self.trackers = trackers
        self.position = path.stat().st_size if path.exists() else 0
        self.pending: dict[str, Any] | None = None
        self.told = False
        self.shown = Progress(label, unit="steps")

    def __enter__(self) -> Self:
        self.shown.__enter__()
        return self

    def __exit__(self, *reason: object) -> None:
        self.poll(final=True)
        self.shown.__exit__(*reason)

    def poll(self, final: bool = False) -> int:
        """Show the newest line if it is new, and return the bytes read; `final` does not wait."""
        note = self.path.with_name(NOTE_FILE)
        if not self.told and note.exists():
            self.told = True
            logger.warning(PADDED_NOTICE, note.read_text(encoding="utf-8"))
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
        if row is None:
            return self.position
        loss, step, num_steps = f"loss {row['loss']:.4f}", row["step"], row["num_steps"]
        self.shown.update(step, f"{loss}, {row['tokens_per_s']:.0f} tokens/s", num_steps)
        logged = self.shown.logged
        self.shown.log(
            logger,
            "step %d/%d  %s  learning rate %.2e  %.0f tokens/s  ETA %s",
            step,
            num_steps,
            loss,
            row["learning_rate"],
            row["tokens_per_s"],
            format_duration((num_steps - step) * row["elapsed_s"] / step),
            now=final,
        )
        if self.shown.logged != logged:
            self.pending = None
        return self.position
