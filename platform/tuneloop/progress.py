"""How far work has come: a bar for a person at a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

LOG_EVERY_S = 5.0
_POLL_EVERY_S = 1.0


class Progress:
    """One piece of work, used as a context.

    The bar shows count, rate and time left; it goes when the work is done. Log lines go to the
    artifact's log in any case, and to standard error where there is no bar.

    Args:
        label: What is done, for example `training`.
        total: How much there is to do; None if that is not known.
        unit: What is counted, in the plural, for example `rows`.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.logged = time.monotonic()
        self.bars = _Bars.shown() if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.task = self.bars.add(self.label, self.total, self.unit)
        return self

    def __exit__(self, *reason: object) -> None:
        if self.bars is not None:
            self.bars.drop(self.task)

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Move the bar.

        Args:
            done: How much is done in all.
            note: What else to show, for example the loss.
            total: How much there is to do, where that was not known before.
        """
        if self.bars is not None:
            self.bars.update(self.task, completed=done, note=note, total=total or self.total)

    def log(self, logger: logging.Logger, message: str, *values: object, now: bool = False) -> None:
        """Log a line, unless the last one was logged less than `LOG_EVERY_S` ago; `now` always."""
        if now or time.monotonic() - self.logged >= LOG_EVERY_S:
            self.logged = time.monotonic()
            logger.info(message, *values, extra={"progress": True})

    @contextlib.contextmanager
    def following(self, count: Callable[[], int], logger: logging.Logger) -> Iterator[None]:
        """Ask again and again how much is done, while the caller waits for work elsewhere."""

        def tell() -> None:
            done = count()
            self.update(done)
            if done:
                counts = f"{done:,} of {self.total:,} {self.unit}"
                self.log(logger, "%s: %s", self.label, counts)

        with repeating(tell, _POLL_EVERY_S):
            yield


@contextlib.contextmanager
def repeating(act: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call a function again and again in another thread, while the caller waits."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            act()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Bars(rich_progress.Progress):
    """All bars of this process, below the log lines; shown while there is one."""

    only: _Bars | None = None

    @classmethod
    def shown(cls) -> _Bars:
        if cls.only is None:
            note = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            cls.only = cls(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(bar_width=10),
                _Counts(),
                rich_progress.TextColumn("{task.fields[note]}", table_column=note),
                console=Console(stderr=True),
                transient=True,
                expand=True,
            )
        return cls.only

    def add(self, label: str, total: int | None, unit: str) -> rich_progress.TaskID:
        task = self.add_task(label, total=total, unit=unit, note="")
        self.start()
        return task

    def drop(self, task: rich_progress.TaskID) -> None:
        self.remove_task(task)
        if not self.tasks:
            self.stop()


class _Counts(rich_progress.ProgressColumn):
    """`1,200/5,000 rows  310/s  0:12 left`."""

    def render(self, task: rich_progress.Task) -> Text:
        if task.total is None:
            return Text(f"{task.elapsed or 0:.0f} s", style="dim")
        text = Text(f"{task.completed:,.0f}/{task.total:,.0f} {task.fields['unit']}")
        if task.speed and task.time_remaining is not None:
            rate = f"{task.speed:,.0f}" if task.speed >= 10 else f"{task.speed:.2f}"
            minutes, seconds = divmod(round(task.time_remaining), 60)
            text.append(f"  {rate}/s", style="cyan")
            text.append(f"  {minutes}:{seconds:02d} left", style="cyan")
        return text
